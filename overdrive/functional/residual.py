"""out = residual + dropout_p(x + bias), one autograd node; and stochastic depth.

Shapes: x, residual, out [..., K], bias [K]; ops see them as [T, K].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from overdrive.functional.gemm import column_sum
from overdrive.functional.node import applied, first_order
from overdrive.ops.residual import residual_add, residual_backward


def dropout_seed(p: float, device: torch.device) -> torch.Tensor | None:
    """A fresh seed, int64 [1], from torch's generator of the device (so checkpointing replays it); None where nothing drops."""
    return torch.randint(0, 2**31 - 1, (1,), device=device) if p > 0 else None


class _BiasDropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, bias, residual, p, seed):
        ctx.p, ctx.dtypes = p, (x.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(seed)
        width = x.shape[-1]
        return residual_add(x.reshape(-1, width), bias, residual.reshape(-1, width), p, seed).view(residual.shape)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        (dout,) = grads
        (seed,) = ctx.saved_tensors
        dtype, bias_dtype = ctx.dtypes
        bias_grad = ctx.needs_input_grad[1]
        dx, dbias = branch_gradient(dout, ctx.p, seed, bias_grad)
        return dx.to(dtype), None if dbias is None else dbias.to(bias_dtype), dout, None, None


_apply = applied(_BiasDropoutAdd)


def branch_gradient(
    dout: torch.Tensor, p: float, seed: torch.Tensor | None, bias_grad: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(dx, dbias) of residual + dropout_p(x + bias). Where nothing drops dx is dout itself, the object and not a view: autograd
    may take a view for a gradient's own memory and add into it.
    """
    dout_TK = dout.reshape(-1, dout.shape[-1])
    if p == 0:
        return dout, column_sum(dout_TK) if bias_grad else None
    dx, dbias = residual_backward(dout_TK, p, seed, bias_grad)
    return dx.view(dout.shape), dbias if bias_grad else None


def _kept_samples(x: torch.Tensor, drop_path: float, samples: int | torch.Tensor) -> torch.Tensor:
    """bool that broadcasts to x: True where drop_path leaves the sample."""
    if isinstance(samples, int):
        return torch.rand([n if dim == samples else 1 for dim, n in enumerate(x.shape)], device=x.device) >= drop_path
    kept = torch.rand(len(samples) - 1, 1, device=x.device) >= drop_path
    return kept[torch.searchsorted(samples[1:-1], torch.arange(len(x), dtype=samples.dtype, device=x.device), right=True)]


def bias_dropout_add(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    p: float = 0.0,
    drop_path: float = 0.0,
    samples: int | torch.Tensor = 0,
) -> torch.Tensor:
    """residual + drop_path(dropout_p(x + bias)), in the residual's dtype; each of p and drop_path is 0 outside of training.

    bias: [K], or of x's shape: another branch's output.
    drop_path: probability of dropping the whole branch of one sample; what stays is divided by 1 - drop_path. samples: the
    dimension along which they lie, or, of packed x [T, K], i32 [samples + 1] where each begins.
    """
    if bias is not None and (bias.dim() > 1 or drop_path > 0):
        x, bias = x + bias, None
    if drop_path > 0:
        x = F.dropout(x, p)
        kept = _kept_samples(x, drop_path, samples)
        x, p = x * (kept / (1 - drop_path)).to(x.dtype), 0.0
    if p == 0 and bias is None and x.dtype == residual.dtype:
        return residual + x
    return _apply(x, bias, residual, p, dropout_seed(p, x.device))
