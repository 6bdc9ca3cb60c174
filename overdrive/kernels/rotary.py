"""Rotary position embedding: a program turns all heads of one token, of Q and of K, by angles that it takes the sines of once.

Shapes: token t is (a, b) = (t / B, t % B); tiles are [heads, pairs], a pair being the two features that turn together.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from overdrive.kernels.launch import Launcher
from overdrive.kernels.tile import dense


@triton.jit
def _sine_cosine(x):
    """(sin, cos) to 1e-6. Triton has each of the threads that need one compute it, for which the library's are too slow."""
    turns = libdevice.rint(x * 0.15915494)
    x = tl.fma(turns, 1.7484556e-7, tl.fma(turns, -6.2831855, x))  # exact for any whole number of turns below 2**24
    return libdevice.fast_sinf(x), libdevice.fast_cosf(x)


@triton.jit
def _position(s, b, start_positions, cu_seqlens, N, BN: tl.constexpr):
    """ops.rotary.positions of token s of sample b. N: sequences in cu_seqlens, BN > N."""
    if cu_seqlens is None:
        place, sequence = s, b
    else:
        i = tl.arange(0, BN)
        begin = tl.load(cu_seqlens + i, i <= N, 2**31 - 1)
        end = tl.load(cu_seqlens + i + 1, i < N, 2**31 - 1)
        sequence = tl.minimum(tl.sum((begin <= s).to(tl.int32)) - 1, N - 1)
        place = s - tl.max(tl.where(begin <= s, begin, 0))
    if start_positions is not None:
        place = place.to(tl.int64) + tl.load(start_positions + sequence, sequence >= 0, 0)
    if cu_seqlens is not None:
        place = tl.where(s < tl.load(cu_seqlens + N), place, 0)
        broken = (tl.load(cu_seqlens) != 0) | (tl.max((begin > end).to(tl.int32)) != 0)
        place = tl.where(broken, -1, place)
    return place


