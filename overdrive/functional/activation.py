"""The activation stage between the MLP's two GEMMs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from overdrive.functional.gemm import GemmOptions, calibrate, releases
from overdrive.ops.activation import ACTIVATIONS, activation, activation_backward, activation_backward_into
from overdrive.ops.quantize import Mode, Quantization
from overdrive.scaling.quantizers import Scales
from overdrive.scaling.tensor import Operand


@dataclass
class ActivationOptions:
    """name: a key of ops.activation.ACTIVATIONS; limit and alpha serve clamped_swiglu."""

    name: str
    limit: float = 7.0
    alpha: float = 1.702

    @property
    def gated(self) -> bool:
        """Whether the input has two halves."""
        return ACTIVATIONS[self.name].gated


def activate(h: torch.Tensor, options: ActivationOptions, gemm: GemmOptions, scales: Scales) -> Operand:
    """The activation of h [T, F or 2F] as the input [T, F] of `gemm`, quantized by the same kernel where that runs in FP8."""
    rules = gemm.rules
    arguments = (h, options.name, options.limit, options.alpha)
    if rules is None or not rules.quantizes:
        y = activation(*arguments, *Quantization(Mode.PLAIN, h.dtype))[0]
        if rules is not None:
            calibrate(y, rules.input, scales)
        return y
    outputs = activation(*arguments, *rules.input.arguments(scales, True, gemm.weight_grad))
    shape = (h.shape[0], h.shape[1] // 2 if options.gated else h.shape[1])
    return rules.input.wrap(outputs, shape, h.dtype, True, gemm.weight_grad)


def activation_gradient(
    dy: torch.Tensor, h: torch.Tensor, options: ActivationOptions, gemm: GemmOptions, scales: Scales
) -> tuple[Operand, torch.Tensor | None]:
    """(gradient of h as the backward products of `gemm`, which made h, read it; its bias gradient). In high precision it takes the
    place of dy, or of a gated h, wherever that is not needed any more.
    """
    rules = gemm.rules
    arguments = (dy, h, options.name, options.limit, options.alpha, gemm.bias_grad)
    if rules is None or not rules.quantizes:
        if torch.compiler.is_compiling() or (options.gated and not releases()):
            dh, *_, dbias = activation_backward(*arguments, *Quantization(Mode.PLAIN, h.dtype))
        else:
            dh = h if options.gated else dy
            dbias = activation_backward_into(dh, *arguments)
    else:
        row, col = gemm.input_grad, gemm.weight_grad
        *outputs, dbias = activation_backward(*arguments, *rules.grad_output.arguments(scales, row, col))
        dh = rules.grad_output.wrap(outputs, (h.shape[0], h.shape[1]), h.dtype, row, col)
    return dh, dbias if gemm.bias_grad else None
