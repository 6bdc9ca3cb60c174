"""The one tile consumer: f32 tiles of any source -> plain or FP8 output, transposed copy, amax and column sums, in one pass.

Shapes: the output is [T, K], Tp = T padded to 16, F = K / HALVES: the gradient of a gated activation comes as two tiles, F columns
apart. A program owns BT rows and BK columns of each half, or of one where scale blocks fill its registers. For a transposed copy
it holds them as four tiles [BT / 4, BK], tile j having rows j, j + 4, ...: the bytes of four neighbours down a column lie in one
thread, and are transposed as one 32-bit word.

A source is a jit function (args, FLAG, row0, r, cols, T, F) -> tuple of HALVES f32 tiles: rows row0 + r, columns `cols`, zero
outside of [T, F]; `args` is the tuple that its family's launch hands over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from overdrive.kernels.fp8 import scale_from_amax, to_fp8, to_words
from overdrive.kernels.launch import MOST_HELD, Launcher
from overdrive.ops.quantize import BLOCK, Mode, Quantization, Quantized, new_quantized, padded
from overdrive.ops.scaling import arena

PLAIN: tl.constexpr = tl.constexpr(int(Mode.PLAIN))
DELAYED: tl.constexpr = tl.constexpr(int(Mode.DELAYED))
CURRENT: tl.constexpr = tl.constexpr(int(Mode.CURRENT))
BLOCK_1D: tl.constexpr = tl.constexpr(int(Mode.BLOCK_1D))
BLOCK_2D: tl.constexpr = tl.constexpr(int(Mode.BLOCK_2D))
AMAX: tl.constexpr = tl.constexpr(5)  # first pass of CURRENT: nothing but the amax


@triton.jit
def load_tile(x, stride, row0, r, cols, T, F):
    """f32 x[row0 + r, cols], zero outside of [T, F]. 64-bit only for the tile's corner."""
    mask = (r < T - row0)[:, None] & (cols < F)[None, :]
    return tl.load(x + row0.to(tl.int64) * stride + (r[:, None] * stride + cols[None, :]), mask, 0.0).to(tl.float32)


@triton.jit
def store_tile(out, stride, row0, r, col0, c, value, R, C):
    """out[row0 + r, col0 + c] = value, cut to [R, C]."""
    mask = (r < R - row0)[:, None] & (c < C - col0)[None, :]
    offsets = r[:, None] * stride + c[None, :]
    if out.dtype.element_ty.primitive_bitwidth == 8:
        offsets = tl.max_contiguous(offsets, [1, 8])  # not 16: a thread stores the 8 numbers that it loads as 16 bytes
    tl.store(out + row0.to(tl.int64) * stride + col0 + offsets, value, mask)


@triton.jit
def load_source(args, FLAG: tl.constexpr, row0, r, cols, T, F):
    """Source: a matrix, args (x, stride)."""
    return (load_tile(args[0], args[1], row0, r, cols, T, F),)


@triton.jit
def _store_block_scale(inv, scale_inv, row_block, col_block, rows, cols):
    """BLOCK_2D: one reciprocal scale of [rows, cols], and ones in the columns that pad a row to a multiple of four."""
    i = tl.arange(0, 4)
    padded_cols = tl.cdiv(cols, 4) * 4
    pad = (col_block == cols - 1) & (col_block + i < padded_cols)
    mask = (row_block < rows) & (col_block < cols) & ((i == 0) | pad)
    tl.store(inv + row_block * padded_cols + col_block + i, tl.where(i == 0, scale_inv, 1.0), mask)


@triton.jit
def _tile_total(tiles, HALF: tl.constexpr, STEP: tl.constexpr):
    total = tiles[0][HALF]
    for j in tl.static_range(1, STEP):
        total += tiles[j][HALF]
    return total


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _tile_amax(tiles, HALF: tl.constexpr, STEP: tl.constexpr):
    amax = tl.abs(tiles[0][HALF])
    for j in tl.static_range(1, STEP):
        amax = _larger(amax, tl.abs(tiles[j][HALF]))
    return amax


