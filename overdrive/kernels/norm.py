"""LayerNorm and RMSNorm. A row kernel takes statistics and writes plain or FP8 rows; a transposed copy, or scales that depend on
the output, take a second launch, of tiles over those statistics. What kernels/norm_cluster.py serves takes one.

Shapes: x [T, K]; gamma, beta [K]; mean, rstd f32 [T]. A row kernel's program holds R whole rows as one [R, BK] tile, BK >= K, and
walks over the rows; leaving SMs free (sm_margin) means fewer programs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from overdrive.kernels.fp8 import amax_bits, to_fp8
from overdrive.kernels.launch import MOST_HELD, launch, sm_count
from overdrive.kernels.tile import column_sums, dense, load_source, load_tile, new_amax, run_tiles, store_tile
from overdrive.ops.quantize import Mode, Quantization, Quantized, new_quantized, padded
from overdrive.ops.scaling import arena


@triton.jit
def _load_row(vector, cols, inside):
    """f32 vector, as a row."""
    return tl.load(vector + cols, inside, 0.0).to(tl.float32)[None, :]


@triton.jit
def _load_gain(gamma, cols, inside, ZERO_CENTERED: tl.constexpr):
    """f32 gain, as a row."""
    gain = _load_row(gamma, cols, inside)
    return gain + 1 if ZERO_CENTERED else gain


@triton.jit
def _norm_source(args, ZERO_CENTERED: tl.constexpr, row0, r, cols, T, F):
    """Source: the norm's output; args (x, stride, mean, rstd, gamma, beta)."""
    x, stride, mean, rstd, gamma, beta = args
    rows = row0 + r
    value = load_tile(x, stride, row0, r, cols, T, F)
    mean_column = tl.load(mean + rows, rows < T, 0.0)[:, None]
    rstd_column = tl.load(rstd + rows, rows < T, 0.0)[:, None]
    y = (value - mean_column) * rstd_column * _load_gain(gamma, cols, cols < F, ZERO_CENTERED)
    if beta is not None:
        y += _load_row(beta, cols, cols < F)
    return (tl.where((rows < T)[:, None] & (cols < F)[None, :], y, 0.0),)


