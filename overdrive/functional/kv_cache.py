"""Attention to cached keys and values, by an op of its own of few queries, by the usual backends of many.

Shapes: B sequences, S new tokens each at most, T places per sequence, H heads, G groups of K/V heads, D channels. Lengths are data
on the device, shapes do not depend on them: nothing waits for the GPU, and a CUDA graph may capture it all.
"""

from __future__ import annotations

import torch

from overdrive.functional.attention import attention

MOST_NEW_TOKENS = 4
"""Of a sequence, up to which one op takes them into the cache and attends to what the sequence has of it."""
MOST_QUERIES = 32
"""Of those tokens and a group of heads together."""


def takes_few(new: int, heads: int, groups: int) -> bool:
    """Whether `attend_cached` is for so few queries; more are `append`ed, and attend to all places under a mask."""
    return new <= MOST_NEW_TOKENS and new * heads // groups <= MOST_QUERIES


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    dead: torch.Tensor,
    batch_first: bool,
    scale: float,
) -> torch.Tensor:
    """query [S, B, H, D], or [B, S, H, D] if batch_first; key, value [B, T, G, D] -> [S, B, H * D] or [B, S, H * D].

    mask, dead: from cache_mask; queries that are padding give zeros.
    """
    order, back = ((0, 2, 1, 3), (0, 2, 1, 3)) if batch_first else ((1, 2, 0, 3), (2, 0, 1, 3))
    out = attention(query.permute(order), key.transpose(1, 2), value.transpose(1, 2), mask, scale=scale)
    return torch.where(dead, 0.0, out).permute(back).flatten(2)
