"""Attention to cached keys and values: new ones are written to their places, queries see what came before them.

Shapes: B sequences, S new tokens each at most, T places per sequence, H heads, G groups of K/V heads, D channels. A cache is
[pages * page_size + 1, G, D], its last row the place of what belongs nowhere; a contiguous cache has one page per sequence. Lengths
are data on the device, shapes do not depend on them: nothing waits for the GPU, and a CUDA graph may capture it all.
"""

from __future__ import annotations

import torch

from overdrive.functional.attention import attention


def places(starts: torch.Tensor, steps: torch.Tensor, page_table: torch.Tensor, page_size: int, new: int, nowhere: int):
    """i64 [B * new]: the row of a cache for each new token; `nowhere` for those from steps[b] on, which are padding.

    starts, steps: i32 [B], tokens that each sequence has cached and adds. page_table: i32 [B, pages per sequence].
    """
    token = torch.arange(new, dtype=torch.int32, device=starts.device)
    position = starts[:, None] + token
    page = page_table.gather(1, (position // page_size).clamp(max=page_table.shape[1] - 1).long())
    return torch.where(token < steps[:, None], page * page_size + position % page_size, nowhere).long().flatten()


def append(cache: torch.Tensor, rows: torch.Tensor, new: torch.Tensor, batch_first: bool) -> None:
    """Write `new` [S, B, G, D], or [B, S, G, D] if batch_first, to the `rows` that `places` gave."""
    new = new if batch_first else new.transpose(0, 1)
    cache.index_copy_(0, rows, new.flatten(0, 1))


def cache_mask(starts: torch.Tensor, steps: torch.Tensor, new: int, keys: int, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(score mask, bool [B, 1, new or 1, keys], True = attend; dead, bool [B, 1, new, 1], True where a query is padding).

    causal: to the query's own token and those before it, else to all that the sequence has. No row of the mask is empty.
    """
    token = torch.arange(new, dtype=torch.int32, device=starts.device)
    key = torch.arange(keys, dtype=torch.int32, device=starts.device)
    last = starts[:, None] + token if causal else (starts + steps - 1).clamp(min=0)[:, None]
    return (key <= last[:, :, None])[:, None], (token >= steps[:, None])[:, None, :, None]


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
