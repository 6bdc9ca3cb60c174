"""The norm stage, and LayerNorm / RMSNorm as functions of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from overdrive.functional.gemm import calibrated, quantizing
from overdrive.functional.node import applied, first_order
from overdrive.ops.norm import norm, norm_backward
from overdrive.ops.residual import residual_norm
from overdrive.scaling.float8_tensor import Float8Tensor
from overdrive.scaling.quantizers import Quantizer, Rules, Scales, produce
from overdrive.scaling.tensor import Operand


@dataclass
class NormOptions:
    """Which norm: eps is added to the variance, zero_centered makes the gain 1 + gamma, rms leaves the mean alone."""

    eps: float
    zero_centered: bool
    rms: bool
    forward_sm_margin: int = 0
    backward_sm_margin: int = 0


def normalize(
    x: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor | None,
    options: NormOptions,
    rules: Rules | None = None,
    scales: Scales = Scales(),
    col: bool = False,
) -> tuple[Operand, torch.Tensor, torch.Tensor]:
    """(norm of x [T, K] as the next GEMM's input, mean, rstd); quantized by the same kernel where `rules` say so."""
    arguments = (x, gamma, beta, *_arguments(options))
    out, (mean, rstd) = produce(norm, arguments, _quantizer(rules), scales, (x.shape[0], x.shape[1]), x.dtype, True, col)
    return calibrated(out, rules, scales), mean, rstd


def residual_normalize(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    p: float,
    seed: torch.Tensor | None,
    gamma: torch.Tensor,
    beta: torch.Tensor | None,
    options: NormOptions,
    rules: Rules | None,
    scales: Scales,
    col: bool,
) -> tuple[torch.Tensor, Operand, torch.Tensor, torch.Tensor]:
    """`normalize` of out = residual + dropout_p(x + bias), all [T, K]: (out, its norm, mean, rstd)."""
    arguments = (x, bias, residual, p, seed, gamma, beta, *_arguments(options))
    shape = (residual.shape[0], residual.shape[1])
    out, (total, mean, rstd) = produce(residual_norm, arguments, _quantizer(rules), scales, shape, residual.dtype, True, col, at=1)
    return total, calibrated(out, rules, scales), mean, rstd


def _arguments(options: NormOptions) -> tuple[Any, ...]:
    return options.eps, options.zero_centered, options.rms, options.forward_sm_margin


def _quantizer(rules: Rules | None) -> Quantizer | None:
    rules = quantizing(rules)
    return None if rules is None else rules.input


def norm_gradient(
    dy: torch.Tensor,
    x: torch.Tensor,
    gamma: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dresidual: torch.Tensor | None,
    options: NormOptions,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(dx + dresidual, dgamma, dbeta); dbeta is None for an RMSNorm."""
    arguments = (options.zero_centered, options.rms, options.backward_sm_margin)
    dx, dgamma, dbeta = norm_backward.unfilled(dy, x, gamma, mean, rstd, dresidual, *arguments)
    return dx, dgamma, None if options.rms else dbeta


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, gamma, beta, snapshot, slots, rules, training, options):
        x2d = x.reshape(-1, x.shape[-1])
        y, mean, rstd = normalize(x2d, gamma, beta, options, rules, Scales(snapshot, slots), training)
        ctx.save_for_backward(x2d, gamma, mean, rstd)
        ctx.options, ctx.biased = options, beta is not None
        return y.view(x.shape) if isinstance(y, torch.Tensor) else Float8Tensor.from_quantized(y, x.shape)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        (dy,) = grads
        x, gamma, mean, rstd = ctx.saved_tensors
        dx, dgamma, dbeta = norm_gradient(dy.reshape(x.shape), x, gamma, mean, rstd, None, ctx.options)
        return dx.view(dy.shape), dgamma, dbeta if ctx.biased else None, None, None, None, None, None


_apply = applied(_Norm)


def layer_norm(
    x: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor | None,
    options: NormOptions,
    rules: Rules | None = None,
    scales: Scales = Scales(),
    training: bool = False,
) -> torch.Tensor:
    """Norm of x [..., K] over its last dimension; a Float8Tensor where `rules` are given, with the copy backward needs if
    training.
    """
    return _apply(x, gamma, beta, scales.snapshot, scales.slots, rules, training, options)
