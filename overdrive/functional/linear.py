"""Linear: y = x w^T + b, one autograd node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from overdrive.functional.gemm import (
    GemmOptions,
    forward_product,
    grad_operand,
    input_operand,
    product_gradients,
    weight_operand,
)
from overdrive.functional.node import applied, first_order
from overdrive.scaling.float8_tensor import Float8Tensor, quantized_of
from overdrive.scaling.quantizers import Scales
from overdrive.scaling.tensor import Operand, QuantizedTensor, pack, unpack


@dataclass
class Parameters:
    """A weight [N, K] and bias [N], in one parameter each or in several.

    Where there are several, they are views of `fused_weight` and `fused_bias`, which the products read; gradients go to the
    parts. No biases: none is added. cached: the weight as quantized for an earlier microbatch, or as the module holds it.
    weights: None each where the module holds FP8 only.
    """

    weights: tuple[torch.Tensor | None, ...]
    biases: tuple[torch.Tensor, ...]
    fused_weight: torch.Tensor | None = None
    fused_bias: torch.Tensor | None = None
    cached: QuantizedTensor | None = None

    def flat(self) -> tuple[Any, ...]:
        """As arguments of an autograd.Function; `read` is the way back."""
        return self.fused_weight, self.fused_bias, self.cached, *self.weights, *self.biases

    @property
    def count(self) -> int:
        """How many arguments `flat` gives."""
        return 3 + len(self.weights) + len(self.biases)


def read(flat: tuple[Any, ...], options: GemmOptions) -> tuple[torch.Tensor, torch.Tensor | None, QuantizedTensor | None]:
    """(weight, bias, cached) of `Parameters.flat`."""
    weight, bias, cached, *parameters = flat
    parts = len(options.splits)
    if weight is None:
        weight = parameters[0]
    if bias is None and len(parameters) > parts:
        bias = parameters[parts]
    return weight, bias, cached


def gradients(
    flat_count: int, dweights: tuple[torch.Tensor | None, ...], dbias: torch.Tensor | None, options: GemmOptions
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of `Parameters.flat`."""
    biases = flat_count - 3 - len(options.splits)
    if dbias is None or biases == 0:
        return (None, None, None, *dweights, *(None,) * biases)
    return (None, None, None, *dweights, *((dbias,) if biases == 1 else dbias.split(options.splits)))


@dataclass
class LinearOptions:
    """gemm: the product. training: a backward may come. save_original_input: keep x itself and quantize its transpose in backward.
    fp8_output: return a Float8Tensor.
    """

    gemm: GemmOptions
    training: bool
    save_original_input: bool = False
    fp8_output: bool = False


def _quantized_input(x: torch.Tensor, options: GemmOptions) -> Operand:
    """x as a matrix; a Float8Tensor that fits the recipe is taken as it is, another is dequantized."""
    if isinstance(x, Float8Tensor):
        q = quantized_of(x)
        rules = options.rules
        mode = None if rules is None else rules.input.mode
        fits = options.quantizes and mode is not None and (q.mode == mode or (q.mode.per_tensor and mode.per_tensor))
        if fits and (q.data_t is not None or not options.weight_grad):
            return q
        x = x.dequantize()
    return x.reshape(-1, x.shape[-1])


_FEW = 2**20
"""Elements of an input whose transposed FP8 copy is no memory to speak of, and the launch that it takes in backward is."""


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, snapshot, slots, options, *parameters):
        opts, scales = options.gemm, Scales(snapshot, slots)
        weight, bias, cached = read(parameters, opts)
        x_TK = _quantized_input(x, opts)
        saves_original = options.save_original_input and (torch.compiler.is_compiling() or x.numel() > _FEW)
        x_op = input_operand(x_TK, opts, scales, row_only=saves_original)
        w_op = weight_operand(weight, opts, scales, cached)
        y_TN = forward_product(x_op, w_op, bias, opts)
        x_saved = x_TK if saves_original else x_op
        tensors, ctx.layout = pack((x_saved if opts.weight_grad else None, w_op if opts.input_grad else None))
        ctx.save_for_backward(*tensors, snapshot, slots)
        ctx.options, ctx.shape, ctx.count = options, x.shape, len(parameters)
        shape = (*x.shape[:-1], y_TN.shape[1])
        if options.fp8_output and opts.quantizes:
            y_q, _ = opts.rules.output(y_TN, scales, row=True, col=options.training)
            return Float8Tensor.from_quantized(y_q, shape)
        return y_TN.view(shape)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        (dy,) = grads
        *tensors, snapshot, slots = ctx.saved_tensors
        x_op, w_op = unpack(tensors, ctx.layout)
        opts, scales = ctx.options.gemm, Scales(snapshot, slots)
        if opts.quantizes and isinstance(x_op, torch.Tensor):  # save_original_input
            x_op = opts.rules.at(0, record=False).input(x_op, scales, row=False, col=True)[0]
        dy_op, dbias = grad_operand(dy.reshape(-1, dy.shape[-1]), opts, scales)
        dx, dweights = product_gradients(dy_op, w_op, x_op, opts)
        dx = None if dx is None else dx.view(ctx.shape)
        return dx, None, None, None, *gradients(ctx.count, dweights, dbias, opts)


_apply = applied(_Linear)


def linear(x: torch.Tensor, parameters: Parameters, scales: Scales, options: LinearOptions) -> torch.Tensor:
    """x [..., K] -> [..., N]."""
    return _apply(x, scales.snapshot, scales.slots, options, *parameters.flat())
