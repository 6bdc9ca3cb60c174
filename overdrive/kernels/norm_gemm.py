"""y = norm(x) w^T + b for few tokens: one kernel, bound by reading the weight.

Shapes: x [T, K]; gamma, beta [K]; weight [N, K]; bias [N]; y [T, N]. A program owns R tokens and BN rows of the weight. It takes
the statistics of its tokens itself, while the first tiles of the weight are on their way, and normalises them tile by tile on their
way to the tensor cores. The product is w x^T: rows of the weight fill the tensor core's long side, tokens need not.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from overdrive.kernels.launch import MOST_HELD, Launcher
from overdrive.kernels.norm import _load_gain, _load_row
from overdrive.kernels.tile import dense
from overdrive.ops.gemm import gemm
from overdrive.ops.norm import norm
from overdrive.ops.quantize import Mode, Quantization


@triton.jit
def _tile(x, stride, row0, r, cols, T, K):
    """x[row0 + r, cols] as it is, zero outside of [T, K]."""
    mask = (r < T - row0)[:, None] & (cols < K)[None, :]
    return tl.load(x + row0.to(tl.int64) * stride + (r[:, None] * stride + cols[None, :]), mask, 0.0)


@triton.jit
def _add(total, squares, tile, shift, inside, RMS: tl.constexpr, EVEN: tl.constexpr):
    value = tile.to(tl.float32)
    if not RMS:
        value -= shift
        if not EVEN:
            value = tl.where(inside[None, :], value, 0.0)
        total += value
    return total, squares + value * value


@triton.jit
def _statistics(heads, x, stride, row0, r, T, K, eps, RMS: tl.constexpr, BC: tl.constexpr, HEADS: tl.constexpr,
                EVEN: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """(mean, rstd) of rows row0 + r. heads: their first HEADS tiles of BC columns; WHOLE: all of them.

    Each column of tiles is summed around its first value: as near to its mean as needed for nothing to cancel.
    """
    c = tl.arange(0, BC)
    shift = heads[0].to(tl.float32)
    total = tl.zeros(shift.shape, tl.float32)
    squares = shift * shift if RMS else total
    for i in tl.static_range(1, HEADS):
        total, squares = _add(total, squares, heads[i], shift, c < K - i * BC, RMS, EVEN)
    if not WHOLE:
        for first in tl.range(HEADS * BC, K, BC, num_stages=1, loop_unroll_factor=4):
            total, squares = _add(total, squares, _tile(x, stride, row0, r, first + c, T, K), shift, c < K - first, RMS, EVEN)
    if RMS:
        mean = tl.zeros([shift.shape[0]], tl.float32)
    else:
        count = tl.maximum(tl.cdiv(K - c, BC), 0).to(tl.float32)[None, :]
        mean = tl.sum(total + shift * count, 1) / K
        away = shift - mean[:, None]
        squares += away * (2 * total + away * count)
    return mean, tl.rsqrt(tl.sum(squares, 1) / K + eps)


@triton.jit
def _spread(column, BT: tl.constexpr):
    """[R] -> [BT], each value repeated."""
    R: tl.constexpr = column.shape[0]
    return tl.broadcast_to(column[:, None], [R, BT // R]).reshape([BT])


@triton.jit(do_not_specialize=["T", "eps"])
def _norm_gemm(x, stride, gamma, beta, weight, weight_stride, bias, y, T, N, K, eps,
               RMS: tl.constexpr, ZERO_CENTERED: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr, R: tl.constexpr,
               BT: tl.constexpr, BC: tl.constexpr, HEADS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
               STAGES: tl.constexpr):  # fmt: skip
    """EVEN: K is a multiple of BK and BC. WHOLE: K is at most HEADS * BC."""
    strips = tl.cdiv(N, BN)
    row0, n0 = tl.program_id(0) // strips * R, tl.program_id(0) % strips * BN
    n, c, r = tl.arange(0, BN), tl.arange(0, BK), tl.arange(0, R)
    # row i of the tile is token i // spread, the rows between are empty
    spread: tl.constexpr = BT // R
    i = tl.arange(0, BT)
    token = row0 + i // spread
    valid = (token < T) & (i % spread == 0)
    rows = x + token.to(tl.int64)[:, None] * stride + c[None, :]
    strip = weight + n0.to(tl.int64) * weight_stride + (n[:, None] * weight_stride + c[None, :])

    heads = ()
    for h in tl.static_range(HEADS):
        heads = heads + (_tile(x, stride, row0, r, h * BC + tl.arange(0, BC), T, K),)  # noqa: RUF005, Triton does not unpack
    mean, rstd = tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float32)
    acc = tl.zeros([BN, BT], tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        if k == 0:  # in the loop, for the copies that it keeps in flight to have begun
            m, s = _statistics(heads, x, stride, row0, r, T, K, eps, RMS, BC, HEADS, EVEN, WHOLE)
            mean, rstd = _spread(m, BT), _spread(s, BT)
        inside = tl.full([BK], True, tl.int1) if EVEN else c < K - k
        value = tl.load(rows + k, valid[:, None] & inside[None, :], 0.0).to(tl.float32)
        value = (value - mean[:, None]) * rstd[:, None] * _load_gain(gamma, k + c, inside, ZERO_CENTERED)
        if beta is not None:
            value += _load_row(beta, k + c, inside)
        if not EVEN:
            value = tl.where(inside[None, :], value, 0.0)
        w = tl.load(strip + k, (n < N - n0)[:, None] & inside[None, :], 0.0)
        acc = tl.dot(w, tl.trans(value.to(w.dtype)), acc)
    out = tl.trans(acc)
    columns = n0 + n
    if bias is not None:
        out += tl.load(bias + columns, columns < N, 0.0).to(tl.float32)[None, :]
    mask = valid[:, None] & (columns < N)[None, :]
    tl.store(y + token.to(tl.int64)[:, None] * N + columns[None, :], out.to(y.dtype.element_ty), mask)


@functools.cache
def _gpu(device: torch.device) -> tuple[int, int]:
    """(SMs, bytes of shared memory that a program may have)."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


