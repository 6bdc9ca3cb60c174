"""Weights that a layer holds in FP8 only, as quantized_model_init makes them: one copy, whose parameters are frozen views of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from overdrive.functional.gemm import GemmOptions
from overdrive.functional.linear import Parameters
from overdrive.modules.checks import InitMethod
from overdrive.modules.linear_names import LinearNames
from overdrive.scaling.float8_tensor import Float8Tensor
from overdrive.scaling.quantized_init import STATE, joined, rows_of, same_scaling, with_transpose
from overdrive.scaling.quantizers import Quantizer, Scales
from overdrive.scaling.tensor import QuantizedTensor


class QuantizedWeights(nn.Module):
    """The part of a layer that makes, shows, replaces and reads such weights."""

    def __init__(self) -> None:
        super().__init__()
        self._linears: list[LinearNames] = []
        self._fused: dict[str, torch.Tensor] = {}
        self._quantized: dict[int, QuantizedTensor] = {}  # by GEMM
        self._weight_quantizer = STATE.quantizer

    @property
    def _label(self) -> str:
        """What errors call the layer."""
        return type(self).__name__

    def _init_quantized(self, quantizer: Quantizer, weight: torch.Tensor, init: InitMethod) -> None:
        """Initialise and quantize the weight of the last GEMM that was added."""
        index, names = len(self._linears) - 1, self._linears[-1]
        with torch.no_grad():
            if not weight.is_meta:
                for part in weight.split(names.sizes):
                    init(part)
            self._quantized[index] = quantizer(weight, Scales())[0]
        self._show_quantized(index)
        if STATE.preserve and not weight.is_meta:
            for name, part in zip(names.weights, weight.split(names.sizes)):
                getattr(self, name)._initial = part.to("cpu", copy=True)

    def _show_quantized(self, index: int) -> None:
        """Register views of a weight held in FP8 as its parameters, frozen, with the attributes of those before."""
        linear, q, start = self._linears[index], self._quantized[index], 0
        for name, rows in zip(linear.weights, linear.sizes):
            view, before = Float8Tensor.from_quantized(rows_of(q, start, rows), (rows, q.shape[1])), self._parameters.get(name)
            parameter = nn.Parameter(view, requires_grad=before is not None and before.requires_grad)
            if isinstance(before, Float8Tensor):
                vars(parameter).update({key: value for key, value in vars(before).items() if key not in vars(parameter)})
            super().register_parameter(name, parameter)
            start += rows

    def _accept_quantized(self, index: int, name: str, parameter: nn.Parameter) -> None:
        """Follow the assignment of a weight: its FP8 data is shared, a weight in high precision ends the FP8 one."""
        held, shared = self._quantized.pop(index, None), parameter if isinstance(parameter, Float8Tensor) else None
        if held is not None and self._linears[index].split:
            self._quantized[index] = held
            raise NotImplementedError(
                f"{self._label}: .{name} is a part of one FP8 weight and cannot be assigned; use load_state_dict, or assign .weight"
            )
        if shared is not None and held is None:
            raise NotImplementedError(
                f"{self._label}: .{name} was given a Float8Tensor, which only layers built in quantized_model_init take; "
                "assign its .dequantize()"
            )
        if shared is not None:
            self._quantized[index] = shared.quantized

    @property
    def _views(self) -> dict[str, Any]:
        """The parameters that show weights held in FP8."""
        return {name: value for name, value in self._parameters.items() if isinstance(value, Float8Tensor)}

    def _as_read(self, index: int, parameters: Parameters, options: GemmOptions) -> QuantizedTensor | None:
        """A weight held in FP8 as a GEMM in FP8 reads it; for one in high precision its values go into `parameters`."""
        q = self._quantized[index]
        if not options.quantizes:
            parameters.fused_weight = q.dequantize().to(options.dtype)
            return None
        assert options.rules is not None
        quantizer = options.rules.weight
        if not same_scaling(q.mode, quantizer.mode):
            raise RuntimeError(
                f"{self._label}: its weight was quantized as {q.mode.name}, which the autocast's "
                f"{type(options.rules.recipe).__name__} cannot read (it wants {quantizer.mode.name}); give quantized_model_init "
                "and autocast the same recipe, or use autocast(enabled=False)"
            )
        return with_transpose(q, quantizer) if options.input_grad else q

    def _loaded(self, index: int, before: QuantizedTensor, loaded: set[str], given: dict[str, Float8Tensor]) -> QuantizedTensor:
        """A weight to hold in FP8 after its parameters were loaded in high precision; one `given` in FP8 is taken bit for bit.

        It stays in the memory that it had, as CUDA graphs and layers that share it expect.
        """
        linear, quantizer = self._linears[index], self._weight_quantizer
        assert quantizer is not None
        self._fused.pop(linear.fused[0], None)
        if not loaded.intersection(linear.weights):
            return before
        weight = torch.cat([getattr(self, name).detach() for name in linear.weights])
        q = None
        if given.keys() >= {*linear.weights}:
            q = joined([given[name].quantized for name in linear.weights], quantizer.mode, weight.device, weight.dtype)
        if q is None or q.shape != before.shape:
            q = quantizer(weight, Scales())[0]
        assert q.data is not None
        assert before.data is not None
        if (q.mode, q.dtype, q.data.device) != (before.mode, before.dtype, before.data.device):
            return q
        before.data.copy_(q.data)
        before.scale_inv.copy_(q.scale_inv)
        return before
