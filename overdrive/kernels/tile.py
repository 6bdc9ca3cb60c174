"""The one tile consumer: f32 tiles of any source -> plain or FP8 output, transposed copy, amax and column sums, in one pass.

Shapes: the output is [T, K], Tp = T padded to 16; a tile is [BT, BK]. F = K / HALVES: the gradient of a gated activation comes as two
tiles, F columns apart. A source is a jit function (args, FLAG, row0, col0, T, F, BT, BK) -> tuple of HALVES f32 tiles that are zero
outside of [T, F]; `args` is the tuple that its family's launch hands over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from overdrive.ops.quantize import Mode, Quantization, Quantized, new_quantized, padded
from overdrive.ops.scaling import arena

PLAIN: tl.constexpr = tl.constexpr(int(Mode.PLAIN))
DELAYED: tl.constexpr = tl.constexpr(int(Mode.DELAYED))
CURRENT: tl.constexpr = tl.constexpr(int(Mode.CURRENT))
BLOCK_1D: tl.constexpr = tl.constexpr(int(Mode.BLOCK_1D))
BLOCK_2D: tl.constexpr = tl.constexpr(int(Mode.BLOCK_2D))
AMAX: tl.constexpr = tl.constexpr(5)  # first pass of CURRENT: nothing but the amax

FUSE = {"enable_fp_fusion": True}  # for every launch: Triton 3.10 turns it off by default, and 3.9 warns of that

FP32_MAX: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).max)

# Two f32 -> two FP8, to nearest even, saturating, NaN kept; four elements to a register.
_CAST: tl.constexpr = tl.constexpr("""{ .reg .b16 lo, hi;
    cvt.rn.satfinite.FORMAT.f32 lo, $2, $1;
    cvt.rn.satfinite.FORMAT.f32 hi, $4, $3;
    mov.b32 $0, {lo, hi}; }""")
_CAST_E4M3: tl.constexpr = tl.constexpr(_CAST.value.replace("FORMAT", "e4m3x2"))
_CAST_E5M2: tl.constexpr = tl.constexpr(_CAST.value.replace("FORMAT", "e5m2x2"))


@triton.jit
def load_tile(x, stride, row0, cols, inside, T, BT: tl.constexpr):
    """f32 x[row0 : row0 + BT, cols]; zero below the last row and where a column is not `inside`."""
    t = tl.arange(0, BT)
    mask = (t < T - row0)[:, None] & inside[None, :]
    offsets = t[:, None] * stride + cols[None, :]
    return tl.load(x + row0.to(tl.int64) * stride + offsets, mask, 0.0).to(tl.float32)


@triton.jit
def store_tile(out, stride, row0, col0, value, R, C):
    """out[row0:, col0:] = value, cut to [R, C]. 64-bit only for the tile's corner."""
    r, c = tl.arange(0, value.shape[0]), tl.arange(0, value.shape[1])
    mask = (r < R - row0)[:, None] & (c < C - col0)[None, :]
    tl.store(out + row0.to(tl.int64) * stride + col0 + (r[:, None] * stride + c[None, :]), value, mask)


