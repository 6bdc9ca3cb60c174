"""LayerNormLinear: y = norm(x) w^T + b, one autograd node; in FP8 the norm hands the GEMM its quantized output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch

from overdrive.functional.gemm import (
    GemmOptions,
    forward_product,
    input_operand,
    product_gradients,
    weight_operand,
)
from overdrive.functional.linear import Parameters, gradients, read
from overdrive.functional.node import applied, first_order
from overdrive.functional.norm import NormOptions, norm_gradient, normalize
from overdrive.functional.qkv import QKVLayout, output_count, outputs_gradient, outputs_of
from overdrive.ops.library import constant_result
from overdrive.ops.norm_gemm import norm_gemm
from overdrive.scaling.quantizers import Scales
from overdrive.scaling.support import is_bf16_available
from overdrive.scaling.tensor import pack, unpack


@dataclass
class LayerNormLinearOptions:
    """return_norm: also return the norm's output. return_residual: also return x, whose gradient then joins inside norm
    backward.
    """

    norm: NormOptions
    gemm: GemmOptions
    return_norm: bool = False
    return_residual: bool = False
    qkv: QKVLayout | None = None


class _LayerNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, gamma, beta, snapshot, slots, options, *parameters):
        opts, scales = options.gemm, Scales(snapshot, slots)
        weight, bias, cached = read(parameters, opts)
        x_TK = x.reshape(-1, x.shape[-1])
        rules = None if options.return_norm else opts.rules
        norm_op, mean, rstd = normalize(x_TK, gamma, beta, options.norm, rules, scales, opts.weight_grad)
        norm_out = norm_op  # a plain tensor where it is returned
        if options.return_norm:
            norm_op = input_operand(norm_op, opts, scales)
        w_op = weight_operand(weight, opts, scales, cached)
        y_TN = forward_product(norm_op, w_op, bias, opts)
        kept = (norm_op if opts.weight_grad else None, w_op if opts.input_grad else None)
        tensors, ctx.layout = pack(kept)
        of_norm = (x_TK, gamma, mean, rstd) if opts.input_grad else (None,) * 4
        ctx.save_for_backward(*tensors, snapshot, slots, *of_norm)
        ctx.options, ctx.shape, ctx.count = options, x.shape, len(parameters)
        outputs = list(outputs_of(y_TN.view(*x.shape[:-1], y_TN.shape[1]), options.qkv))
        if options.return_norm:
            outputs.append(cast(torch.Tensor, norm_out).view(x.shape))
        if options.return_residual:
            outputs.append(x.view_as(x))
        return tuple(outputs)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        *tensors, snapshot, slots, x, gamma, mean, rstd = ctx.saved_tensors
        options, opts, scales = ctx.options, ctx.options.gemm, Scales(snapshot, slots)
        norm_op, w_op = unpack(tensors, ctx.layout)
        dy_op, dbias = outputs_gradient(grads, options.qkv, opts, scales)
        dnorm, dweights = product_gradients(dy_op, w_op, norm_op, opts)
        dparameters = gradients(ctx.count, dweights, dbias, opts)
        if dnorm is None:
            return (None,) * 6 + dparameters
        if options.return_norm:
            dnorm = dnorm + grads[output_count(options.qkv)].reshape(dnorm.shape)
        dresidual = grads[-1].reshape(x.shape) if options.return_residual else None
        dx, dgamma, dbeta = norm_gradient(dnorm, x, gamma, mean, rstd, dresidual, options.norm)
        return dx.view(ctx.shape), dgamma, dbeta, None, None, None, *dparameters


_apply = applied(_LayerNormLinear)


# us of norm and product in one kernel / in two, bf16, H200, in a CUDA graph (benchmarks/decode.py):
#     tokens            1            8           16           32
#      4096 -> 12288    26.9 / 31.2  27.8 / 31.8  29.9 / 31.8  56.7 / 32.3
#      4096 ->  4096    13.6 / 17.0  14.2 / 16.9  18.3 / 17.4  25.3 / 15.1
#      8192 -> 10240    42.9 / 50.6  45.6 / 51.8  51.1 / 47.0  107  / 47.6
# What one kernel loses in some sizes above 8 tokens is little beside the 45 us that it saves the host.
ONE_KERNEL_TOKENS = 16
"""Up to so many tokens the norm joins its product in one kernel."""
ONE_KERNEL_INPUT = 16 * 8192
"""Elements of the largest input that was measured: its statistics are taken by every program."""


@constant_result
def _one_kernel_runs() -> bool:
    """Whether the GPU, if there is one, has what that kernel needs: bf16 tensor cores and asynchronous copies."""
    return is_bf16_available()[0]


def _takes_one_kernel(x: torch.Tensor, options: LayerNormLinearOptions) -> bool:
    """Whether no backward can come, nothing but the product is wanted, and few tokens make reading the weight all that counts."""
    gemm = options.gemm
    return (
        not (gemm.input_grad or gemm.weight_grad or gemm.bias_grad or options.return_norm)
        and gemm.rules is None
        and x.dtype in (torch.bfloat16, torch.float16)
        and 0 < x.numel() <= min(ONE_KERNEL_TOKENS * x.shape[-1], ONE_KERNEL_INPUT)
        and x.shape[-1] % 16 == 0  # rows whose copies are 16 bytes wide
        and _one_kernel_runs()
    )


def layernorm_linear(
    x: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor | None,
    parameters: Parameters,
    scales: Scales,
    options: LayerNormLinearOptions,
) -> tuple[torch.Tensor, ...]:
    """x [..., K] -> (y [..., N] or Q, K and V, norm output [..., K] if asked for, x [..., K] if asked for)."""
    if _takes_one_kernel(x, options):
        weight, bias, _ = read(parameters.flat(), options.gemm)
        norm = options.norm
        y_TN = norm_gemm(x.reshape(-1, x.shape[-1]), gamma, beta, weight, bias, norm.eps, norm.zero_centered, norm.rms)
        outputs = outputs_of(y_TN.view(*x.shape[:-1], y_TN.shape[1]), options.qkv)
        return (*outputs, x) if options.return_residual else outputs
    return _apply(x, gamma, beta, scales.snapshot, scales.slots, options, *parameters.flat())
