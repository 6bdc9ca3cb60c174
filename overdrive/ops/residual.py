"""Residual add with bias and dropout, alone or with the norm that follows.

Shapes: x, residual, out [T, K]; bias [K]. out = residual + dropout(x + bias), f32 inside. The dropout mask is a hash of the
element's index and a seed, so backward recomputes it and nothing is stored; CPU and GPU draw the same mask from the same
seed.
"""

from __future__ import annotations

import torch

from overdrive.ops.library import define
from overdrive.ops.norm import _norm
from overdrive.ops.quantize import QUANTIZATION, Quantization, new_quantized

GOLDEN = 0x9E3779B9
"""2**32 over the golden ratio: its multiples spread evenly over 32 bits."""

_MASK = 0xFFFFFFFF


def _mix(h: torch.Tensor) -> torch.Tensor:
    """One 32-bit finaliser (xor-shift-multiply, constants by C. Wellons); int64 in, int64 in [0, 2**32) out."""
    h = (h ^ (h >> 16)) * 0x7FEB352D & _MASK
    h = (h ^ (h >> 15)) * 0x846CA68B & _MASK
    return h ^ (h >> 16)


def dropout_threshold(p: float) -> int:
    """How many of 2**16 are dropped: p counts in steps of 2**-16."""
    return round(p * 2**16)


def dropout_scale(rows: int, cols: int, p: float, seed: torch.Tensor) -> torch.Tensor:
    """f32 [rows, cols]: 0 with probability p, else 1 / (1 - p). seed: int64 [1], of which each bit counts.

    Two neighbours in a row share a hash of 32 bits, 16 for each; an element is dropped where its bits are below the threshold. A
    row's key is a hash of its index and of the seed; it is added before and within the hash of a pair, so that no two rows see one
    sequence, and pairs are GOLDEN apart, because the hash keeps a trace of counters that differ in few bits.
    """
    key = _mix((seed & _MASK) + GOLDEN & _MASK)
    row = _mix(torch.arange(rows, device=seed.device) + key & _MASK) ^ _mix((key ^ (seed >> 32 & _MASK)) + GOLDEN & _MASK)
    row = row[:, None]
    h = row + torch.arange(-(-cols // 2), device=seed.device) * GOLDEN & _MASK
    h = (h ^ (h >> 16)) * 0x7FEB352D + row & _MASK
    h = (h ^ (h >> 15)) * 0x846CA68B & _MASK
    h = h ^ (h >> 16)
    bits = torch.stack((h & 0xFFFF, h >> 16), 2).flatten(1)[:, :cols]
    return (bits >= dropout_threshold(p)).float() * (1 / (1 - p) if p < 1 else 0.0)


def _residual(x, bias, residual, p, seed) -> torch.Tensor:
    value = x.float() if bias is None else x.float() + bias.float()
    if p > 0:
        value = value * dropout_scale(x.shape[0], x.shape[1], p, seed)
    return (residual.float() + value).to(residual.dtype).contiguous()


residual_add = define(
    "residual_add(Tensor x, Tensor? bias, Tensor residual, float p, Tensor? seed) -> Tensor",
    reference=_residual,
    kernel=("residual", "residual_add"),
    fake=lambda x, bias, residual, p, seed: residual.new_empty(residual.shape),
)
"""residual + dropout_p(x + bias). seed is needed where p > 0."""


def _residual_backward(dout, p, seed, bias_grad) -> tuple[torch.Tensor, torch.Tensor | None]:
    dx = dout.float() * dropout_scale(dout.shape[0], dout.shape[1], p, seed) if p > 0 else dout.float()
    return dx.to(dout.dtype, copy=True).contiguous(), dx.sum(0).to(dout.dtype) if bias_grad else None


residual_backward = define(
    "residual_backward(Tensor dout, float p, Tensor? seed, bool bias_grad) -> (Tensor, Tensor)",
    reference=_residual_backward,
    kernel=("residual", "residual_backward"),
    fake=lambda dout, p, seed, bias_grad: (
        dout.new_empty(dout.shape),
        dout.new_empty(dout.shape[1]) if bias_grad else None,
    ),
)
"""(dx, dbias) of residual_add; the residual's own gradient is dout. dbias is empty if not asked for."""


def _residual_norm(x, bias, residual, p, seed, gamma, beta, eps, zero_centered, rms, sm_margin, *tail):
    out = _residual(x, bias, residual, p, seed)
    return (out, *_norm(out, gamma, beta, eps, zero_centered, rms, sm_margin, *tail))


residual_norm = define(
    "residual_norm(Tensor x, Tensor? bias, Tensor residual, float p, Tensor? seed, Tensor gamma, Tensor? beta, float eps, "
    f"bool zero_centered, bool rms, int sm_margin, {QUANTIZATION}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_residual_norm,
    kernel=("residual", "residual_norm"),
    fake=lambda x, bias, residual, p, seed, gamma, beta, eps, zero_centered, rms, sm_margin, *tail: (
        residual.new_empty(residual.shape),
        *new_quantized(residual, residual.shape[0], residual.shape[1], Quantization(*tail)),
        *(x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2)),
    ),
)
"""residual_add, then norm of its (rounded) output: (out, *Quantized, mean, rstd)."""
