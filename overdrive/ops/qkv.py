"""The gradient of a QKV product, put together from those of Q, K and V in one pass, quantized on the way if wanted.

Shapes: dq [A, B, H, D], dk and dv [A, B, G, D], of any strides; the product is [T, N] with T = A * B, N = (H + 2 G) * D. Its
features lie interleaved as [G, H / G + 2, D], or as [Q; K; V].
"""

from __future__ import annotations

import torch

from overdrive.ops.library import define
from overdrive.ops.quantize import QUANTIZATION, _quantize, _quantize_fake


def merged(dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Reference: the [T, N] gradient."""
    if interleaved:
        groups = dk.shape[2]
        dq, dk, dv = dq.unflatten(2, (groups, dq.shape[2] // groups)), dk.unsqueeze(3), dv.unsqueeze(3)
    parts = torch.cat((dq, dk, dv), -2)
    return parts.flatten(2).flatten(0, 1)


def _qkv_gradient(dq, dk, dv, interleaved, bias_grad, *tail) -> tuple[torch.Tensor | None, ...]:
    return _quantize(merged(dq, dk, dv, interleaved), bias_grad, *tail)


def _qkv_gradient_fake(dq, dk, dv, interleaved, bias_grad, *tail) -> tuple[torch.Tensor | None, ...]:
    tokens, features = dq.shape[0] * dq.shape[1], (dq.shape[2] + 2 * dk.shape[2]) * dq.shape[3]
    return _quantize_fake(dq.new_empty((tokens, features)), bias_grad, *tail)


qkv_gradient = define(
    "qkv_gradient(Tensor dq, Tensor dk, Tensor dv, bool interleaved, bool bias_grad, "
    f"{QUANTIZATION}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_qkv_gradient,
    kernel=("qkv", "qkv_gradient"),
    fake=_qkv_gradient_fake,
)
"""(dq, dk, dv) -> (*Quantized gradient of the product, bias_grad [N]), as ops.quantize.quantize of it."""
