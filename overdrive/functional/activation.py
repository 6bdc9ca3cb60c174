"""The activation stage between the MLP's two GEMMs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from overdrive.functional.gemm import GemmOptions, calibrated, quantizing, releases
from overdrive.ops.activation import ACTIVATIONS, activation, activation_backward, activation_backward_into
from overdrive.ops.gemm_epilogue import gemm_activation, gemm_activation_backward, gemm_activation_quantized
from overdrive.scaling.quantizers import Scales, produce
from overdrive.scaling.tensor import Operand, QuantizedTensor


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
    rules = quantizing(gemm.rules)
    shape = (h.shape[0], h.shape[1] // 2 if options.gated else h.shape[1])
    quantizer = None if rules is None else rules.input
    arguments = (h, options.name, options.limit, options.alpha)
    y, _ = produce(activation, arguments, quantizer, scales, shape, h.dtype, True, gemm.weight_grad)
    return calibrated(y, gemm.rules, scales)


def activation_gradient(
    dy: torch.Tensor, h: torch.Tensor, options: ActivationOptions, gemm: GemmOptions, scales: Scales
) -> tuple[Operand, torch.Tensor | None]:
    """(gradient of h as the backward products of `gemm`, which made h, read it; its bias gradient). In high precision it takes the
    place of dy, or of a gated h, wherever that is not needed any more.
    """
    arguments = (dy, h, options.name, options.limit, options.alpha, gemm.bias_grad)
    rules = quantizing(gemm.rules)
    quantizer = None if rules is None else rules.grad_output
    if quantizer is None and not torch.compiler.is_compiling() and (not options.gated or releases()):
        dh = h if options.gated else dy
        dbias = activation_backward_into(dh, *arguments)
    else:
        shape, layouts = (h.shape[0], h.shape[1]), (gemm.input_grad, gemm.weight_grad)
        dh, (dbias,) = produce(activation_backward, arguments, quantizer, scales, shape, h.dtype, *layouts)
    return dh, dbias if gemm.bias_grad else None


def activation_product(
    x: Operand,
    weight: Operand,
    bias: torch.Tensor | None,
    options: ActivationOptions,
    fc1: GemmOptions,
    fc2: GemmOptions,
    scales: Scales,
) -> tuple[torch.Tensor, Operand]:
    """(h, activation of h as the input of fc2) of h = x weight^T + bias, by one kernel."""
    if isinstance(x, torch.Tensor):
        return gemm_activation(x, weight, bias, options.name)
    assert isinstance(weight, QuantizedTensor)
    assert fc2.rules is not None
    arguments = (x.data, weight.data, x.scale_inv, weight.scale_inv, bias, fc1.dtype, options.name)
    shape, quantizer = (x.shape[0], weight.shape[0]), fc2.rules.input
    out, (h,) = produce(gemm_activation_quantized, arguments, quantizer, scales, shape, fc1.dtype, True, fc2.weight_grad, at=1)
    return h, out


def activation_product_gradient(
    dy: Operand, weight: Operand, h: torch.Tensor, options: ActivationOptions, gemm: GemmOptions
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(gradient of h, bias gradient of `gemm`, which made h, activation of h) of dy, the gradient of activation(h) weight^T.

    In high precision. The activation, which forward did not keep, takes the place of h where that is not needed any more.
    """
    out = h if releases() else torch.empty_like(h)
    dh, dbias = gemm_activation_backward(out, dy, weight, h, options.name, gemm.bias_grad)
    return dh, dbias if gemm.bias_grad else None, out
