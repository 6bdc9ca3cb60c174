"""LayerNormMLP: norm, fc1, activation, fc2 in one autograd node, with the residual sums before and after it if wanted.

Where `_fuses_activation` says so, fc1's product makes the activation, and in high precision fc2's makes its gradient
(ops.gemm_epilogue).

Shapes: x [T, K] tokens by hidden, h [T, F or 2F] before the activation, a [T, F] after it, y [T, K].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch

from overdrive.functional.activation import (
    ActivationOptions,
    activate,
    activation_gradient,
    activation_product,
    activation_product_gradient,
)
from overdrive.functional.gemm import (
    GemmOptions,
    both_gradients,
    forward_product,
    fuses_epilogue,
    grad_operand,
    input_gradient,
    input_operand,
    product_gradients,
    quantizing,
    release,
    weight_gradients,
    weight_operand,
)
from overdrive.functional.linear import Parameters, gradients, read
from overdrive.functional.node import applied, first_order
from overdrive.functional.norm import NormOptions, norm_gradient, normalize, residual_normalize
from overdrive.functional.residual import branch_gradient
from overdrive.ops.quantize import BLOCK
from overdrive.scaling.quantizers import Scales
from overdrive.scaling.tensor import Operand, QuantizedTensor, pack, unpack


@dataclass
class Residual:
    """What enters before the norm: out = residual + dropout_p(x + bias). seed: int64 [1], needed where p > 0."""

    residual: torch.Tensor
    bias: torch.Tensor | None
    p: float = 0.0
    seed: torch.Tensor | None = None


@dataclass
class LayerNormMLPOptions:
    """fc1_arguments: how many of the Function's arguments are fc1's parameters. add_residual: a Residual comes first, dropping with
    probability p. return_norm, return_residual: also return the norm's output; the norm's input. add_input: instead, return that +
    dropout_p(y), whose seed is the Function's output_seed.
    """

    norm: NormOptions
    activation: ActivationOptions
    fc1: GemmOptions
    fc2: GemmOptions
    fc1_arguments: int
    return_norm: bool = False
    return_residual: bool = False
    add_input: bool = False
    add_residual: bool = False
    p: float = 0.0
    residual_bias_grad: bool = False


def _fuses_activation(x: Operand, weight1: Operand, weight2: Operand, options: LayerNormMLPOptions) -> bool:
    """Whether fc1's product makes the activation in its epilogue. In high precision fc2's input gradient then makes it again, and
    its gradient too.

    Measured on an H200, 8192 tokens, 4096 -> 16384: in bf16 1416 us instead of 1558 and in backward 1464 instead of 1637, in FP8
    with delayed scaling 855 us instead of 1093 (current scaling takes its amax there). An FP8 gradient would have no room for split
    accumulation in such a kernel.
    """
    if options.activation.name != "gelu":
        return False
    if isinstance(x, QuantizedTensor):
        rules = quantizing(options.fc2.rules)
        # of a tile that is not whole, the amax would see the other rows
        fits = rules is not None and x.mode == rules.input.mode and x.mode.per_tensor and x.shape[0] % BLOCK == 0
    else:
        # backward has to come and to go beyond fc2
        fits = options.fc2.rules is None and options.fc2.input_grad and weight2.dtype == x.dtype and weight2.shape[0] % 8 == 0
    return fits and fuses_epilogue(x, weight1, options.fc1)


class _LayerNormMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, residual, residual_bias, seed, output_seed, gamma, beta, snapshot, slots, options, *parameters):
        fc1, fc2, scales = options.fc1, options.fc2, Scales(snapshot, slots)
        weight1, bias1, cached1 = read(parameters[: options.fc1_arguments], fc1)
        weight2, bias2, cached2 = read(parameters[options.fc1_arguments :], fc2)
        shape = x.shape
        x_TK = x.reshape(-1, shape[-1])
        rules = None if options.return_norm else fc1.rules
        if options.add_residual:
            front = (x_TK, residual_bias, residual.reshape(x_TK.shape), options.p, seed)
            x_TK, norm_op, mean, rstd = residual_normalize(*front, gamma, beta, options.norm, rules, scales, fc1.weight_grad)
        else:
            norm_op, mean, rstd = normalize(x_TK, gamma, beta, options.norm, rules, scales, fc1.weight_grad)
        norm_out = norm_op  # a plain tensor where it is returned
        if options.return_norm:
            norm_op = input_operand(norm_op, fc1, scales)
        w1_op = weight_operand(weight1, fc1, scales, cached1)
        w2_op = weight_operand(weight2, fc2, scales, cached2)
        fused = _fuses_activation(norm_op, w1_op, w2_op, options)
        ctx.again = fused and isinstance(norm_op, torch.Tensor)  # backward makes the activation again
        if fused:
            h, a_op = activation_product(norm_op, w1_op, bias1, options.activation, fc1, fc2, scales)
        else:
            h = forward_product(norm_op, w1_op, bias1, fc1)
            a_op = activate(h, options.activation, fc2, scales)
        y_TK = forward_product(a_op, w2_op, bias2, fc2, x_TK if options.add_input else None, options.p, output_seed)
        kept = (
            norm_op if fc1.weight_grad else None,
            w1_op if fc1.input_grad else None,
            a_op if fc2.weight_grad and not ctx.again else None,
            w2_op if fc2.input_grad else None,
        )
        tensors, ctx.layout = pack(kept)
        ctx.cached2 = cached2 is not None
        of_norm = (x_TK, gamma, mean, rstd, seed) if fc1.input_grad else (None,) * 5
        ctx.save_for_backward(*tensors, snapshot, slots, output_seed, h if fc2.input_grad else None, *of_norm)
        ctx.options, ctx.shape, ctx.count = options, shape, len(parameters)
        outputs = [y_TK.view(*shape[:-1], y_TK.shape[1])]
        if options.return_norm:
            outputs.append(cast(torch.Tensor, norm_out).view(shape))
        if options.return_residual:
            outputs.append(x_TK.view(shape) if options.add_residual else x.view_as(x))
        return tuple(outputs)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        *tensors, snapshot, slots, output_seed, h, x, gamma, mean, rstd, seed = ctx.saved_tensors
        options, fc1, fc2, scales = ctx.options, ctx.options.fc1, ctx.options.fc2, Scales(snapshot, slots)
        norm_op, w1_op, a_op, w2_op = unpack(tensors, ctx.layout)
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        if output_seed is not None:
            dy, dbias2 = branch_gradient(dy, options.p, output_seed, fc2.bias_grad)
            dy_op, _ = grad_operand(dy, fc2, scales, bias_grad=False)
        else:
            dy_op, dbias2 = grad_operand(dy, fc2, scales)
        del dy
        dh_op, dbias1, in_place = None, None, False
        if ctx.again:
            dh_op, dbias1, a_op = activation_product_gradient(dy_op, w2_op, h, options.activation, fc1)
        count2 = ctx.count - options.fc1_arguments
        da, dweights = (None, None) if ctx.again else both_gradients(dy_op, w2_op, a_op, fc2)
        dfc2 = gradients(count2, weight_gradients(dy_op, a_op, fc2) if dweights is None else dweights, dbias2, fc2)
        if not fc2.input_grad:
            return (None,) * (10 + options.fc1_arguments) + dfc2
        if fc2.sink is None:
            release(a_op)
        del a_op
        if dh_op is None:
            da = input_gradient(dy_op, w2_op, fc2) if da is None else da
            del dy_op
            release(w2_op if fc2.quantizes and not ctx.cached2 else None)
            dh_op, dbias1 = activation_gradient(da, h, options.activation, fc1, scales)
            del da
            in_place = dh_op is h
            release(None if in_place else h)
        dnorm, dweights = product_gradients(dh_op, w1_op, norm_op, fc1)
        dfc1 = gradients(options.fc1_arguments, dweights, dbias1, fc1)
        if dnorm is None:
            return (None,) * 10 + dfc1 + dfc2
        del dh_op
        release(h if in_place and fc1.sink is None else None)
        if options.return_norm:
            dnorm = dnorm + grads[1].reshape(dnorm.shape)
        of_residual = grads[-1] if options.return_residual else grads[0] if options.add_input else None
        dresidual = None if of_residual is None else of_residual.reshape(x.shape)
        dx, dgamma, dbeta = norm_gradient(dnorm, x, gamma, mean, rstd, dresidual, options.norm)
        dx = dx.view(ctx.shape)
        dfront, dfront_bias = None, None
        if options.add_residual:
            dfront = dx
            dx, dfront_bias = branch_gradient(dx, options.p, seed, options.residual_bias_grad)
        return dx, dfront, dfront_bias, None, None, dgamma, dbeta, None, None, None, *dfc1, *dfc2


_apply = applied(_LayerNormMLP)


def layernorm_mlp(
    x: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor | None,
    fc1: Parameters,
    fc2: Parameters,
    scales: Scales,
    options: LayerNormMLPOptions,
    front: Residual | None = None,
    output_seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """x [..., K] -> (y [..., K], norm output if asked for, norm input if asked for)."""
    added = (None, None, None) if front is None else (front.residual, front.bias, front.seed)
    arguments = (output_seed, gamma, beta, scales.snapshot, scales.slots, options, *fc1.flat(), *fc2.flat())
    return _apply(x, *added, *arguments)