@triton.jit
def _amax_bits(magnitudes, AXIS: tl.constexpr):
    """amax_bits along an axis, or of all; magnitudes have no sign to take away."""
    return tl.reduce(magnitudes, AXIS, _larger).to(tl.int32, bitcast=True)


@triton.jit
def _dealt(x):
    """x with its n columns dealt out like cards to eight: column 8 i + k comes to be k n / 8 + i. A thread holds eight neighbours
    and writes one after the other to shared memory: so dealt, the lanes of a warp write neighbours at a time, to different banks.
    """
    R: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    return tl.reshape(tl.permute(tl.reshape(x, [R, C // 8, 8]), [0, 2, 1]), [R, C])


@triton.jit
def _dealt_columns(C: tl.constexpr):
    """Where the columns of `_dealt` were."""
    i = tl.arange(0, C)
    return i % (C // 8) * 8 + i // (C // 8)


@triton.jit
def _store_words(qt, tiles, scale, HALF: tl.constexpr, row0, first, end, T16, DTYPE: tl.constexpr):
    """The transposed copy, four rows to a word. scale: a number, or a row of `_dealt` columns."""
    words = to_words(_dealt(tiles[0][HALF]) * scale, _dealt(tiles[1][HALF]) * scale, _dealt(tiles[2][HALF]) * scale,
                     _dealt(tiles[3][HALF]) * scale, DTYPE)  # fmt: skip
    r, columns = tl.arange(0, words.shape[0]), _dealt_columns(words.shape[1])
    store_tile(qt.to(tl.pointer_type(tl.int32)), T16 * 4, first, columns, row0 // 4, r, tl.trans(words), end, T16 * 4)


@triton.jit
def _store_tensor_scaled(q, qt, tiles, scale, HALF: tl.constexpr, row0, r, first, c, end, K, T16, ROW: tl.constexpr,
                         COL: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    DTYPE: tl.constexpr = q.dtype.element_ty
    if ROW:
        for j in tl.static_range(STEP):
            store_tile(q, K, row0 + j, r, first, c, to_fp8(tiles[j][HALF] * scale, DTYPE), T16 * 16, end)
    if COL:
        _store_words(qt, tiles, scale, HALF, row0, first, end, T16, DTYPE)


@triton.jit
def _store_block_1d(q, qt, inv, inv_t, tiles, amax, HALF: tl.constexpr, row0, r, first, c, end, K, T16, POWER_OF_2: tl.constexpr,
                    ROW: tl.constexpr, COL: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """One scale per 1x128, each way."""
    DTYPE: tl.constexpr = q.dtype.element_ty
    Tp = T16 * 16
    if ROW:
        inverses = ()
        for j in tl.static_range(STEP):
            value = tiles[j][HALF]
            scale, scale_inv = scale_from_amax(_amax_bits(tl.abs(value), 1), DTYPE, POWER_OF_2)
            inverses = inverses + (scale_inv,)  # noqa: RUF005, Triton does not unpack
            store_tile(q, K, row0 + j, r, first, c, to_fp8(value * scale[:, None], DTYPE), Tp, end)
        inverse = inverses[0]
        if STEP == 4:
            inverse = tl.reshape(tl.join(tl.join(inverse, inverses[2]), tl.join(inverses[1], inverses[3])), [inverse.shape[0] * 4])
        rows = tl.arange(0, inverse.shape[0])
        tl.store(inv + (first // 128).to(tl.int64) * Tp + row0 + rows, inverse, (rows < Tp - row0) & (first < end))
    if COL:
        scale, scale_inv = scale_from_amax(_amax_bits(_dealt(amax), 0), DTYPE, POWER_OF_2)
        columns = _dealt_columns(c.shape[0])
        tl.store(inv_t + (row0 // 128).to(tl.int64) * K + first + columns, scale_inv, (columns < end - first) & (row0 < Tp))
        _store_words(qt, tiles, scale[None, :], HALF, row0, first, end, T16, DTYPE)


@triton.jit
def _store_block_2d(q, qt, inv, inv_t, tiles, amax, HALF: tl.constexpr, row0, r, first, c, end, K, T16, POWER_OF_2: tl.constexpr,
                    ROW: tl.constexpr, COL: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """One scale per 128x128."""
    scale, scale_inv = scale_from_amax(_amax_bits(amax, None), q.dtype.element_ty, POWER_OF_2)
    rows, cols = tl.cdiv(T16 * 16, 128), tl.cdiv(K, 128)
    if ROW:
        _store_block_scale(inv, scale_inv, row0 // 128, first // 128, rows, cols)
    if COL:
        _store_block_scale(inv_t, scale_inv, first // 128, row0 // 128, cols, rows)
    _store_tensor_scaled(q, qt, tiles, scale, HALF, row0, r, first, c, end, K, T16, ROW, COL, STEP)


@triton.jit
def _store_total(sums, total, first, end):
    columns = _dealt_columns(total.shape[1])
    tl.store(sums + first + columns, tl.sum(_dealt(total), 0).to(sums.dtype.element_ty), columns < end - first)


@triton.jit
def _store_strip(args, q, qt, inv, inv_t, scale, amax, sums, band, col0, T, T16, F, SOURCE: tl.constexpr, FLAG: tl.constexpr,
                 HALVES: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr, MODE: tl.constexpr, RECORD: tl.constexpr,
                 POWER_OF_2: tl.constexpr, ROW: tl.constexpr, COL: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
                 REPEAT: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """REPEAT tiles, one below the other, of the halves FROM up to TO."""
    DTYPE: tl.constexpr = q.dtype.element_ty
    STEP: tl.constexpr = 4 if COL else 1
    K = F * HALVES
    r, c = tl.arange(0, BT // STEP) * STEP, tl.arange(0, BK)
    total = tl.zeros([BT // STEP, BK], tl.float32)
    second_total = tl.zeros([BT // STEP, BK], tl.float32)
    for i in tl.range(REPEAT, num_stages=STAGES, disable_licm=True):  # offsets taken out of the loop would cost registers
        row0 = (band * REPEAT + i) * BT
        tiles = (SOURCE(args, FLAG, row0, r, col0 + c, T, F),)
        for j in tl.static_range(1, STEP):
            tiles = tiles + (SOURCE(args, FLAG, row0 + j, r, col0 + c, T, F),)  # noqa: RUF005, Triton does not unpack
        if sums is not None:
            total += _tile_total(tiles, FROM, STEP)
            if TO - FROM == 2:
                second_total += _tile_total(tiles, 1, STEP)
        for half in tl.static_range(FROM, TO):
            first, end = col0 + half * F, (half + 1) * F
            if RECORD or MODE == BLOCK_1D or MODE == BLOCK_2D:
                magnitudes = _tile_amax(tiles, half, STEP)
            if RECORD:
                tl.atomic_max(amax, _amax_bits(magnitudes, None), sem="relaxed")
            if MODE == PLAIN:
                store_tile(q, K, row0, r, first, c, tiles[0][half].to(DTYPE), T, end)
            elif MODE == DELAYED or MODE == CURRENT:
                _store_tensor_scaled(q, qt, tiles, scale, half, row0, r, first, c, end, K, T16, ROW, COL, STEP)
            elif MODE == BLOCK_1D:
                _store_block_1d(q, qt, inv, inv_t, tiles, magnitudes, half, row0, r, first, c, end, K, T16,
                                POWER_OF_2, ROW, COL, STEP)  # fmt: skip
            elif MODE == BLOCK_2D:
                _store_block_2d(q, qt, inv, inv_t, tiles, magnitudes, half, row0, r, first, c, end, K, T16,
                                POWER_OF_2, ROW, COL, STEP)  # fmt: skip
    if sums is not None:
        sums += band.to(tl.int64) * K
        _store_total(sums, total, col0 + FROM * F, (FROM + 1) * F)
        if TO - FROM == 2:
            _store_total(sums, second_total, col0 + F, K)


@triton.jit(do_not_specialize=["T", "T16", "slot", "tenant"])
def tile_kernel(args, q, qt, inv, inv_t, scales, slots, slot, amax, owner, tenant, sums, T, T16, F,
                SOURCE: tl.constexpr, FLAG: tl.constexpr, HALVES: tl.constexpr, MODE: tl.constexpr, POWER_OF_2: tl.constexpr,
                ROW: tl.constexpr, COL: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, REPEAT: tl.constexpr,
                STAGES: tl.constexpr):  # fmt: skip
    """REPEAT tiles, one below the other.

    amax: i32, the arena's (DELAYED) or [1] (AMAX writes it, CURRENT reads it). owner, sums [programs down, K]: or None.
    """
    RECORD: tl.constexpr = MODE == AMAX or (MODE == DELAYED and owner is not None)
    SPLIT: tl.constexpr = HALVES == 2 and (MODE == BLOCK_1D or MODE == BLOCK_2D)
    pid = tl.program_id(0)
    if MODE == AMAX:
        pid = tl.num_programs(0) - 1 - pid  # ends where the second pass begins: in the cache
    col_blocks = tl.maximum(tl.cdiv(F, BK), 1) * (2 if SPLIT else 1)
    band, block = pid // col_blocks, pid % col_blocks

    scale = 1.0
    if MODE == DELAYED:
        index = tl.load(slots + slot)
        scale = tl.load(scales + index)
        if pid == 0:
            tl.store(inv, tl.div_rn(1.0, scale))
            if RECORD:
                tl.store(owner + index, tenant)
        if RECORD:
            amax += index
    if MODE == CURRENT:
        scale, scale_inv = scale_from_amax(tl.load(amax), q.dtype.element_ty, POWER_OF_2)
        if pid == 0:
            tl.store(inv, scale_inv)

    if not SPLIT:
        _store_strip(args, q, qt, inv, inv_t, scale, amax, sums, band, block * BK, T, T16, F, SOURCE, FLAG, HALVES, 0, HALVES,
                     MODE, RECORD, POWER_OF_2, ROW, COL, BT, BK, REPEAT, STAGES)  # fmt: skip
    elif block % 2 == 0:
        _store_strip(args, q, qt, inv, inv_t, scale, amax, sums, band, block // 2 * BK, T, T16, F, SOURCE, FLAG, HALVES, 0, 1,
                     MODE, RECORD, POWER_OF_2, ROW, COL, BT, BK, REPEAT, STAGES)  # fmt: skip
    else:
        _store_strip(args, q, qt, inv, inv_t, scale, amax, sums, band, block // 2 * BK, T, T16, F, SOURCE, FLAG, HALVES, 1, 2,
                     MODE, RECORD, POWER_OF_2, ROW, COL, BT, BK, REPEAT, STAGES)  # fmt: skip


@triton.jit
def _sum_rows(partial, out, P, K, BP: tl.constexpr, BK: tl.constexpr):
    cols = tl.program_id(0) * BK + tl.arange(0, BK)
    total = tl.zeros([BP, BK], tl.float32)
    for row0 in range(0, P, BP):
        rows = row0 + tl.arange(0, BP)
        total += tl.load(partial + rows[:, None].to(tl.int64) * K + cols, (rows < P)[:, None] & (cols < K), 0.0)
    tl.store(out + cols, tl.sum(total, 0).to(out.dtype.element_ty), cols < K)


@triton.jit(do_not_specialize=["P"])
def _column_sums(args, P, K, BP: tl.constexpr, BK: tl.constexpr):
    """out[K], second[K] = sums over P of partial [2 or 1, P, K], always in the same order; args (partial, out, second)."""
    partial, out, second = args
    if tl.program_id(1) == 0:
        _sum_rows(partial, out, P, K, BP, BK)
    else:
        _sum_rows(partial + P.to(tl.int64) * K, second, P, K, BP, BK)


_COLUMN_SUMS = Launcher(_column_sums, (256, 16), 8)


def column_sums(partial: torch.Tensor, out: torch.Tensor, second: torch.Tensor | None = None) -> None:
    """Reduce f32 partial [n, P, K] over P into out [K] and, where n is 2, second [K]."""
    _, rows, cols = partial.shape
    if cols:
        grid = (-(-cols // 16), 1 if second is None else 2, 1)
        args = (partial, out, out if second is None else second)
        _COLUMN_SUMS(grid, partial.get_device(), (args, rows, cols))


def dense(x: torch.Tensor) -> torch.Tensor:
    """x with its last dimension contiguous, as kernels read it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def tile_shape(mode: int, col: bool, inputs: int, span: int) -> tuple[int, int, int, int | None]:
    """(BT, BK, warps, registers) of a program, the best of those measured; inputs and span as `run_tiles` has them."""
    narrow = span % BLOCK != 0
    if mode == AMAX.value:
        return (128, 64, 8, None) if narrow else (64, 128, 8, None)
    if mode == Mode.BLOCK_1D or (mode == Mode.BLOCK_2D and inputs < 3):
        return BLOCK, BLOCK, 8, 128
    if mode == Mode.BLOCK_2D:
        return BLOCK, BLOCK, 16, 64
    if col and inputs == 1:
        return (128, 64, 8, 64) if narrow else (64, 128, 8, 64)
    return (64, 64, 4, None) if col or narrow else (32, 128, 4, None)


def _walk(mode: int, col: bool, inputs: int, bias_grad: bool) -> tuple[int, int]:
    """(how many tiles a program takes at the most, how many of them are on their way at a time).

    Column sums are best taken of several tiles at once. Scale blocks of several inputs leave no registers for programs that would
    compute while others load, so there a program loads its next tile itself.
    """
    if mode == Mode.BLOCK_2D:
        return (8, 2) if inputs == 2 else (1, 1)
    if mode == Mode.BLOCK_1D and inputs > 1:
        return 8, 2
    if not bias_grad:
        return 1, 1
    if mode == Mode.BLOCK_1D:
        return 2, 1
    return (16, 3) if not col else (2, 1) if inputs == 1 else (4, 3)


_ENOUGH_PROGRAMS = 2048  # to fill the chip several times over; it holds an eighth as many of the tiles of scale blocks
_FEW_ROWS = 16  # blocks of rows that one program sums on its way, which saves a launch


def new_amax(like: torch.Tensor) -> torch.Tensor:
    """Where a first pass of CURRENT collects the amax."""
    return like.new_zeros(1, dtype=torch.int32)


class _Plan:
    """How one shape is run: what a call need not work out again."""

    def __init__(
        self,
        source: Callable[..., Any],
        flag: Any,
        rows: int,
        cols: int,
        mode: int,
        power_of_2: bool,
        row: bool,
        col: bool,
        inputs: int,
        halves: int,
        bias_grad: bool,
        span: int,
    ) -> None:
        col = col and mode != Mode.PLAIN
        height, width, warps, registers = tile_shape(mode, col, inputs, span)
        padded_rows, half = padded(rows), cols // halves
        col_blocks, row_blocks = max(-(-half // width), 1), max(-(-padded_rows // height), 1)
        most, stages = _walk(mode, col, inputs, bias_grad)
        enough = _ENOUGH_PROGRAMS // 8 if height == BLOCK else _ENOUGH_PROGRAMS
        repeat = 1
        while bias_grad and repeat < row_blocks <= _FEW_ROWS:
            repeat *= 2
        while repeat < most and row_blocks * col_blocks >= 2 * repeat * enough:
            repeat *= 2
        self.bands = -(-row_blocks // repeat)
        split = halves if mode in (Mode.BLOCK_1D, Mode.BLOCK_2D) else 1
        self.grid = (self.bands * col_blocks * split, 1, 1)
        self.sizes = (rows, padded_rows // 16, half)
        shape = (power_of_2, row, col, height, width, repeat, stages if repeat > 1 else 1)
        self.run = Launcher(tile_kernel, (source, flag, halves, mode, *shape), warps, registers)
        height, width, warps, registers = tile_shape(AMAX.value, False, inputs, span)
        self.amax_grid = (max(-(-half // width), 1) * max(-(-rows // height), 1), 1, 1)
        shape = (power_of_2, row, False, height, width, 1, 1)
        self.collect_amax = Launcher(tile_kernel, (source, flag, halves, AMAX.value, *shape), warps, registers)


_plans: dict[tuple[Any, ...], _Plan] = {}


def _plan(key: tuple[Any, ...], source: Callable[..., Any], *options: Any) -> _Plan:
    if len(_plans) >= MOST_HELD:
        _plans.clear()
    plan = _plans[key] = _Plan(source, *options)
    return plan


def run_tiles(
    source: Callable[..., Any],
    args: tuple[Any, ...],
    flag: Any,
    like: torch.Tensor,
    shape: tuple[int, int],
    q: Quantization,
    *,
    inputs: int = 1,
    halves: int = 1,
    span: int = BLOCK,
    bias_grad: bool = False,
    amax: torch.Tensor | None = None,
    into: torch.Tensor | None = None,
) -> tuple[Quantized, torch.Tensor | None]:
    """A source of `shape` [T, K] that reads some `inputs` -> (Quantized, its column sums in like's dtype if asked for).

    span: of how many columns, such as a head's, a tile had better not see more than one. amax: of CURRENT, where it is known
    already. into: where PLAIN output goes.
    """
    rows, cols = shape
    mode, dtype, scales, slots, slot, tenant, power_of_2, row, col = q
    records = mode == Mode.DELAYED and tenant >= 0 and rows > 0
    # the kinds of all arguments but the source's follow from these
    key = (id(source), flag, like.dtype, rows, cols, mode, dtype, records, power_of_2, row, col, inputs, halves, bias_grad, span)
    plan = _plans.get(key)
    if plan is None:
        plan = _plan(key, source, flag, rows, cols, int(mode), power_of_2, row, col, inputs, halves, bias_grad, span)
    out = new_quantized(like, rows, cols, q) if into is None else Quantized(into, None, None, None)
    device = like.get_device()
    data, data_t, scale_inv, scale_inv_t = out
    if data is None:  # the kernel takes the dtype from here
        data = like.new_empty(0, dtype=dtype) if data_t is None else data_t
    owner = sums = column_sum = None
    if records:
        state = arena(like.device)
        amax, owner = state.amax_bits, state.owner
    elif mode == Mode.CURRENT and amax is None:
        amax = new_amax(like)
        tail = (data, data_t, scale_inv, None, scales, slots, slot, amax, None, tenant, None, *plan.sizes)
        plan.collect_amax(plan.amax_grid, device, (args,), tail)
    if bias_grad:
        column_sum = like.new_empty(cols)
        sums = column_sum if plan.bands == 1 else like.new_empty((1, plan.bands, cols), dtype=torch.float32)
    tail = (data, data_t, scale_inv, scale_inv_t, scales, slots, slot, amax, owner, tenant, sums, *plan.sizes)
    plan.run(plan.grid, device, (args,), tail)
    if sums is not None and sums is not column_sum:
        column_sums(sums, column_sum)
    return out, column_sum
