"""Attention of a few new tokens a sequence to cached keys and values, into which the op writes the tokens' own.

Shapes: B sequences, S new tokens each at most, T places per sequence, H heads, G groups of K/V heads (H % G == 0), D channels of Q
and K, E of V. A cache is [pages * page_size + 1, G, D or E], its last row the place of what belongs nowhere; page_table i32 [B,
pages per sequence]. starts, steps: i32 [B], tokens that each sequence has cached and adds. Other places may hold NaN.
"""

from __future__ import annotations

import torch

from overdrive.ops.library import define


def places(starts: torch.Tensor, steps: torch.Tensor, page_table: torch.Tensor, page_size: int, new: int, nowhere: int):
    """i64 [B * new]: the row of a cache for each new token; `nowhere` for those from steps[b] on, which are padding."""
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


def _attend_cached(
    query, new_key, new_value, key_cache, value_cache, starts, steps, page_table, page_size, batch_first, causal, scale
) -> torch.Tensor:
    new, nowhere = query.shape[int(batch_first)], len(key_cache) - 1
    rows = places(starts, steps, page_table, page_size, new, nowhere)
    append(key_cache, rows, new_key, batch_first)
    append(value_cache, rows, new_value, batch_first)
    wide = torch.promote_types(query.dtype, torch.float32)
    key, value = (x[:-1].unflatten(0, (-1, page_size))[page_table].flatten(1, 2).to(wide) for x in (key_cache, value_cache))
    has = torch.arange(key.shape[1], device=starts.device) < (starts + steps)[:, None]
    value = torch.where(has[:, :, None, None], value, 0.0)  # as 0 times NaN would be NaN
    heads, groups = query.shape[2], key.shape[2]
    q = (query if batch_first else query.transpose(0, 1)).unflatten(2, (groups, heads // groups)).to(wide)
    mask, dead = cache_mask(starts, steps, new, key.shape[1], causal)
    scores = torch.einsum("bsgrd,btgd->bgrst", q, key) * scale
    probabilities = scores.masked_fill(~mask[:, :, None], -torch.inf).softmax(-1)
    out = torch.einsum("bgrst,btge->bsgre", probabilities, value).flatten(2)
    out = out.masked_fill(dead[:, 0], 0.0).to(query.dtype)
    return out if batch_first else out.transpose(0, 1).contiguous()


attend_cached = define(
    "attend_cached(Tensor query, Tensor new_key, Tensor new_value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor starts, "
    "Tensor steps, Tensor page_table, int page_size, bool batch_first, bool causal, float scale) -> Tensor",
    reference=_attend_cached,
    kernel=("kv_cache", "attend_cached"),
    fake=lambda query, new_key, new_value, *_: query.new_empty((*query.shape[:2], query.shape[2] * new_value.shape[3])),
)
"""query [S, B, H, D], or [B, S, H, D] if batch_first, new_key and new_value of the same tokens -> [S, B, H * E] or [B, S, H * E].

causal: a query sees its own token and those before it, else all that its sequence has. Queries that are padding give zeros.
"""
