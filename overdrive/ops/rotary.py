"""Rotary position embedding (arXiv:2104.09864) of Q and K in one launch, and its gradient.

Shapes: q [A, B, H, D], k [A, B, G, D] of any strides; the sequence runs along A, along B if batch_first. freqs f32 [P, 1, 1, R]:
the angle by which feature i < R of a head turns at position p; features from R on are copied. Feature i turns with R / 2 + i, or
2 i with 2 i + 1 if interleaved. Outputs are contiguous; f32 inside.

Token s is at position s; with start_positions [batch] at start_positions[b] + s; with cu_seqlens i32 [batch + 1], where sequences
lie one after the other along A and B is 1, at its place in its own sequence (plus that one's start). Tokens after the last sequence
take position 0. A position that freqs does not have, and any if cu_seqlens does not ascend from 0, gives NaN.
"""

from __future__ import annotations

import torch

from overdrive.ops.library import define


def positions(length: int, start_positions: torch.Tensor | None, cu_seqlens: torch.Tensor | None, device) -> torch.Tensor:
    """Reference: int64 [length, batch or 1] positions, -1 where there is none."""
    place = torch.arange(length, dtype=torch.int32, device=device)
    if cu_seqlens is None:
        place = place[:, None]
        return (place if start_positions is None else place + start_positions).long()
    sequence = torch.searchsorted(cu_seqlens, place, right=True) - 1
    place = place - cu_seqlens[sequence]
    if start_positions is not None and len(start_positions):
        place = place + start_positions[sequence.clamp(max=len(start_positions) - 1)]
    ascends = (cu_seqlens[0] == 0) & (cu_seqlens.diff() >= 0).all()
    place = torch.where(sequence == len(cu_seqlens) - 1, 0, place)
    return torch.where(ascends, place, -1).long()[:, None]


def turned(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x with every pair (a, b) of features made (-b, a)."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def _rotated(x, angles, interleaved, transpose) -> torch.Tensor:
    turning, rest = x.tensor_split([angles.shape[-1]], -1)
    wide = torch.promote_types(x.dtype, torch.float32)
    turning, angles = turning.to(wide), angles.to(wide)
    cos, sin = angles.cos(), angles.sin()
    across = -turned(turning * sin, interleaved) if transpose else turned(turning, interleaved) * sin
    return torch.cat(((turning * cos + across).to(x.dtype), rest), -1).contiguous()


def _rotary(
    q, k, freqs, start_positions, cu_seqlens, interleaved, batch_first, transpose
) -> tuple[torch.Tensor, torch.Tensor | None]:
    place = positions(q.shape[int(batch_first)], start_positions, cu_seqlens, q.device)
    there = (place >= 0) & (place < len(freqs))
    angles = freqs[place.clamp(0, max(len(freqs) - 1, 0)), 0, 0].masked_fill(~there[..., None], torch.nan)
    angles = (angles.transpose(0, 1) if batch_first else angles).unsqueeze(2)
    return (
        _rotated(q, angles, interleaved, transpose),
        None if k is None else _rotated(k, angles, interleaved, transpose),
    )


rotary = define(
    "rotary(Tensor q, Tensor? k, Tensor freqs, Tensor? start_positions, Tensor? cu_seqlens, bool interleaved, bool batch_first, "
    "bool transpose) -> (Tensor, Tensor)",
    reference=_rotary,
    kernel=("rotary", "rotary"),
    fake=lambda q, k, *_: (q.new_empty(q.shape), None if k is None else k.new_empty(k.shape)),
)
"""(q, k) turned, the second None or empty without k. transpose: by the transposed matrices, as gradients are."""
