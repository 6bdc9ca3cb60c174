"""The activation stage between the MLP's two GEMMs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from overdrive.functional.gemm import GemmOptions, calibrate
from overdrive.ops.activation import ACTIVATIONS, activation, activation_backward
from overdrive.ops.quantize import Mode, Quantization, Quantized
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
    fused = rules is not None and rules.quantizes
    tail = rules.input.arguments(scales, True, gemm.weight_grad) if fused else Quantization(Mode.PLAIN, h.dtype)
    outputs = activation(h, options.name, options.limit, options.alpha, *tail)
    if fused:
        shape = (h.shape[0], h.shape[1] // 2 if options.gated else h.shape[1])
        return rules.input.wrap(Quantized(*outputs), shape, h.dtype, True, gemm.weight_grad)
    if rules is not None:
        calibrate(outputs[0], rules.input, scales)
    return outputs[0]


def activation_gradient(
    dy: torch.Tensor, h: torch.Tensor, options: ActivationOptions, gemm: GemmOptions, scales: Scales
) -> tuple[Operand, torch.Tensor | None]:
    """(gradient of h as the backward products of `gemm`, which made h, read it; its bias gradient)."""
    rules = gemm.rules
    fused = rules is not None and rules.quantizes
    row, col = gemm.input_grad, gemm.weight_grad
    tail = rules.grad_output.arguments(scales, row, col) if fused else Quantization(Mode.PLAIN, h.dtype)
    *outputs, dbias = activation_backward(dy, h, options.name, options.limit, options.alpha, gemm.bias_grad, *tail)
    if fused:
        dh = rules.grad_output.wrap(Quantized(*outputs), (h.shape[0], h.shape[1]), h.dtype, row, col)
    else:
        dh = outputs[0]
    return dh, dbias if gemm.bias_grad else None
