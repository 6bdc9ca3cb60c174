"""GEMMs for products so small that the host decides: a @ b.T + bias + addend with one scale an operand, scales of blocks, or none;
and two of them, which share nothing but the launch.

Shapes: a [M, K], b [N, K], bias [N], addend and out [M, N]. cuBLASLt looks for an algorithm at each call; here a plan keeps one.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from overdrive.kernels.launch import MOST_HELD, Launcher, sm_count
from overdrive.kernels.tile import BLOCK_1D, BLOCK_2D, PLAIN
from overdrive.ops.quantize import BLOCK, Mode


@triton.jit
def _load_scales(scale, stride, index, k, size, MODE: tl.constexpr):
    """Of rows `index` of an operand, at block k of the contraction: layouts of ops.quantize.Quantized."""
    if MODE == BLOCK_1D:
        return tl.load(scale + k * stride + index, index < size, 0.0)
    else:
        return tl.load(scale + index // 128 * stride + k, index < size, 0.0)


@triton.jit
def _tile(tile, a, b, a_row, a_col, b_row, b_col, scale_a, scale_b, scale_strides, bias, addend, out, sizes, KIND: tl.constexpr):
    """One tile of out. sizes: M, N, K. KIND: as `_kind` has it."""
    M, N, K = sizes
    MODE_A: tl.constexpr = KIND[0]
    MODE_B: tl.constexpr = KIND[1]
    IMPRECISE: tl.constexpr = KIND[2]
    BM: tl.constexpr = KIND[3]
    BN: tl.constexpr = KIND[4]
    BK: tl.constexpr = KIND[5]
    BLOCKS: tl.constexpr = MODE_A == BLOCK_1D or MODE_A == BLOCK_2D
    tiles_n = tl.cdiv(N, BN)
    rows, cols = tile // tiles_n * BM + tl.arange(0, BM), tile % tiles_n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    a_tiles = a + rows[:, None] * a_row + k[None, :] * a_col
    b_tiles = b + k[:, None] * b_col + cols[None, :] * b_row
    total = tl.zeros([BM, BN], tl.float32)
    for i in tl.range(tl.cdiv(K, BK), num_stages=4):
        rest = K - i * BK
        a_tile = tl.load(a_tiles + i * BK * a_col, (rows < M)[:, None] & (k < rest)[None, :], 0.0)
        b_tile = tl.load(b_tiles + i * BK * b_col, (cols < N)[None, :] & (k < rest)[:, None], 0.0)
        if BLOCKS:
            row_scales = _load_scales(scale_a, scale_strides[0], rows, i, M, MODE_A)
            col_scales = _load_scales(scale_b, scale_strides[1], cols, i, N, MODE_B)
            total += tl.dot(a_tile, b_tile) * (row_scales[:, None] * col_scales[None, :])
        else:
            total = tl.dot(a_tile, b_tile, total, max_num_imprecise_acc=IMPRECISE)
    if MODE_A != PLAIN and not BLOCKS:
        total *= tl.load(scale_a) * tl.load(scale_b)
    if bias is not None:
        total += tl.load(bias + cols, cols < N, 0.0).to(tl.float32)[None, :]
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    at = rows[:, None] * N + cols[None, :]
    if addend is not None:  # rounded before, as a sum apart would be
        total = total.to(out.dtype.element_ty).to(tl.float32) + tl.load(addend + at, mask, 0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask)


@triton.jit
def _small_gemm(a, b, a_row, a_col, b_row, b_col, scale_a, scale_b, bias, addend, out, scale_strides, sizes, KIND: tl.constexpr):
    _tile(tl.program_id(0), a, b, a_row, a_col, b_row, b_col, scale_a, scale_b, scale_strides, bias, addend, out, sizes, KIND)


@triton.jit
def _small_gemms(a, b, a_row, a_col, b_row, b_col, scale_a, scale_b, c, d, c_row, c_col, d_row, d_col, scale_c, scale_d, ab, cd,
                 ab_scale_strides, cd_scale_strides, ab_sizes, cd_sizes, tiles, AB: tl.constexpr, CD: tl.constexpr):  # fmt: skip
    """Two products, of which the first has so many tiles."""
    pid = tl.program_id(0)
    if pid < tiles:
        _tile(pid, a, b, a_row, a_col, b_row, b_col, scale_a, scale_b, ab_scale_strides, None, None, ab, ab_sizes, AB)
    else:
        _tile(pid - tiles, c, d, c_row, c_col, d_row, d_col, scale_c, scale_d, cd_scale_strides, None, None, cd, cd_sizes, CD)


def _kind(m: int, n: int, mode_a: int, mode_b: int, fast: bool, like: torch.Tensor) -> tuple[tuple[int | None, ...], int]:
    """((modes, over how many FP8 products the tensor cores may sum by themselves, tile), tiles), the best of those measured."""
    sms, fp8, rows = sm_count(like.device), mode_a != Mode.PLAIN, -(-m // 64)
    width = next((width for width in (32, 64) if rows * -(-n // width) <= 2 * sms), 128)
    imprecise = BLOCK if fp8 and not fast else None  # None: all
    # one scale a tensor is the same to a product however it came about
    modes = (int(Mode.CURRENT if mode == Mode.DELAYED else mode) for mode in (mode_a, mode_b))
    return (*modes, imprecise, 64, width, BLOCK if fp8 else BLOCK // 2), rows * -(-n // width)


_FAR = 2**30
"""Elements: the kernel's offsets have 32 bits, and views may have strides of any size."""


