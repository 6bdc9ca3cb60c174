"""Attention of a few new tokens to a paged cache, which takes in their keys and values on the way.

A program owns the queries of one group of heads of one sequence, [R, D], R = S * H / G, and a share of the cached keys; the first
share has the new ones too. It reads what the sequence has, in tiles of BT keys. Shares are put together by a second kernel.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from overdrive.kernels.launch import Launcher, sm_count
from overdrive.kernels.tile import dense


@triton.jit
def _attended(q, k, v, seen, scale, top, total, acc):
    """(largest score, sum, weighted values) of each query, further keys included: those of k [BT, D] that are `seen` [R, BT]."""
    scores = tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))
    larger = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(larger == float("-inf"), 0.0, larger)
    p, shrunk = tl.exp2(scores - base[:, None]), tl.exp2(top - base)
    acc = tl.dot(p.to(v.dtype), v, acc * shrunk[:, None], input_precision="ieee")
    return larger, total * shrunk + tl.sum(p, 1), acc


@triton.jit
def _rows(page_table, table_stride, place, page_size, inside):
    """The cache's rows of a sequence's tokens at `place`."""
    page = tl.load(page_table + (place // page_size) * table_stride, inside, 0)
    return page.to(tl.int64) * page_size + place % page_size


@triton.jit
def _taken_in(new, strides, cache, cache_strides, rows, tokens, channels, mask):
    """The new tokens' keys or values, [tokens, channels], after writing them to the cache's rows."""
    x = tl.load(new + tokens.to(tl.int64)[:, None] * strides[1] + channels[None, :], mask, 0.0)
    tl.store(cache + rows[:, None] * cache_strides[0] + channels[None, :], x, mask)
    return x


@triton.jit
def _attend_cached(query, q_strides, new_key, nk_strides, new_value, nv_strides, keys, k_strides, values, v_strides, starts, steps,
                   page_table, t_strides, out, o_strides, parts, sums, page_size, scale,
                   H: tl.constexpr, G: tl.constexpr, S: tl.constexpr, D: tl.constexpr, E: tl.constexpr, R: tl.constexpr,
                   BD: tl.constexpr, BE: tl.constexpr, BS: tl.constexpr, BT: tl.constexpr, SHARES: tl.constexpr,
                   CAUSAL: tl.constexpr):  # fmt: skip
    """Strides of query, new_key, new_value and out are those of batch, token and head. R >= S * H / G and BS >= S, at least 16."""
    b, g, share = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G, tl.program_id(1)
    start, step = tl.load(starts + b), tl.load(steps + b)
    r, d, e = tl.arange(0, R), tl.arange(0, BD), tl.arange(0, BE)
    token, head = r // (H // G), g * (H // G) + r % (H // G)
    alive = (token < step) & (token < S)
    rows = b * q_strides[0] + token.to(tl.int64) * q_strides[1] + head * q_strides[2]
    q = tl.load(query + rows[:, None] + d[None, :], alive[:, None] & (d < D)[None, :], 0.0)
    table = page_table + b * t_strides[0]
    keys += g * k_strides[1]
    values += g * v_strides[1]
    top, total = tl.full([R], float("-inf"), tl.float32), tl.zeros([R], tl.float32)
    acc = tl.zeros([R, BE], tl.float32)

    per_share = tl.cdiv(tl.cdiv(start, SHARES), BT) * BT
    end = tl.minimum(start, (share + 1) * per_share)
    for first in tl.range(share * per_share, end, BT, num_stages=2):
        place = first + tl.arange(0, BT)
        inside = place < end
        at = _rows(table, t_strides[1], place, page_size, inside)
        k = tl.load(keys + at[:, None] * k_strides[0] + d[None, :], inside[:, None] & (d < D)[None, :], 0.0)
        v = tl.load(values + at[:, None] * v_strides[0] + e[None, :], inside[:, None] & (e < E)[None, :], 0.0)
        top, total, acc = _attended(q, k, v, inside[None, :] & alive[:, None], scale, top, total, acc)

    if share == 0:
        t = tl.arange(0, BS)
        inside = (t < S) & (t < step)
        at = _rows(table, t_strides[1], start + t, page_size, inside)
        new_key += b * nk_strides[0] + g * nk_strides[2]
        new_value += b * nv_strides[0] + g * nv_strides[2]
        k = _taken_in(new_key, nk_strides, keys, k_strides, at, t, d, inside[:, None] & (d < D)[None, :])
        v = _taken_in(new_value, nv_strides, values, v_strides, at, t, e, inside[:, None] & (e < E)[None, :])
        seen = inside[None, :] & alive[:, None]
        if CAUSAL:
            seen &= t[None, :] <= token[:, None]
        top, total, acc = _attended(q, k, v, seen, scale, top, total, acc)

    wanted = (token < S)[:, None] & (e < E)[None, :]
    if SHARES == 1:
        acc = tl.where(alive[:, None], acc / total[:, None], 0.0)
        rows = b * o_strides[0] + token.to(tl.int64) * o_strides[1] + head * o_strides[2]
        tl.store(out + rows[:, None] + e[None, :], acc.to(out.dtype.element_ty), wanted)
    else:  # parts [B, S, H, SHARES, E], sums [B, S, H, SHARES, 2]
        rows = ((b * S + token) * H + head) * SHARES + share
        tl.store(parts + rows[:, None] * E + e[None, :], acc, wanted)
        tl.store(sums + rows * 2, top, token < S)
        tl.store(sums + rows * 2 + 1, total, token < S)


@triton.jit
def _put_together(parts, sums, steps, out, o_strides, H: tl.constexpr, S: tl.constexpr, E: tl.constexpr, BE: tl.constexpr,
                  SHARES: tl.constexpr, BP: tl.constexpr):  # fmt: skip
    """out of one head of one token."""
    row = tl.program_id(0).to(tl.int64)
    b, token, head = row // (S * H), row // H % S, row % H
    i, e = tl.arange(0, BP), tl.arange(0, BE)
    at = row * SHARES + i
    top = tl.load(sums + at * 2, i < SHARES, float("-inf"))
    total = tl.load(sums + at * 2 + 1, i < SHARES, 0.0)
    weight = tl.exp2(top - tl.max(top))
    acc = tl.load(parts + at[:, None] * E + e[None, :], (i < SHARES)[:, None] & (e < E)[None, :], 0.0)
    acc = tl.sum(acc * weight[:, None], 0) / tl.sum(total * weight)
    acc = tl.where(token < tl.load(steps + b), acc, 0.0)
    tl.store(out + b * o_strides[0] + token * o_strides[1] + head * o_strides[2] + e, acc.to(out.dtype.element_ty), e < E)


_TILE = 16384  # bytes of keys that a program has at a time, in 16 to 64 of them
_MOST_SHARES = 32


@functools.cache
def _plan(
    batch: int, new: int, heads: int, groups: int, dims: tuple[int, int], places: int, itemsize: int, causal: bool, device
) -> tuple[int, Launcher, Launcher]:
    """(shares, launcher, launcher of what puts shares together): two programs to an SM, if there are enough keys."""
    queries, new_keys = (max(triton.next_power_of_2(count), 16) for count in (new * heads // groups, new))
    padded = [max(triton.next_power_of_2(width), 16) for width in dims]
    tile = min(max(triton.next_power_of_2(_TILE // (max(padded) * itemsize)), 16), 64)
    shares = max(min(2 * sm_count(device) // (batch * groups), -(-places // tile), _MOST_SHARES), 1)
    constants = (heads, groups, new, *dims, queries, *padded, new_keys, tile, shares, causal)
    together = (heads, new, dims[1], padded[1], shares, triton.next_power_of_2(shares))
    return shares, Launcher(_attend_cached, constants, 4), Launcher(_put_together, together, 1)


def attend_cached(
    query: torch.Tensor,
    new_key: torch.Tensor,
    new_value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    starts: torch.Tensor,
    steps: torch.Tensor,
    page_table: torch.Tensor,
    page_size: int,
    batch_first: bool,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    """overdrive::attend_cached."""
    query, new_key, new_value, starts, steps = dense(query), dense(new_key), dense(new_value), dense(starts), dense(steps)
    (batch, new, heads, width), groups = query.shape, new_key.shape[2]
    dims = width, new_value.shape[3]
    out = query.new_empty((batch, new, heads, dims[1]))
    result = out.view(batch, new, heads * dims[1])
    q_strides, k_strides, v_strides, o_strides = (x.stride()[:3] for x in (query, new_key, new_value, out))
    if not batch_first:
        batch, new = new, batch
        q_strides, k_strides, v_strides, o_strides = ((b, a, c) for a, b, c in (q_strides, k_strides, v_strides, o_strides))
    if not (batch and new):
        return result
    places, device = page_table.shape[1] * page_size, query.get_device()
    shares, run, put_together = _plan(batch, new, heads, groups, dims, places, query.itemsize, causal, query.device)
    parts = sums = None
    if shares > 1:
        parts = query.new_empty((batch, new, heads, shares, dims[1]), dtype=torch.float32)
        sums = query.new_empty((batch, new, heads, shares, 2), dtype=torch.float32)
    run(
        (batch * groups, shares, 1), device,
        (query, q_strides, new_key, k_strides, new_value, v_strides, key_cache, key_cache.stride()[:2], value_cache,
         value_cache.stride()[:2], starts, steps, page_table, page_table.stride(), out, o_strides, parts, sums, page_size,
         scale * math.log2(math.e)),
    )  # fmt: skip
    if shares > 1:
        put_together((batch * new * heads, 1, 1), device, (parts, sums, steps, out, o_strides))
    return result
