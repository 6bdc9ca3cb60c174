"""`LayerNormLinear`: a norm and the linear layer that reads it, one autograd node and, in FP8, no high-precision copy between."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from overdrive.functional.layernorm_linear import LayerNormLinearOptions, layernorm_linear
from overdrive.functional.norm import NormOptions
from overdrive.functional.qkv import QKVLayout
from overdrive.modules.base import Module, without_autocast
from overdrive.modules.checks import (
    NORMALIZATIONS,
    PARALLEL_MODES,
    InitMethod,
    default_device,
    epsilon,
    mark_sequence_parallel,
    normal_init,
    one_of,
    positive_int,
    refuse,
    refuse_parallelism,
    split_sizes,
)
from overdrive.modules.weight_grad import WeightGradStore
from overdrive.scaling.autocast import current_context


def add_norm_parameters(
    module: Module, size: int, normalization: str, zero_centered: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """Register layer_norm_weight and, for a LayerNorm, layer_norm_bias, at the values that leave the input's scale alone."""
    gain = torch.full((size,), 0.0 if zero_centered else 1.0, dtype=dtype, device=device)
    module.layer_norm_weight = nn.Parameter(gain)
    module.layer_norm_bias = nn.Parameter(torch.zeros_like(gain)) if normalization == "LayerNorm" else None
    for parameter in (module.layer_norm_weight, module.layer_norm_bias):
        if parameter is not None:
            mark_sequence_parallel(parameter)


class LayerNormLinear(Module):
    """y = norm(x) W^T + b, in FP8 inside an `autocast`.

    Parameters: layer_norm_weight [in_features], layer_norm_bias (LayerNorm only), and weight and bias as in `Linear`,
    parameters_split too. normalization: "LayerNorm" or "RMSNorm". zero_centered_gamma: the gain is 1 + layer_norm_weight.
    return_layernorm_output: also return the norm's output, after the bias if that is returned too. Other arguments as in
    `Linear`. parallel_mode="row" and arguments of parallelism raise NotImplementedError.
    """

    layer_norm_weight: torch.nn.Parameter
    layer_norm_bias: torch.nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        init_method: InitMethod | None = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        return_layernorm_output: bool = False,
        return_layernorm_output_gathered: bool = False,
        parameters_split: Any = None,
        zero_centered_gamma: bool = False,
        device: torch.device | str | None = None,
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        refuse_parallelism(
            self._label,
            {
                "sequence_parallel": sequence_parallel,
                "tp_group": tp_group,
                "tp_size": tp_size,
                "return_layernorm_output_gathered": return_layernorm_output_gathered,
                "ub_overlap_ag": ub_overlap_ag,
                "ub_overlap_rs": ub_overlap_rs,
                "ub_overlap_rs_dgrad": ub_overlap_rs_dgrad,
                "ub_bulk_wgrad": ub_bulk_wgrad,
                "ub_bulk_dgrad": ub_bulk_dgrad,
                "ub_name": ub_name,
                "symmetric_ar_type": symmetric_ar_type,
            },
        )
        self.parallel_mode = one_of(self._label, "parallel_mode", parallel_mode, PARALLEL_MODES)
        if parallel_mode == "row":
            refuse(self._label, {"parallel_mode": (parallel_mode, None)}, 'a norm needs whole rows; use "column" or None')
        self.normalization = one_of(self._label, "normalization", normalization, NORMALIZATIONS)
        self.in_features = positive_int(self._label, "in_features", in_features)
        self.out_features = positive_int(self._label, "out_features", out_features)
        self.eps = epsilon(self._label, eps)
        self.use_bias, self.return_bias, self.return_layernorm_output = bias, return_bias, return_layernorm_output
        self.zero_centered_gamma = zero_centered_gamma
        self._norm = NormOptions(self.eps, zero_centered_gamma, normalization == "RMSNorm")
        self._weight_grads = WeightGradStore(fuse_wgrad_accumulation, delay_wgrad_compute)
        device, dtype = default_device(device), params_dtype or torch.get_default_dtype()
        self._add_slots(1, device)
        add_norm_parameters(self, in_features, normalization, zero_centered_gamma, dtype, device)
        self._add_linear(
            "",
            out_features,
            in_features,
            bias,
            dtype=dtype,
            device=device,
            init=init_method or normal_init,
            sizes=split_sizes(self._label, parameters_split, out_features),
            get_rng_state_tracker=get_rng_state_tracker,
        )

    def forward(
        self, inp: torch.Tensor, is_first_microbatch: bool | None = None, fp8_output: bool = False, fp8_grad: bool = False
    ) -> Any:
        """inp [..., in_features] -> out [..., out_features], or a tuple (out[, bias][, norm output]). Arguments as Linear's."""
        reason = "it is built for Linear, LayerNorm and RMSNorm"
        refuse(self._label, {"fp8_output": (fp8_output, False), "fp8_grad": (fp8_grad, False)}, reason)
        return self._forward(inp, is_first_microbatch, residual=False)

    def forward_with_residual(self, inp: torch.Tensor, is_first_microbatch: bool | None = None) -> tuple[Any, torch.Tensor]:
        """(what forward returns, inp): the gradient of the second joins that of the norm's input inside the norm's backward
        kernel.
        """
        return self._forward(inp, is_first_microbatch, residual=True)

    def forward_qkv(
        self, inp: torch.Tensor, layout: QKVLayout, is_first_microbatch: bool | None = None, residual: bool = False
    ) -> Any:
        """forward, or forward_with_residual, with a tuple (Q, K, V) for the output: their gradients come back without a
        concatenation.
        """
        return self._forward(inp, is_first_microbatch, residual, layout)

    def _forward(self, inp: torch.Tensor, is_first_microbatch: bool | None, residual: bool, qkv: QKVLayout | None = None) -> Any:
        weights = self._weights_of(0)
        dtype = self._check_input(inp, self.in_features, weights[0], "in_features")
        context, training = current_context()
        with without_autocast(inp.device):
            parameters = self._parameters_of(0, weights, not self.return_bias, dtype)
            inp = inp if inp.dtype == dtype else inp.to(dtype)
            gamma, beta = self.layer_norm_weight, self.layer_norm_bias
            rules = self._rules(context, training, inp.numel() // self.in_features, self.in_features, self.out_features)
            scales = self._scales(context)
            input_grad = inp.requires_grad or gamma.requires_grad or (beta is not None and beta.requires_grad)
            gemm = self._gemm_options(0, rules, dtype, weights, parameters.biases, input_grad, training, is_first_microbatch)
            parameters.cached = self._cached_weight(0, parameters, gemm, scales, is_first_microbatch)
            options = LayerNormLinearOptions(self._norm, gemm, self.return_layernorm_output, residual, qkv)
            out, *rest = layernorm_linear(inp, gamma, beta, parameters, scales, options)
        if qkv is not None:
            out, rest = (out, *rest[:2]), rest[2:]
        outputs: list[Any] = [out]
        if self.return_bias:
            outputs.append(self._whole_bias(0, dtype))
        if self.return_layernorm_output:
            outputs.append(rest[0])
        result = outputs[0] if len(outputs) == 1 else tuple(outputs)
        return (result, rest[-1]) if residual else result

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, eps={self.eps}, "
            f"normalization={self.normalization}, bias={self.use_bias}"
        )