@triton.jit
def _load_pairs(x, rows, i, inside, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """f32 (first, second) of each pair."""
    if INTERLEAVED:
        both = tl.arange(0, 2 * i.shape[0])
        tile = tl.load(x + rows[:, None] + both[None, :], inside[:, None] & (both < 2 * HALF)[None, :])
        first, second = tl.split(tl.reshape(tile, (rows.shape[0], i.shape[0], 2)))
    else:
        offsets, mask = rows[:, None] + i[None, :], inside[:, None] & (i < HALF)[None, :]
        first, second = tl.load(x + offsets, mask), tl.load(x + offsets + HALF, mask)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _store_pairs(out, rows, i, inside, first, second, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    first, second = first.to(out.dtype.element_ty), second.to(out.dtype.element_ty)
    if INTERLEAVED:
        both = tl.arange(0, 2 * i.shape[0])
        tile = tl.reshape(tl.join(first, second), (rows.shape[0], 2 * i.shape[0]))
        tl.store(out + rows[:, None] + both[None, :], tile, inside[:, None] & (both < 2 * HALF)[None, :])
    else:
        offsets, mask = rows[:, None] + i[None, :], inside[:, None] & (i < HALF)[None, :]
        tl.store(out + offsets, first, mask)
        tl.store(out + offsets + HALF, second, mask)


@triton.jit
def _turn(x, stride, out, i, turns, HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
          BH: tl.constexpr, REST: tl.constexpr):  # fmt: skip
    """out [HEADS, D] = the heads of one token of x, turned. turns: rows that the first and second of a pair are multiplied by."""
    first_cos, first_sin, second_cos, second_sin = turns
    for head in range(0, HEADS, BH):
        heads = head + tl.arange(0, BH)
        inside = heads < HEADS
        rows = heads.to(tl.int64) * stride
        first, second = _load_pairs(x, rows, i, inside, HALF, INTERLEAVED)
        turned_first = first * first_cos + second * first_sin
        turned_second = second * second_cos + first * second_sin
        _store_pairs(out, heads * D, i, inside, turned_first, turned_second, HALF, INTERLEAVED)
        if REST:
            rest = 2 * HALF + tl.arange(0, REST)
            mask = inside[:, None] & (rest < D)[None, :]
            tl.store(out + (heads * D)[:, None] + rest[None, :], tl.load(x + rows[:, None] + rest[None, :], mask), mask)


@triton.jit(do_not_specialize=["P", "N"])
def _rotary(q, q_strides, q_out, k, k_strides, k_out, freqs, freqs_stride, P, start_positions, cu_seqlens, N, B,
            BN: tl.constexpr, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BI: tl.constexpr,
            REST: tl.constexpr, BH: tl.constexpr, BG: tl.constexpr, INTERLEAVED: tl.constexpr, BATCH_FIRST: tl.constexpr,
            TRANSPOSE: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    outer, inner = token // B, token % B
    place = _position((inner if BATCH_FIRST else outer).to(tl.int32), outer if BATCH_FIRST else inner, start_positions, cu_seqlens,
                      N, BN)  # fmt: skip
    i = tl.arange(0, BI)
    there = (i < HALF) & (place >= 0) & (place < P)
    angles = freqs + place.to(tl.int64) * freqs_stride
    first = tl.load(angles + (2 * i if INTERLEAVED else i), there, float("nan"))
    second = tl.load(angles + (2 * i + 1 if INTERLEAVED else HALF + i), there, float("nan"))
    first_sin, first_cos = _sine_cosine(first)
    second_sin, second_cos = _sine_cosine(second)
    if TRANSPOSE:
        first_sin, second_sin = -second_sin, -first_sin
    turns = (first_cos[None, :], -first_sin[None, :], second_cos[None, :], second_sin[None, :])
    _turn(q + outer * q_strides[0] + inner * q_strides[1], q_strides[2], q_out + token * (H * D), i, turns,
          H, D, HALF, INTERLEAVED, BH, REST)  # fmt: skip
    if k is not None:
        _turn(k + outer * k_strides[0] + inner * k_strides[1], k_strides[2], k_out + token * (G * D), i, turns,
              G, D, HALF, INTERLEAVED, BG, REST)  # fmt: skip


_PAIRS = 2048  # of features that a program turns at a time, if there are so many


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


@functools.cache
def _launcher(
    heads: int, groups: int, width: int, turning: int, bounds: int, interleaved: bool, batch_first: bool, transpose: bool
) -> Launcher:
    """bounds: a power of 2 above the number of sequences in cu_seqlens."""
    half, rest = turning // 2, width - turning
    pairs = _power_of_2(half)
    at_once = [min(_power_of_2(max(count, 1)), max(_PAIRS // pairs, 1)) for count in (heads, groups)]
    constants = (bounds, heads, groups, width, half, pairs, _power_of_2(rest) if rest else 0, *at_once)
    return Launcher(_rotary, (*constants, interleaved, batch_first, transpose), min(max(max(at_once) * pairs // 512, 1), 4))


def rotary(
    q: torch.Tensor,
    k: torch.Tensor | None,
    freqs: torch.Tensor,
    start_positions: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    interleaved: bool,
    batch_first: bool,
    transpose: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """overdrive::rotary."""
    q, freqs = dense(q), dense(freqs)
    q_out, k_out, k_strides, groups, sequences = q.new_empty(q.shape), None, None, 0, 0
    if k is not None:
        k = dense(k)
        k_out, k_strides, groups = k.new_empty(k.shape), k.stride()[:3], k.shape[2]
    if start_positions is not None:
        start_positions = dense(start_positions)
    if cu_seqlens is not None:
        cu_seqlens = dense(cu_seqlens)
        sequences = cu_seqlens.shape[0] - 1
    outer, inner, heads, width = q.shape
    if outer and inner:
        bounds = _power_of_2(sequences + 1)
        run = _launcher(heads, groups, width, freqs.shape[3], bounds, interleaved, batch_first, transpose)
        tensors = (q, q.stride()[:3], q_out, k, k_strides, k_out, freqs, freqs.stride(0), freqs.shape[0])
        run((outer * inner, 1, 1), q.get_device(), (*tensors, start_positions, cu_seqlens, sequences, inner))
    return q_out, k_out