def _operands(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor | None, scale_b: torch.Tensor | None, mode_a: int, mode_b: int
) -> tuple[tuple[Any, ...], tuple[int, int]]:
    """((a, b, their strides, their scales) as the kernel can read them, the strides of the scales)."""
    if mode_a == Mode.PLAIN:
        (m, k), n = a.shape, b.shape[0]
        if max(m * a.stride(0), k * a.stride(1), n * b.stride(0), k * b.stride(1)) >= _FAR:
            a, b = a.contiguous(), b.contiguous()
    strides = (0, 0)
    if mode_a >= Mode.BLOCK_1D:
        (scale_a, stride_a), (scale_b, stride_b) = _block_scales(scale_a, mode_a), _block_scales(scale_b, mode_b)
        strides = (stride_a, stride_b)
    return (a, b, *a.stride(), *b.stride(), scale_a, scale_b), strides


def _block_scales(scale: torch.Tensor | None, mode: int) -> tuple[torch.Tensor, int]:
    """(scales as ops.quantize.Quantized has them, how far from one block of the contraction, or row of blocks, to the next)."""
    assert scale is not None
    if mode == Mode.BLOCK_2D:
        return scale, scale.stride(0)
    if scale.stride(0) != 1:  # 1x128 blocks that were cut out of 128x128 ones
        scale = scale.t().contiguous().t()
    return scale, scale.stride(1)


_plans: dict[tuple[Any, ...], tuple[Launcher, tuple[int, int, int], int]] = {}


def _plan(
    key: tuple[Any, ...], kernel: Any, *kinds: tuple[tuple[int | None, ...], int]
) -> tuple[Launcher, tuple[int, int, int], int]:
    """(launcher, grid, tiles of the first product)."""
    if len(_plans) >= MOST_HELD:
        _plans.clear()
    launcher = Launcher(kernel, tuple(kind for kind, _ in kinds), 4)
    plan = _plans[key] = (launcher, (sum(tiles for _, tiles in kinds), 1, 1), kinds[0][1])
    return plan


def small_gemm(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor | None, scale_b: torch.Tensor | None, bias: torch.Tensor | None,
    dtype: torch.dtype, mode_a: int, mode_b: int, fast: bool, addend: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """overdrive::gemm."""
    m, (n, k) = a.shape[0], b.shape
    key = (a.dtype, dtype, m, n, k, mode_a, mode_b, fast)
    plan = _plans.get(key)
    if plan is None:
        plan = _plan(key, _small_gemm, _kind(m, n, mode_a, mode_b, fast, a))
    out = a.new_empty((m, n), dtype=dtype)
    if addend is not None:
        addend = addend.contiguous()
    operands, strides = _operands(a, b, scale_a, scale_b, mode_a, mode_b)
    plan[0](plan[1], a.get_device(), (*operands, bias, addend), (out, strides, (m, n, k)))
    return out


def small_gemms(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor | None, scale_b: torch.Tensor | None, c: torch.Tensor, d: torch.Tensor,
    scale_c: torch.Tensor | None, scale_d: torch.Tensor | None, dtype: torch.dtype, mode_a: int, mode_b: int, mode_c: int,
    mode_d: int, fast_ab: bool, fast_cd: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """overdrive::gemms."""
    (m, k), n, (rows, depth), cols = a.shape, b.shape[0], c.shape, d.shape[0]
    key = (a.dtype, c.dtype, dtype, m, n, k, rows, cols, depth, mode_a, mode_b, mode_c, mode_d, fast_ab, fast_cd)
    plan = _plans.get(key)
    if plan is None:
        kinds = _kind(m, n, mode_a, mode_b, fast_ab, a), _kind(rows, cols, mode_c, mode_d, fast_cd, a)
        plan = _plan(key, _small_gemms, *kinds)
    ab, cd = a.new_empty((m, n), dtype=dtype), c.new_empty((rows, cols), dtype=dtype)
    of_ab, ab_strides = _operands(a, b, scale_a, scale_b, mode_a, mode_b)
    of_cd, cd_strides = _operands(c, d, scale_c, scale_d, mode_c, mode_d)
    tail = (ab, cd, ab_strides, cd_strides, (m, n, k), (rows, cols, depth), plan[2])
    plan[0](plan[1], a.get_device(), (*of_ab, *of_cd), tail)
    return ab, cd
