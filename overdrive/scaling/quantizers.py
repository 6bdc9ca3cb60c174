"""From a recipe to how each tensor of a GEMM is quantized."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from overdrive.ops.quantize import PAD, Mode, Quantization, quantize
from overdrive.ops.scaling import SLOTS_PER_GEMM
from overdrive.recipe import DelayedScaling, Float8BlockScaling, Float8CurrentScaling, Recipe
from overdrive.scaling.tensor import Operand, QuantizedTensor

_BLOCK = {1: Mode.BLOCK_1D, 2: Mode.BLOCK_2D}


class Scales(NamedTuple):
    """Where delayed scaling finds its scales: the step's snapshot f32 [capacity] and the module's slots i32. None for other
    recipes.
    """

    snapshot: torch.Tensor | None = None
    slots: torch.Tensor | None = None


@dataclass
class Quantizer:
    """How one tensor is quantized. slot counts within the module; tenant < 0 records no amax."""

    mode: Mode
    dtype: torch.dtype
    slot: int
    tenant: int = -1
    power_of_2: bool = False

    def at(self, slot: int, tenant: int) -> Quantizer:
        """The same for another slot."""
        return Quantizer(self.mode, self.dtype, slot, tenant, self.power_of_2)

    def arguments(self, scales: Scales, row: bool, col: bool) -> Quantization:
        """The tail of an op's arguments."""
        return Quantization(self.mode, self.dtype, scales.snapshot, scales.slots, self.slot, self.tenant, self.power_of_2, row, col)

    def __call__(
        self, x: torch.Tensor, scales: Scales, row: bool = True, col: bool = False, bias_grad: bool = False
    ) -> tuple[QuantizedTensor, torch.Tensor | None]:
        """Quantize x [T, K]; with bias_grad also its sum over T."""
        quantized, (column_sum,) = produce(quantize, (x, bias_grad), self, scales, (x.shape[0], x.shape[1]), x.dtype, row, col)
        assert isinstance(quantized, QuantizedTensor)
        return quantized, column_sum if bias_grad else None


def produce(
    op: Any,
    arguments: tuple[Any, ...],
    quantizer: Quantizer | None,
    scales: Scales,
    shape: tuple[int, int],
    dtype: torch.dtype,
    row: bool = True,
    col: bool = False,
    at: int = 0,
) -> tuple[Operand, tuple[Any, ...]]:
    """Run an op with a QUANTIZATION tail: (its output of `shape`, quantized where there is a quantizer; its other outputs or None).

    dtype: of the output, or what its quantized values stand for. row, col: which layouts. at: where among the op's outputs the
    Quantized begins.
    """
    if quantizer is None:
        outputs = op.unfilled(*arguments, *Quantization(Mode.PLAIN, dtype))
        return outputs[at], outputs[:at] + outputs[at + 4 :]
    outputs = op.unfilled(*arguments, *quantizer.arguments(scales, row, col))
    data, data_t, scale_inv, scale_inv_t = outputs[at : at + 4]
    if quantizer.mode.per_tensor or scale_inv_t is None:  # None: of the layout that nobody asked for
        scale_inv_t = scale_inv
    elif scale_inv is None:
        scale_inv = scale_inv_t
    layouts = (data if row else None, data_t if col else None)
    return QuantizedTensor(*layouts, scale_inv, scale_inv_t, quantizer.mode, shape, dtype), outputs[:at] + outputs[at + 4 :]


@dataclass
class Rules:
    """How the GEMMs of a module run under one recipe. The quantizers are those of its first GEMM; `at` gives another's.

    quantizes: False where only amaxes are recorded (calibration).
    """

    recipe: Recipe
    quantizes: bool
    input: Quantizer
    weight: Quantizer
    output: Quantizer
    grad_output: Quantizer
    grad_input: Quantizer
    _known: dict[tuple[int, bool], Rules] = field(default_factory=dict, repr=False, compare=False)

    def at(self, gemm: int, record: bool = True) -> Rules:
        """The rules of GEMM number `gemm`; record=False leaves the forward amaxes alone (they were recorded before)."""
        if torch.compiler.is_compiling():
            return self._at(gemm, record)
        rules = self._known.get((gemm, record))
        if rules is None:
            rules = self._known[gemm, record] = self._at(gemm, record)
        return rules

    def _at(self, gemm: int, record: bool) -> Rules:
        first = gemm * SLOTS_PER_GEMM
        forward = self.input.tenant if record else -1
        return Rules(
            self.recipe,
            self.quantizes,
            self.input.at(first + self.input.slot, forward),
            self.weight.at(first + self.weight.slot, forward),
            self.output.at(first + self.output.slot, forward),
            self.grad_output.at(first + self.grad_output.slot, self.grad_output.tenant),
            self.grad_input.at(first + self.grad_input.slot, self.grad_input.tenant),
        )


def rules_for(recipe: Recipe, tenant: int, quantizes: bool = True) -> Rules:
    """The rules of a recipe; tenant as `arena.rules_tenant` numbers it (delayed scaling only)."""
    fwd, bwd = recipe.fp8_format.fwd, recipe.fp8_format.bwd
    assert fwd is not None
    assert bwd is not None
    if isinstance(recipe, DelayedScaling):
        kinds = [(Mode.DELAYED, False)] * 5
    elif isinstance(recipe, Float8CurrentScaling):
        kinds = [(Mode.CURRENT, recipe.use_power_2_scales)] * 5
    elif isinstance(recipe, Float8BlockScaling):
        x, w, g = recipe.x_block_scaling_dim, recipe.w_block_scaling_dim, recipe.grad_block_scaling_dim
        kinds = [(_BLOCK[dim], not recipe.use_f32_scales) for dim in (x, w, x, g, g)]
    else:
        raise NotImplementedError(
            f"recipe {type(recipe).__name__} is not built yet; use DelayedScaling, Float8CurrentScaling or Float8BlockScaling"
        )
    quantizers = [
        Quantizer(mode, fwd if slot < 3 else bwd, slot, tenant, power_of_2) for slot, (mode, power_of_2) in enumerate(kinds)
    ]
    return Rules(recipe, quantizes, *quantizers)  # pyright: ignore[reportArgumentType]


def fits_fp8(*features: int) -> bool:
    """Whether FP8 GEMMs take these feature counts (tokens are padded, features are not)."""
    return all(size % PAD == 0 and size > 0 for size in features)