@triton.jit
def amax_bits(x):
    """Bit patterns of |x|: as integers they order like the numbers, NaN on top."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_from_amax(bits, DTYPE: tl.constexpr, POWER_OF_2: tl.constexpr):
    """ops.quantize.scale_from_amax, of an amax given as bits."""
    amax = bits.to(tl.float32, bitcast=True)
    scale = tl.div_rn(57344.0 if DTYPE == tl.float8e5 else 448.0, amax)
    scale = tl.where(scale > FP32_MAX, FP32_MAX, scale)
    if POWER_OF_2:
        scale = (scale.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where((bits > 0) & (bits < 0x7F800000), scale, 1.0)


@triton.jit
def to_fp8(x, DTYPE: tl.constexpr):
    """ops.quantize.saturating_cast."""
    asm: tl.constexpr = _CAST_E5M2 if DTYPE == tl.float8e5 else _CAST_E4M3
    bytes = tl.inline_asm_elementwise(asm, "=r,r,r,r,r", [x], dtype=tl.uint8, is_pure=True, pack=4)
    return bytes.to(DTYPE, bitcast=True)


@triton.jit
def load_source(args, FLAG: tl.constexpr, row0, col0, T, F, BT: tl.constexpr, BK: tl.constexpr):
    """Source: a matrix, args (x, stride)."""
    cols = col0 + tl.arange(0, BK)
    return (load_tile(args[0], args[1], row0, cols, cols < F, T, BT),)


@triton.jit
def _store_blocks(value, q, qt, inv, inv_t, row0, col0, end, K, Tp, MODE: tl.constexpr, POWER_OF_2: tl.constexpr, ROW: tl.constexpr,
                  COL: tl.constexpr):  # fmt: skip
    """A 128x128 tile in FP8, with one scale per 1x128 each way (BLOCK_1D) or one in all (BLOCK_2D)."""
    DTYPE: tl.constexpr = q.dtype.element_ty
    r, c = row0 + tl.arange(0, 128), col0 + tl.arange(0, 128)
    row_block, col_block = row0 // 128, col0 // 128
    bits = amax_bits(value)
    if MODE == BLOCK_1D:
        if ROW:
            scale = scale_from_amax(tl.max(bits, 1), DTYPE, POWER_OF_2)
            tl.store(inv + col_block.to(tl.int64) * Tp + r, tl.div_rn(1.0, scale), (r < Tp) & (col0 < end))
            store_tile(q, K, row0, col0, to_fp8(value * scale[:, None], DTYPE), Tp, end)
        if COL:
            scale = scale_from_amax(tl.max(bits, 0), DTYPE, POWER_OF_2)
            tl.store(inv_t + row_block.to(tl.int64) * K + c, tl.div_rn(1.0, scale), (c < end) & (row0 < Tp))
            store_tile(qt, Tp, col0, row0, tl.trans(to_fp8(value * scale[None, :], DTYPE)), end, Tp)
    else:
        scale = scale_from_amax(tl.max(bits), DTYPE, POWER_OF_2)
        data = to_fp8(value * scale, DTYPE)
        # one scale, and ones in the columns that pad a row of scales to a multiple of four
        i = tl.arange(0, 4)
        values = tl.where(i == 0, tl.div_rn(1.0, scale), 1.0)
        rows, cols = tl.cdiv(Tp, 128), tl.cdiv(K, 128)
        inside = (row_block < rows) & (col_block < cols)
        if ROW:
            at = row_block * (tl.cdiv(cols, 4) * 4) + col_block
            pad = (col_block == cols - 1) & (col_block + i < tl.cdiv(cols, 4) * 4)
            tl.store(inv + at + i, values, inside & ((i == 0) | pad))
            store_tile(q, K, row0, col0, data, Tp, end)
        if COL:
            at = col_block * (tl.cdiv(rows, 4) * 4) + row_block
            pad = (row_block == rows - 1) & (row_block + i < tl.cdiv(rows, 4) * 4)
            tl.store(inv_t + at + i, values, inside & ((i == 0) | pad))
            store_tile(qt, Tp, col0, row0, tl.trans(data), end, Tp)


@triton.jit(do_not_specialize=["T", "slot", "tenant"])
def tile_kernel(args, q, qt, inv, inv_t, scales, slots, slot, amax, owner, tenant, sums, T, K, Tp,
                SOURCE: tl.constexpr, FLAG: tl.constexpr, HALVES: tl.constexpr, MODE: tl.constexpr, POWER_OF_2: tl.constexpr,
                ROW: tl.constexpr, COL: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """amax: i32, the arena's (DELAYED) or [1] (AMAX writes it, CURRENT reads it). owner, sums f32 [row blocks, K]: or None."""
    F = K // HALVES
    pid = tl.program_id(0)
    col_blocks = tl.maximum(tl.cdiv(F, BK), 1)
    row0, col0 = pid // col_blocks * BT, pid % col_blocks * BK
    values = SOURCE(args, FLAG, row0, col0, T, F, BT, BK)
    DTYPE: tl.constexpr = q.dtype.element_ty

    scale = 1.0
    if MODE == DELAYED:
        index = tl.load(slots + slot)
        scale = tl.load(scales + index)
        if owner is not None:
            amax += index
            tl.store(owner + index, tenant, pid == 0)
    if MODE == CURRENT:
        scale = scale_from_amax(tl.load(amax), DTYPE, POWER_OF_2)
    if MODE == DELAYED or MODE == CURRENT:
        tl.store(inv, tl.div_rn(1.0, scale), pid == 0)

    for half in tl.static_range(HALVES):
        value = values[half]
        first, end = col0 + half * F, (half + 1) * F
        if MODE == AMAX or (MODE == DELAYED and owner is not None):
            tl.atomic_max(amax, tl.max(amax_bits(value)), sem="relaxed")
        if sums is not None:
            c = tl.arange(0, BK)
            tl.store(sums + (row0 // BT).to(tl.int64) * K + first + c, tl.sum(value, 0), c < end - first)
        if MODE == PLAIN:
            store_tile(q, K, row0, first, value.to(DTYPE), T, end)
        elif MODE == DELAYED or MODE == CURRENT:
            data = to_fp8(value * scale, DTYPE)
            if ROW:
                store_tile(q, K, row0, first, data, Tp, end)
            if COL:
                store_tile(qt, Tp, first, row0, tl.trans(data), end, Tp)
        elif MODE == BLOCK_1D or MODE == BLOCK_2D:
            _store_blocks(value, q, qt, inv, inv_t, row0, first, end, K, Tp, MODE, POWER_OF_2, ROW, COL)


@triton.jit
def _sum_rows(partial, out, P, K, BP: tl.constexpr, BK: tl.constexpr):
    cols = tl.program_id(0) * BK + tl.arange(0, BK)
    total = tl.zeros([BP, BK], tl.float32)
    for row0 in range(0, P, BP):
        rows = row0 + tl.arange(0, BP)
        total += tl.load(partial + rows[:, None].to(tl.int64) * K + cols, (rows < P)[:, None] & (cols < K), 0.0)
    tl.store(out + cols, tl.sum(total, 0).to(out.dtype.element_ty), cols < K)


@triton.jit(do_not_specialize=["P"])
def _column_sums(partial, out, second, P, K, BP: tl.constexpr, BK: tl.constexpr):
    """out[K], second[K] = sums over P of partial [2 or 1, P, K], always in the same order."""
    if tl.program_id(1) == 0:
        _sum_rows(partial, out, P, K, BP, BK)
    else:
        _sum_rows(partial + P.to(tl.int64) * K, second, P, K, BP, BK)


def column_sums(partial: torch.Tensor, out: torch.Tensor, second: torch.Tensor | None = None) -> None:
    """Reduce f32 partial [n, P, K] over P into out [K] and, where n is 2, second [K]."""
    _, rows, cols = partial.shape
    grid = (triton.cdiv(cols, 32), 1 if second is None else 2)
    if cols:
        _column_sums[grid](partial, out, out if second is None else second, rows, cols, 64, 32, **FUSE)


def dense(x: torch.Tensor) -> torch.Tensor:
    """x with its last dimension contiguous, as kernels read it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def tile_shape(mode: int, col: bool) -> tuple[int, int, int]:
    """(BT, BK, warps) of a tile."""
    if mode in (Mode.BLOCK_1D, Mode.BLOCK_2D):
        return 128, 128, 8
    return (64, 128, 4) if col else (16, 512, 4)


def new_amax(like: torch.Tensor) -> torch.Tensor:
    """Where a first pass of CURRENT collects the amax."""
    return like.new_zeros(1, dtype=torch.int32)


def run_tiles(
    source: Callable[..., Any],
    args: tuple[Any, ...],
    flag: Any,
    like: torch.Tensor,
    shape: tuple[int, int],
    q: Quantization,
    *,
    halves: int = 1,
    bias_grad: bool = False,
    amax: torch.Tensor | None = None,
) -> tuple[Quantized, torch.Tensor]:
    """A source of `shape` [T, K] -> (Quantized, its column sums in like's dtype). amax: of CURRENT, where it is known already."""
    rows, cols = shape
    out = new_quantized(like, rows, cols, q)
    height, width, warps = tile_shape(q.mode, q.col)
    padded_rows = padded(rows)
    row_blocks = max(-(-(rows if q.mode == Mode.PLAIN else padded_rows) // height), 1)
    grid = (row_blocks * max(-(-cols // halves // width), 1),)
    constants = {"SOURCE": source, "FLAG": flag, "HALVES": halves, "POWER_OF_2": q.power_of_2, "ROW": q.row, "COL": q.col,
                 "BT": height, "BK": width, "num_warps": warps, **FUSE}  # fmt: skip
    owner = sums = None
    if q.mode == Mode.DELAYED and q.tenant >= 0:
        state = arena(like.device)
        amax, owner = state.amax_bits, state.owner
    elif q.mode == Mode.CURRENT and amax is None:
        amax = new_amax(like)
        tile_kernel[grid](args, *out, None, None, 0, amax, None, 0, None, rows, cols, padded_rows, MODE=5, **constants)
    if bias_grad:
        sums = like.new_empty((1, row_blocks, cols), dtype=torch.float32)
    tile_kernel[grid](
        args, *out, q.scales, q.slots, q.slot, amax, owner, q.tenant, sums, rows, cols, padded_rows, MODE=int(q.mode), **constants
    )
    column_sum = like.new_empty(cols if bias_grad else 0)
    if bias_grad:
        column_sums(sums, column_sum)
    return out, column_sum