@triton.jit(do_not_specialize=["T", "Tp", "slot", "tenant", "eps"])
def _norm_rows(args, out, y, yt, mean, rstd, gamma, beta, inv, scales, slots, slot, amax, owner, tenant, T, Tp, K, eps,
               SOURCE: tl.constexpr, FLAG: tl.constexpr, RMS: tl.constexpr, ZERO_CENTERED: tl.constexpr, R: tl.constexpr,
               BK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Rows of a source -> mean, rstd, and what is not None of: out (the rows themselves), y (the norm), yt (its transposed copy),
    amax of the norm (i32).

    y is FP8 where scales are given: then Tp >= T of its rows are written, inv is the reciprocal scale, and amax the arena's,
    recorded where owner is not None.
    """
    r, cols = tl.arange(0, R), tl.arange(0, BK)
    inside = cols < K
    pid = tl.program_id(0)
    scale = 1.0
    if scales is not None:
        index = tl.load(slots + slot)
        scale = tl.load(scales + index)
        tl.store(inv, tl.div_rn(1.0, scale), pid == 0)
        if owner is not None:
            amax += index
            tl.store(owner + index, tenant, pid == 0)
    if STAGES > 1:  # many rows to a program: loaded once, and not among what is loaded ahead
        gain = _load_gain(gamma, cols, inside, ZERO_CENTERED)
        if beta is not None:
            shift = _load_row(beta, cols, inside)
    largest = tl.zeros([R, BK], tl.int32)
    blocks = tl.cdiv(Tp, R)
    for block in tl.range(pid, blocks, tl.num_programs(0), num_stages=STAGES):
        row0 = (blocks - 1 - block) * R  # backwards: the tiles that follow find the first rows in the cache
        x = SOURCE(args, FLAG, row0, r, cols, T, K)[0]
        if out is not None:
            rounded = x.to(out.dtype.element_ty)
            store_tile(out, K, row0, r, 0, cols, rounded, T, K)
            x = rounded.to(tl.float32)
        m = tl.zeros([R], tl.float32) if RMS else tl.sum(x, 1) / K
        centered = tl.where(inside[None, :], x - m[:, None], 0.0)
        s = tl.rsqrt(tl.sum(centered * centered, 1) / K + eps)
        tl.store(mean + row0 + r, m, r < T - row0)
        tl.store(rstd + row0 + r, s, r < T - row0)
        if y is not None or amax is not None:
            if STAGES == 1:
                gain = _load_gain(gamma, cols, inside, ZERO_CENTERED)
                if beta is not None:
                    shift = _load_row(beta, cols, inside)
            value = (x - m[:, None]) * s[:, None] * gain
            if beta is not None:
                value += shift
            if amax is not None or scales is not None:
                value = tl.where((r < T - row0)[:, None] & inside[None, :], value, 0.0)
            if amax is not None:
                largest = tl.maximum(largest, amax_bits(value))
            if y is not None:
                value = value.to(y.dtype.element_ty) if scales is None else to_fp8(value * scale, y.dtype.element_ty)
                store_tile(y, K, row0, r, 0, cols, value, Tp, K)
                if yt is not None:
                    inside_t = inside[:, None] & (r < Tp - row0)[None, :]
                    tl.store(yt + cols[:, None] * Tp + (row0 + r)[None, :], tl.trans(value), inside_t)
    if amax is not None:
        tl.atomic_max(amax, tl.max(largest), sem="relaxed")


@triton.jit(do_not_specialize=["T"])
def _norm_backward_rows(args, gamma, mean, rstd, dx, partial, T, K,
                        RMS: tl.constexpr, ZERO_CENTERED: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
                        STAGES: tl.constexpr):  # fmt: skip
    """dx, and this program's sums for dgamma (and dbeta) in partial f32 [1 or 2, programs, K].

    args: (dy, its row stride, x, its row stride, dresidual or None, its row stride).
    """
    dy, dy_stride, x, stride, dresidual, dresidual_stride = args
    r, cols = tl.arange(0, R), tl.arange(0, BK)
    inside = cols < K
    gain = _load_gain(gamma, cols, inside, ZERO_CENTERED)
    dgamma = tl.zeros([R, BK], tl.float32)
    dbeta = tl.zeros([R, BK], tl.float32)
    for row0 in tl.range(tl.program_id(0) * R, T, tl.num_programs(0) * R, num_stages=STAGES):
        valid = r < T - row0
        m = tl.load(mean + row0 + r, valid, 0.0)[:, None]
        s = tl.load(rstd + row0 + r, valid, 0.0)[:, None]
        dy_tile = load_tile(dy, dy_stride, row0, r, cols, T, K)
        x_hat = tl.where(inside[None, :], (load_tile(x, stride, row0, r, cols, T, K) - m) * s, 0.0)
        dgamma += dy_tile * x_hat
        dx_hat = dy_tile * gain
        value = dx_hat - x_hat * (tl.sum(dx_hat * x_hat, 1) / K)[:, None]
        if not RMS:
            dbeta += dy_tile
            value -= (tl.sum(dx_hat, 1) / K)[:, None]
        value *= s
        if dresidual is not None:
            value += load_tile(dresidual, dresidual_stride, row0, r, cols, T, K)
        store_tile(dx, K, row0, r, 0, cols, value.to(dx.dtype.element_ty), T, K)
    own = partial + tl.program_id(0).to(tl.int64) * K + cols
    tl.store(own, tl.sum(dgamma, 0), inside)
    if not RMS:
        tl.store(own + tl.num_programs(0).to(tl.int64) * K, tl.sum(dbeta, 0), inside)


_WALKING_WARPS = 16  # per SM: enough loads in flight, few enough partial sums
_SHARED_MEMORY = 200 << 10  # bytes of an SM that rows on their way may take


class _Rows(NamedTuple):
    """How a row kernel is launched: R rows and BK columns to a tile, warps, programs, and how many tiles ahead it loads."""

    height: int
    width: int
    warps: int
    programs: int
    stages: int


@functools.cache
def _row_shape(cols: int, elements: int) -> tuple[int, int, int]:
    """(R, BK, warps) with so many elements to a thread, but four warps at least, which short rows share."""
    width = max(triton.next_power_of_2(cols), 16)
    height = max(elements * 128 // width, 1)
    return height, width, min(max(height * width // elements // 32, 4), 32)


@functools.lru_cache(MOST_HELD)
def _few_rows(rows: int, cols: int, device: torch.device, sm_margin: int) -> _Rows:
    """A program to each tile: nothing is loaded ahead, other programs hide the latency."""
    height, width, warps = _row_shape(cols, 64 if cols > 4096 else 32)
    programs = max(-(-rows // height), 1)
    if sm_margin:
        programs = min(programs, max(sm_count(device) - sm_margin, 1) * max(32 // warps, 1))
    return _Rows(height, width, warps, programs, 1)


_NARROW = 1024
"""Columns of rows of which a program holds enough for the transposed copy too."""
_FEW_ELEMENTS = 2**20
"""Of a norm so small that a launch saved counts for more than how its transposed copy is stored, byte by byte."""


@functools.lru_cache(MOST_HELD)
def _narrow_rows(rows: int, cols: int) -> _Rows:
    """A program to each tile of 16 rows or more."""
    width = max(triton.next_power_of_2(cols), 128)
    height = 16 * _NARROW // width
    return _Rows(height, width, 8, max(-(-rows // height), 1), 1)


@functools.lru_cache(MOST_HELD)
def _walking(rows: int, cols: int, device: torch.device, sm_margin: int, itemsize: int) -> _Rows:
    """Few programs that walk over all rows and load the next ones meanwhile. itemsize: bytes of an element of all inputs."""
    height, width, warps = _row_shape(cols, 16)
    per_sm = max(_WALKING_WARPS // warps, 1)
    programs = min(max(sm_count(device) - sm_margin, 1) * per_sm, max(-(-rows // height), 1))
    row_bytes = height * width * itemsize
    return _Rows(height, width, warps, programs, max(min(_SHARED_MEMORY // (per_sm * row_bytes), 3), 1))


def _walks(cols: int, dropout: bool, sums: bool, amax: bool, fp8: bool) -> bool:
    """Whether programs of the forward walk, as measured: where a row costs more than loading, its statistics and plain stores.

    sums: the rows are sums to be stored, and the norm is not. Wider rows leave no registers for more than themselves.
    """
    return cols <= 8192 and (dropout or sums or amax or fp8)


_CLUSTER_COLS = 2048  # narrower rows are not worth a cluster, nor the import


@functools.cache
def _cluster() -> ModuleType | None:
    """kernels.norm_cluster, where there is what it is written for: a Hopper GPU and quack-kernels."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return None
    try:
        from overdrive.kernels import norm_cluster
    except Exception:  # whatever a compiler package may raise where its libraries do not fit
        return None
    return norm_cluster


def forward(
    source: Callable[..., Any],
    args: tuple[Any, ...],
    flag: Any,
    itemsize: int,
    out: torch.Tensor | None,
    like: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor | None,
    eps: float,
    zero_centered: bool,
    rms: bool,
    sm_margin: int,
    q: Quantization,
    addends: tuple[torch.Tensor, torch.Tensor | None] | None = None,
) -> tuple[Quantized, torch.Tensor, torch.Tensor]:
    """Norm of the rows of a source, which are `like` or get stored in `out`: (Quantized, mean, rstd).

    flag: of the source, true if it has dropout. itemsize: bytes of an element of all that it reads. addends: what the rows are the
    sum of, where they are no more than that.
    """
    both = q.mode == Mode.DELAYED and q.row and q.col and not sm_margin
    if addends is not None and both and like.shape[1] >= _CLUSTER_COLS and (cluster := _cluster()):
        served = cluster.norm_quantized(*addends, out, gamma, beta, eps, zero_centered, rms, q)
        if served is not None:
            return served
    rows, cols = like.shape
    mean, rstd = like.new_empty(rows, dtype=torch.float32), like.new_empty(rows, dtype=torch.float32)
    narrow = both and cols <= _NARROW and rows * cols <= _FEW_ELEMENTS
    fp8 = q.mode == Mode.DELAYED and q.row and (narrow or not q.col)
    written = new_quantized(like, rows, cols, q) if fp8 or q.mode == Mode.PLAIN else None
    y, yt = (None, None) if written is None else written[:2]
    stored_rows, recording = padded(rows) if fp8 else rows, fp8 and q.tenant >= 0 and rows > 0
    amax = new_amax(like) if q.mode == Mode.CURRENT else arena(like.device).amax_bits if recording else None
    walks = _walks(cols, bool(flag), out is not None and y is None, amax is not None, fp8)
    case = (stored_rows, cols, like.device, sm_margin)
    shape = _narrow_rows(stored_rows, cols) if narrow else _walking(*case, itemsize) if walks else _few_rows(*case)
    if rows or fp8:
        delayed = (written.scale_inv, q.scales, q.slots) if written is not None and fp8 else (None, None, None)
        launch(
            _norm_rows, (shape.programs, 1, 1), like.get_device(),
            (args, out, y, yt, mean, rstd, gamma, beta, *delayed, q.slot, amax, arena(like.device).owner if recording else None,
             q.tenant, rows, stored_rows, cols, eps),
            (source, flag, rms, zero_centered, shape.height, shape.width, shape.stages), shape.warps,
        )  # fmt: skip
    if written is not None:
        return written, mean, rstd
    x = like if out is None else out
    tile_args = (x, x.stride(0), mean, rstd, gamma, beta)
    return run_tiles(_norm_source, tile_args, zero_centered, x, (rows, cols), q, amax=amax)[0], mean, rstd


def norm(
    x: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor | None,
    eps: float,
    zero_centered: bool,
    rms: bool,
    sm_margin: int,
    *tail,
) -> tuple[torch.Tensor, ...]:
    """overdrive::norm."""
    x, gamma, beta = dense(x), dense(gamma), None if beta is None else dense(beta)
    of_rows = (load_source, (x, x.stride(0)), None, x.itemsize, None, x)
    how = (gamma, beta, eps, zero_centered, rms, sm_margin, Quantization(*tail))
    out, mean, rstd = forward(*of_rows, *how, (x, None))
    return (*out, mean, rstd)


def norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    gamma: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dresidual: torch.Tensor | None,
    zero_centered: bool,
    rms: bool,
    sm_margin: int,
) -> tuple[torch.Tensor, ...]:
    """overdrive::norm_backward."""
    dy, x, gamma = dense(dy), dense(x), dense(gamma)
    dresidual = None if dresidual is None else dense(dresidual)
    rows, cols = x.shape
    dx, dgamma = x.new_empty(x.shape), gamma.new_empty(cols)
    dbeta = None if rms else gamma.new_empty(cols)
    itemsize = dy.itemsize + x.itemsize + (0 if dresidual is None else dresidual.itemsize)
    shape = _walking(rows, cols, x.device, sm_margin, itemsize)
    partial = x.new_empty((1 if rms else 2, shape.programs, cols), dtype=torch.float32)
    args = (dy, dy.stride(0), x, x.stride(0), dresidual, 0 if dresidual is None else dresidual.stride(0))
    launch(
        _norm_backward_rows, (shape.programs, 1, 1), x.get_device(),
        (args, gamma, mean, rstd, dx, partial, rows, cols),
        (rms, zero_centered, shape.height, shape.width, shape.stages), shape.warps,
    )  # fmt: skip
    column_sums(partial, dgamma, dbeta)
    return dx, dgamma, dbeta
