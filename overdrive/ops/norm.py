"""LayerNorm (arXiv:1607.06450) and RMSNorm (arXiv:1910.07467), forward with an optional quantized output, and backward.

Shapes: x [T, K]; gamma, beta [K]; mean, rstd f32 [T]. Statistics and the affine map are f32. zero_centered: the gain is 1 + gamma.
"""

from __future__ import annotations

import torch

from overdrive.ops.library import define
from overdrive.ops.quantize import QUANTIZATION, Quantization, new_quantized, quantize_value


def statistics(x: torch.Tensor, eps: float, rms: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference: (mean, rstd), each f32 [T]; the mean of an RMSNorm is 0."""
    x = x.float()
    mean = x.new_zeros(x.shape[0]) if rms else x.mean(1)
    centered = x - mean[:, None]
    return mean, (centered.square().mean(1) + eps).rsqrt()


def gain(gamma: torch.Tensor, zero_centered: bool) -> torch.Tensor:
    """f32 [K] factor applied to the normalised input."""
    return gamma.float() + 1 if zero_centered else gamma.float()


def normalized(x, mean, rstd, gamma, beta, zero_centered) -> torch.Tensor:
    """Reference: the f32 [T, K] output."""
    y = (x.float() - mean[:, None]) * rstd[:, None] * gain(gamma, zero_centered)
    return y if beta is None else y + beta.float()


def _norm(x, gamma, beta, eps, zero_centered, rms, sm_margin, *tail) -> tuple[torch.Tensor | None, ...]:
    mean, rstd = statistics(x, eps, rms)
    y = normalized(x, mean, rstd, gamma, beta, zero_centered)
    return (*quantize_value(y, Quantization(*tail)), mean, rstd)


def _norm_fake(x, gamma, beta, eps, zero_centered, rms, sm_margin, *tail) -> tuple[torch.Tensor | None, ...]:
    stats = (x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2))
    return (*new_quantized(x, x.shape[0], x.shape[1], Quantization(*tail)), *stats)


norm = define(
    "norm(Tensor x, Tensor gamma, Tensor? beta, float eps, bool zero_centered, bool rms, int sm_margin, "
    f"{QUANTIZATION}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_norm,
    kernel=("norm", "norm"),
    fake=_norm_fake,
)
"""x -> (*Quantized, mean, rstd). sm_margin: SMs the kernel leaves free for others."""


def _norm_backward(dy, x, gamma, mean, rstd, dresidual, zero_centered, rms, sm_margin) -> tuple[torch.Tensor | None, ...]:
    dy32, x_hat = dy.float(), (x.float() - mean[:, None]) * rstd[:, None]
    dx_hat = dy32 * gain(gamma, zero_centered)
    dx = dx_hat - x_hat * (dx_hat * x_hat).mean(1, keepdim=True)
    if not rms:
        dx = dx - dx_hat.mean(1, keepdim=True)
    dx = dx * rstd[:, None]
    if dresidual is not None:
        dx = dx + dresidual.float()
    dbeta = None if rms else dy32.sum(0).to(gamma.dtype)
    return dx.to(x.dtype).contiguous(), (dy32 * x_hat).sum(0).to(gamma.dtype), dbeta


norm_backward = define(
    "norm_backward(Tensor dy, Tensor x, Tensor gamma, Tensor mean, Tensor rstd, Tensor? dresidual, bool zero_centered, bool rms, "
    "int sm_margin) -> (Tensor, Tensor, Tensor)",
    reference=_norm_backward,
    kernel=("norm", "norm_backward"),
    fake=lambda dy, x, gamma, mean, rstd, dresidual, zero_centered, rms, sm_margin: (
        x.new_empty(x.shape),
        gamma.new_empty(gamma.shape),
        None if rms else gamma.new_empty(gamma.shape),
    ),
)
"""(dx, dgamma, dbeta). dresidual [T, K], the gradient that reaches x around the norm, is added to dx. An RMSNorm's dbeta is
empty."""