# (BK, STAGES, warps) for BN rows of the weight, the best of those measured. BK is not 32 * warps: Triton makes asynchronous copies
# of gamma and beta 4 bytes wide or more.
_TILES = {32: (256, 4, 4), 64: (256, 4, 4), 128: (128, 4, 8), 256: (128, 3, 8)}
_HELD = 256  # elements of x that a thread holds from before the loop
_MOST_TOKENS = 16


@functools.lru_cache(MOST_HELD)
def _plan(
    rows: int, cols: int, outputs: int, zero_centered: bool, rms: bool, device: torch.device
) -> tuple[tuple[int, int, int], Launcher]:
    """(grid, launcher): a strip of the weight for each SM, if that does not make them too narrow or too wide."""
    sms, shared = _gpu(device)
    strip = next((size for size in _TILES if outputs <= size * sms), max(_TILES))
    depth, stages, warps = _TILES[strip]
    tokens = min(triton.next_power_of_2(rows), _MOST_TOKENS)
    tile = max(tokens, 8)
    stages = max(min(stages, shared // (depth * (2 * (strip + tile) + 8))), 1)
    chunk = min(512 * warps // tokens, max(triton.next_power_of_2(cols), 16))
    heads = min(-(-cols // chunk), _HELD * 32 * warps // (tokens * chunk))
    even, whole = cols % depth == 0 and cols % chunk == 0, cols <= heads * chunk
    grid = (-(-rows // tokens) * -(-outputs // strip), 1, 1)
    return grid, Launcher(_norm_gemm, (rms, zero_centered, even, whole, tokens, tile, chunk, heads, strip, depth, stages), warps)


def norm_gemm(
    x: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    zero_centered: bool,
    rms: bool,
) -> torch.Tensor:
    """overdrive::norm_gemm."""
    if x.dtype == torch.float32:  # tensor cores would round it
        y, *_ = norm(x, gamma, beta, eps, zero_centered, rms, 0, *Quantization(Mode.PLAIN, x.dtype))
        return gemm(y, weight, None, None, bias, x.dtype, Mode.PLAIN, Mode.PLAIN, False)
    x, gamma, weight = dense(x), dense(gamma), dense(weight)
    beta, bias = None if beta is None else dense(beta), None if bias is None else dense(bias)
    (rows, cols), outputs = x.shape, weight.shape[0]
    y = x.new_empty((rows, outputs))
    if rows and outputs:
        grid, run = _plan(rows, cols, outputs, zero_centered, rms, x.device)
        run(
            grid, x.get_device(),
            (x, x.stride(0), gamma, beta, weight, weight.stride(0), bias, y, rows, outputs, cols, eps),
        )  # fmt: skip
    return y
