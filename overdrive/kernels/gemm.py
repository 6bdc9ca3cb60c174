"""Block-scaled GEMM for Hopper: a @ b.T + bias with 1x128 scales of a and 128x128 scales of b.

Shapes: a [M, K] and b [N, K] FP8, scale_a [M, B] with strides (1, M), scale_b [N / 128, at least B], B = K / 128 rounded up,
bias [N], out [M, N].

Persistent programs own tiles of BM x BN. Of a program's warps one copies blocks of both operands into a ring of shared memory, and
two warpgroups multiply half of the rows each, 64 at a time: one scales its product while the tensor cores run the other's. Triton's
language has no such roles for warps, and took 1.6 times as long; hence Gluon, the language below it.
"""

from __future__ import annotations

import contextlib

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from overdrive.kernels.launch import sm_count
from overdrive.ops.quantize import BLOCK

_async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # Triton 3.6

_BLOCK: gl.constexpr = gl.constexpr(BLOCK)


@gluon.jit
def _tile(index, tiles_m, tiles_n, GROUP: gl.constexpr):
    """(row, column) of a tile, column by column in bands of GROUP rows: neighbours in time share operands in L2."""
    band = GROUP * tiles_n
    first = index // band * GROUP
    height = min(tiles_m - first, GROUP)
    return first + index % band % height, index % band // height


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    """The ring's next stage, and which of its fillings."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def _copy(a, b, scale_a, ring, tiles_m, tiles_n, blocks, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
          GROUP: gl.constexpr):  # fmt: skip
    """The copying warp: fills each stage as soon as both warpgroups have read it."""
    a_ring, b_ring, scale_ring, full, empty = ring
    stage = 0
    phase = 1  # nothing to wait for the first time
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        m, n = _tile(tile, tiles_m, tiles_n, GROUP)
        for k in range(blocks):
            mbarrier.wait(empty.index(stage), phase)
            barrier = full.index(stage)
            mbarrier.expect(barrier, (BM + BN) * _BLOCK + BM * 4)
            _async_load(a, [m * BM, k * _BLOCK], barrier, a_ring.index(stage))
            _async_load(b, [n * BN, k * _BLOCK], barrier, b_ring.index(stage))
            _async_load(scale_a, [k, m * BM], barrier, scale_ring.index(stage))
            stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _multiply(a, b, registers):
    """a [64, 128] @ b [128, BN] from shared memory, in f32; `registers`: what the product may overwrite."""
    product = warpgroup_mma(a, b, registers, use_acc=False, is_async=True)
    return warpgroup_mma_wait(0, deps=(product,))


@gluon.jit
def _add_scaled(total, product, scale):
    """total + product * scale, before the next product: in any other order there are two products, and registers spill."""
    return gl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [product, scale[:, None], total], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def _store(out, stride, bias, total, row0, col0, M, N, BN: gl.constexpr, LAYOUT: gl.constexpr):
    if bias is not None:
        c = col0 + gl.arange(0, BN, gl.SliceLayout(0, LAYOUT))
        total += gl.load(bias + c, c < N, 0.0).to(gl.float32)[None, :]
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    value = gl.convert_layout(total.to(out.dtype.element_ty), ROWS)
    r = row0 + gl.arange(0, 64, gl.SliceLayout(1, ROWS))
    c = col0 + gl.arange(0, BN, gl.SliceLayout(0, ROWS))
    gl.store(out + r[:, None].to(gl.int64) * stride + c[None, :], value, (r < M)[:, None] & (c < N)[None, :])


@gluon.jit
def _consume(output, ring, blocks, HALF: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
             GROUP: gl.constexpr):  # fmt: skip
    """A warpgroup: rows 128 HALF .. 128 HALF + 127 of each tile."""
    out, stride, scale_b, scale_b_stride, bias, M, N, tiles_m, tiles_n = output
    a_ring, b_ring, scale_ring, full, empty = ring
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    UPPER: gl.constexpr = HALF * 128
    LOWER: gl.constexpr = UPPER + 64
    zero = gl.zeros([64, BN], gl.float32, LAYOUT)
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        m, n = _tile(tile, tiles_m, tiles_n, GROUP)
        upper = zero
        lower = zero
        for k in range(blocks):
            mbarrier.wait(full.index(stage), phase)
            a, b = a_ring.index(stage), b_ring.index(stage).permute((1, 0))
            scale_a = scale_ring.index(stage).reshape([BM])
            scale = gl.load(scale_b + n * scale_b_stride + k)
            rows = scale_a.slice(UPPER, 64).load(gl.SliceLayout(1, LAYOUT))
            product = _multiply(a.slice(UPPER, 64), b, zero)
            upper = _add_scaled(upper, product, rows * scale)
            rows = scale_a.slice(LOWER, 64).load(gl.SliceLayout(1, LAYOUT))
            product = _multiply(a.slice(LOWER, 64), b, product)
            mbarrier.arrive(empty.index(stage), count=1)
            lower = _add_scaled(lower, product, rows * scale)
            stage, phase = _next(stage, phase, STAGES)
        _store(out, stride, bias, upper, m * BM + UPPER, n * BN, M, N, BN, LAYOUT)
        _store(out, stride, bias, lower, m * BM + LOWER, n * BN, M, N, BN, LAYOUT)


@gluon.jit
def _block_gemm(a, b, scale_a, scale_b, scale_b_stride, bias, out, stride, M, N, blocks, BM: gl.constexpr, BN: gl.constexpr,
                STAGES: gl.constexpr, GROUP: gl.constexpr):  # fmt: skip
    tiles_m, tiles_n = gl.cdiv(M, BM), gl.cdiv(N, BN)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    ring = (
        gl.allocate_shared_memory(a.dtype, [STAGES, BM, _BLOCK], a.layout),
        gl.allocate_shared_memory(b.dtype, [STAGES, BN, _BLOCK], b.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, 1, BM], scale_a.layout),
        full,
        empty,
    )
    output = (out, stride, scale_b, scale_b_stride, bias, M, N, tiles_m, tiles_n)
    gl.warp_specialize(
        [
            (_consume, (output, ring, blocks, 0, BM, BN, STAGES, GROUP)),
            (_consume, (output, ring, blocks, 1, BM, BN, STAGES, GROUP)),
            (_copy, (a, b, scale_a, ring, tiles_m, tiles_n, blocks, BM, BN, STAGES, GROUP)),
        ],
        [4, 1],
        [232, 40],
    )


_TILE = (256, 128)
_STAGES, _GROUP = 3, 8


def _descriptor(x: torch.Tensor, rows: int, cols: int) -> TensorDescriptor:
    """Blocks of rows x cols of x; FP8 in the order of bytes that the tensor cores read."""
    bits = x.element_size() * 8
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128 if bits == 8 else 0, element_bitwidth=bits, rank=2)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, cols], layout)


def block_gemm(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """a @ b.T + bias in `dtype`, shapes as above. M a multiple of 4, K of 16."""
    (rows, k), cols, (height, width) = a.shape, b.shape[0], _TILE
    out = a.new_empty((rows, cols), dtype=dtype)
    operands = (_descriptor(a, height, BLOCK), _descriptor(b, width, BLOCK), _descriptor(scale_a.t(), 1, height))
    device = a.get_device()
    tiles = -(-rows // height) * -(-cols // width)
    programs = min(tiles, sm_count(a.device))
    with contextlib.nullcontext() if device == torch.cuda.current_device() else torch.cuda.device(device):
        _block_gemm[programs,](
            *operands, scale_b, scale_b.stride(0), bias, out, out.stride(0), rows, cols, -(-k // BLOCK), *_TILE, _STAGES, _GROUP,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out
