"""Rotary position embedding of Q and K as one autograd node, which keeps nothing but the angles."""

from __future__ import annotations

from typing import Any

import torch

from overdrive.functional.node import applied, first_order
from overdrive.ops.rotary import rotary


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query, key, freqs, start_positions, cu_seqlens, interleaved, batch_first):
        ctx.save_for_backward(freqs, start_positions, cu_seqlens)
        ctx.interleaved, ctx.batch_first, ctx.with_key = interleaved, batch_first, key is not None
        return rotary(query, key, freqs, start_positions, cu_seqlens, interleaved, batch_first, False)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        dquery, dkey = grads
        arguments = (*ctx.saved_tensors, ctx.interleaved, ctx.batch_first)
        dquery, dkey = rotary(dquery, dkey if ctx.with_key else None, *arguments, True)
        return dquery, dkey if ctx.with_key else None, None, None, None, None, None


_apply = applied(_Rotary)


def rotate(
    query: torch.Tensor,
    key: torch.Tensor | None,
    freqs: torch.Tensor,
    interleaved: bool = False,
    batch_first: bool = False,
    start_positions: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(query [S, B, H, D], key [S, B, G, D]), or [B, S, .., D] if batch_first, turned as ops.rotary says; without key the first."""
    return _apply(query, key, freqs, start_positions, cu_seqlens, interleaved, batch_first)
