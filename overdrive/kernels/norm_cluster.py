"""LayerNorm and RMSNorm to FP8 in both layouts, in one launch that reads x once: for Hopper, in the CuTe DSL that quack-kernels
(Apache-2.0) builds on.

Shapes: x, residual, total [T, K]. 32 whole rows, which make 32 bytes of each column of the transposed copy, a whole sector, are
more than one multiprocessor holds. A cluster of blocks owns them, each block some of the columns, in registers; the blocks tell
each other the mean and the sum of squares of their part of every row through distributed shared memory. Of the 32 rows and 128
columns of a warp a thread holds four times 4 rows and 8 columns: it loads 16 bytes of a row, stores 8 of a row and 4 of a column.
"""

from __future__ import annotations

import hashlib
import pathlib
import warnings
from typing import Any

import torch

with warnings.catch_warnings():  # of names that have moved in the package's own dependencies
    warnings.simplefilter("ignore")
    import cuda.bindings.driver as cuda
    import cutlass
    import cutlass.cute as cute
    from cutlass import BFloat16, Float32, Int32, Int64, const_expr
    from quack.cache import jit_cache
    from quack.compile_utils import make_fake_stream, make_fake_tensor
    from quack.cute_dsl_utils import torch2cute_dtype_map
    from quack.utils import store_shared_remote_x4

from overdrive.ops.quantize import Quantization, Quantized, new_quantized
from overdrive.ops.scaling import arena

ROWS = 32
_WARP_COLS = 128
_MOST_COLS, _BEST_COLS = 1024, 512  # of a block
_REGISTERS = 128  # of a thread, half of which hold x
_MAGNITUDE = 0x7FFFFFFF  # all bits of an f32 but its sign
_SOURCE = hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest()
"""Part of the key under which quack keeps compiled kernels on disk."""


def cluster_size(cols: int) -> int:
    """How many blocks share rows of so many columns, each a whole number of warps; 0 if none can."""
    possible = [n for n in (2, 4, 8) if cols <= n * _MOST_COLS and cols % (n * _WARP_COLS) == 0]
    return next((n for n in possible if cols <= n * _BEST_COLS), max(possible, default=0))


class _NormQuantized:
    """The kernel for rows of `cols` elements, quantized to `dtype`."""

    def __init__(self, cols: int, dtype: Any, rms: bool, zero_centered: bool) -> None:
        self.cols, self.dtype, self.rms, self.zero_centered = cols, dtype, rms, zero_centered
        self.blocks = cluster_size(cols)
        self.block_cols = cols // self.blocks
        self.warps = self.block_cols // _WARP_COLS
        self.sums = 1 if rms else 2

    @cute.jit
    def __call__(
        self, x: cute.Tensor, residual: cute.Tensor | None, total: cute.Tensor | None, gamma: cute.Tensor, beta: cute.Tensor | None,
        scales: cute.Tensor, slots: cute.Tensor, data: cute.Tensor, data_t: cute.Tensor, inverse: cute.Tensor, mean: cute.Tensor,
        rstd: cute.Tensor, amax: cute.Tensor | None, owner: cute.Tensor | None, slot: Int32, tenant: Int32, eps: Float32,
        stream: cuda.CUstream,
    ):  # fmt: skip
        rows = (x, residual, total, gamma, beta)
        self.kernel(*rows, scales, slots, data, data_t, inverse, mean, rstd, amax, owner, slot, tenant, eps).launch(
            grid=[x.shape[0] // ROWS * self.blocks, 1, 1],
            block=[self.warps * 32, 1, 1],
            cluster=[self.blocks, 1, 1],
            min_blocks_per_mp=(1 << 16) // (self.warps * 32 * _REGISTERS),
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self, x: cute.Tensor, residual: cute.Tensor | None, total: cute.Tensor | None, gamma: cute.Tensor, beta: cute.Tensor | None,
        scales: cute.Tensor, slots: cute.Tensor, data: cute.Tensor, data_t: cute.Tensor, inverse: cute.Tensor, mean: cute.Tensor,
        rstd: cute.Tensor, amax: cute.Tensor | None, owner: cute.Tensor | None, slot: Int32, tenant: Int32, eps: Float32,
    ):  # fmt: skip
        tid, block = cute.arch.thread_idx()[0], cute.arch.block_idx()[0]
        warp, lane = cute.arch.make_warp_uniform(cute.arch.warp_idx()), cute.arch.lane_idx()
        rank, row0 = block % self.blocks, block // self.blocks * ROWS
        row, col = lane // 4 * 4, warp * _WARP_COLS + lane % 4 * 8  # of this thread's first element in the block

        smem = cutlass.utils.SmemAllocator()
        all_gains = smem.allocate_tensor(Float32, cute.make_layout(self.block_cols), 16)
        all_shifts = smem.allocate_tensor(Float32, cute.make_layout(self.block_cols), 16)
        of_warps = smem.allocate_tensor(Float32, cute.make_layout((ROWS, self.warps, 2)), 16)
        of_blocks = smem.allocate_tensor(Float32, cute.make_layout((ROWS, self.sums, self.blocks)), 16)
        amaxes = smem.allocate_tensor(Int32, cute.make_layout(self.warps), 16)
        arrived = smem.allocate_array(Int64, 1)
        index = slots[slot]
        first_col = rank * self.block_cols + col
        corner = (Int64(row0) + row) * self.cols + first_col
        layout = cute.make_layout(((4, 2), 4, 4), stride=((1, 4), self.cols, 32))  # columns, rows, and times
        held = cute.make_rmem_tensor(cute.make_layout(((4, 2), 4, 4)), x.element_type)
        cute.autovec_copy(_at(x, corner, 16, layout), held)
        if const_expr(residual is not None):
            addend = cute.make_rmem_tensor_like(held[None, None, 0])
            for g in cutlass.range_constexpr(4):
                cute.autovec_copy(_at(residual, corner, 16, layout)[None, None, g], addend)
                for r in cutlass.range_constexpr(4):
                    held[None, r, g].store((_load(held[None, r, g]) + _load(addend[None, r])).to(x.element_type))
            cute.autovec_copy(held, _at(total, corner, 16, layout))
        gains, shifts = cute.make_rmem_tensor(4, Float32), cute.make_rmem_tensor(4, Float32)
        part = cute.make_layout(4, stride=self.warps * 32)  # of the block's columns, a fourth at a time
        gains.store(_at(gamma, rank * self.block_cols + tid, None, part).load().to(Float32))
        if const_expr(beta is not None):
            shifts.store(_at(beta, rank * self.block_cols + tid, None, part).load().to(Float32))
        if tid == 0:  # not before the loads: the compiler would put the last of them behind uses of the first
            cute.arch.mbarrier_init(arrived, 1)
            cute.arch.mbarrier_arrive_and_expect_tx(arrived, cute.size(of_blocks) * 4)
        cute.arch.mbarrier_init_fence()
        cute.arch.cluster_arrive_relaxed()
        scale = scales[index]
        _at(all_gains, tid, None, part).store(gains.load() + 1.0 if const_expr(self.zero_centered) else gains.load())
        if const_expr(beta is not None):
            _at(all_shifts, tid, None, part).store(shifts.load())

        means, squares = cute.make_rmem_tensor(4, Float32), cute.make_rmem_tensor(4, Float32)
        means.fill(0.0)
        squares.fill(0.0)
        if const_expr(not self.rms):
            for g in cutlass.range_constexpr(4):
                for r in cutlass.range_constexpr(4):
                    means[r] += _load(held[None, r, g]).reduce(cute.ReductionOp.ADD, 0.0, 0)
            self._sum_warps(means, of_warps[None, None, 0], warp, lane)
            means.store(means.load() * (1 / self.block_cols))
            held = _anew(held)
        for g in cutlass.range_constexpr(4):
            for r in cutlass.range_constexpr(4):
                centered = _load(held[None, r, g]) - means[r]
                squares[r] += (centered * centered).reduce(cute.ReductionOp.ADD, 0.0, 0)
        self._sum_warps(squares, of_warps[None, None, 1], warp, lane)
        self._exchange(means, squares, of_blocks, arrived, warp, lane, rank)
        held = _anew(held)
        for r in cutlass.range_constexpr(4):
            squares[r] = cute.math.rsqrt(squares[r] * (1 / self.cols) + eps, fastmath=True)
        if rank == 0 and warp == 0 and lane % 4 == 0:
            for r in cutlass.range_constexpr(4):
                mean[row0 + row + r] = means[r]
                rstd[row0 + row + r] = squares[r]

        if block == 0 and tid == 0:
            inverse[0] = 1.0 / scale
            if const_expr(owner is not None):
                owner[index] = tenant

        largest = Float32(0.0)
        tokens = data_t.shape[1]
        rows_out = _at(data, corner, 8, layout)
        corner_t = Int64(first_col) * tokens + row0 + row
        columns_out = _at(data_t, corner_t, 4, cute.make_layout((4, 8, 4), stride=(1, tokens, 32 * tokens)))
        for g in cutlass.range_constexpr(4):
            rows = cute.make_rmem_tensor(cute.make_layout(((4, 2), 4)), self.dtype)
            for half in cutlass.range_constexpr(2):  # all 32 numbers at a time would not fit into registers
                at = col + g * 32 + half * 4
                cute.autovec_copy(_at(all_gains, at, 16, cute.make_layout(4)), gains)
                if const_expr(beta is not None):
                    cute.autovec_copy(_at(all_shifts, at, 16, cute.make_layout(4)), shifts)
                y = cute.make_rmem_tensor(cute.make_layout((4, 4)), Float32)  # columns, rows
                for r in cutlass.range_constexpr(4):
                    value = (_load(held[(None, half), r, g]) - means[r]) * squares[r]
                    value *= gains.load()
                    y[None, r].store(value + shifts.load() if const_expr(beta is not None) else value)
                if const_expr(amax is not None):
                    for i in cutlass.range_constexpr(16):
                        largest = cute.arch.fmax(largest, y[i], abs=True, nan=True)  # of magnitudes, under some sign
                y.store(y.load() * scale)
                for i in cutlass.range_constexpr(4):
                    cute.recast_tensor(rows, Int32)[(0, half), i] = _to_word(y[None, i], self.dtype)
                    cute.recast_tensor(columns_out, Int32)[0, half * 4 + i, g] = _to_word(y[i, None], self.dtype)
            cute.autovec_copy(rows, rows_out[None, None, g])
        if const_expr(amax is not None):
            bits = cute.arch.warp_redux_sync(largest.bitcast(Int32) & _MAGNITUDE, "max")  # as integers NaN is larger than all else
            if lane == 0:
                amaxes[warp] = bits
            cute.arch.sync_threads()
            if tid == 0:
                for i in cutlass.range_constexpr(1, self.warps):
                    bits = cutlass.max(bits, amaxes[i])
                cute.arch.atomic_max((amax.iterator + index).llvm_ptr, bits, sem="relaxed", scope="gpu")

    @cute.jit
    def _sum_warps(self, sums: cute.Tensor, of_warps: cute.Tensor, warp: Int32, lane: Int32):
        """A thread's sums of its 4 rows -> the block's."""
        row = lane // 4 * 4
        for r in cutlass.range_constexpr(4):
            for offset in (1, 2):
                sums[r] += cute.arch.shuffle_sync_bfly(sums[r], offset=offset)
        if lane % 4 == 0:
            cute.autovec_copy(sums, _at(of_warps, warp * ROWS + row, 16, cute.make_layout(4)))
        cute.arch.sync_threads()
        sums.fill(0.0)
        for i in cutlass.range_constexpr(self.warps):
            sums.store(sums.load() + _at(of_warps, i * ROWS + row, 16, cute.make_layout(4)).load())

    @cute.jit
    def _exchange(
        self, means: cute.Tensor, squares: cute.Tensor, of_blocks: cute.Tensor, arrived: cute.Pointer, warp: Int32, lane: Int32,
        rank: Int32,
    ):  # fmt: skip
        """The block's means and sums of squares around them, of a thread's 4 rows -> those of whole rows, the same in every block
        (Chan, Golub and LeVeque, The American Statistician 37, 1983)."""
        row, kind = lane // 4 * 4, lane % 4
        own = cute.make_rmem_tensor(4, Float32)
        own.store(squares.load())
        if const_expr(not self.rms):
            if kind == 0:
                own.store(means.load())
        cute.arch.cluster_wait()  # until all blocks have begun
        for i in cutlass.range_constexpr(-(-self.blocks // self.warps)):
            peer = i * self.warps + warp
            if peer < self.blocks and kind < self.sums:
                there = of_blocks.iterator + ((rank * self.sums + kind) * ROWS + row)
                store_shared_remote_x4(own[0], own[1], own[2], own[3], there, arrived, peer)
        cute.arch.mbarrier_wait(arrived, 0)
        parts = cute.make_layout((4, self.sums, self.blocks), stride=(1, ROWS, self.sums * ROWS))
        parts = _at(of_blocks, row, 16, parts)
        squares.store(parts[None, self.sums - 1, 0].load())
        if const_expr(not self.rms):
            means.store(parts[None, 0, 0].load())
        for i in cutlass.range_constexpr(1, self.blocks):
            total = squares.load() + parts[None, self.sums - 1, i].load()
            if const_expr(not self.rms):
                off = parts[None, 0, i].load() - means.load()
                total += off * off * (self.block_cols * i / (i + 1))
                means.store(means.load() + off * (1 / (i + 1)))
            squares.store(total)


def _at(tensor: cute.Tensor, offset: Any, alignment: int | None, layout: cute.Layout) -> cute.Tensor:
    """What begins `offset` elements into a tensor, at an address of this alignment (None: an element's)."""
    start = (tensor.iterator + offset).toint()
    return cute.make_tensor(cute.make_ptr(tensor.element_type, start, tensor.memspace, assumed_align=alignment), layout)


@cute.jit
def _load(x: cute.Tensor) -> cute.TensorSSA:
    """Elements in registers as f32; of bf16 each with one instruction, which the compiler's own conversion takes two for."""
    if const_expr(x.element_type is not BFloat16):
        return x.load().to(Float32)
    words, values = cute.recast_tensor(x, Int32), cute.make_rmem_tensor(cute.size(x), Int32)
    for i in cutlass.range_constexpr(cute.size(words)):
        values[2 * i] = words[i] << 16
        values[2 * i + 1] = words[i] & -0x10000
    return cute.recast_tensor(values, Float32).load()


@cute.jit
def _to_word(y: cute.Tensor, dtype: cutlass.Constexpr) -> Int32:
    """Four f32 as FP8, to nearest even, saturating, NaN kept: ops.quantize.saturating_cast."""
    quantized = cute.make_rmem_tensor(4, dtype)
    quantized.store(y.load().to(dtype))
    return cute.recast_tensor(quantized, Int32)[0]


@cute.jit
def _anew(held: cute.Tensor) -> cute.Tensor:
    """The same, of which the compiler does not know that it has it as f32 already: twice as many registers as there are."""
    words, anew = cute.recast_tensor(held, Int32), cute.make_rmem_tensor_like(held)
    for i in cutlass.range_constexpr(cute.size(words)):
        word = cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[words[i]])
        cute.recast_tensor(anew, Int32)[i] = word
    return anew


@jit_cache
def _compiled_norm_quantized(
    source: str, cols: int, x: torch.dtype, gamma: torch.dtype, beta: torch.dtype | None, data: torch.dtype, adds: bool,
    records: bool, rms: bool, zero_centered: bool,
) -> Any:  # fmt: skip
    x, gamma, beta, data = (None if dtype is None else torch2cute_dtype_map[dtype] for dtype in (x, gamma, beta, data))
    rows, record = cute.sym_int(divisibility=ROWS), Int32 if records else None
    addend = x if adds else None

    def vector(dtype: Any, size: Any = None) -> Any:
        return make_fake_tensor(dtype, (cute.sym_int() if size is None else size,))

    def matrix(dtype: Any, *shape: Any) -> Any:
        return dtype and cute.runtime.make_fake_compact_tensor(dtype, shape, stride_order=(1, 0), assumed_align=16)

    with warnings.catch_warnings():  # of its compiler
        warnings.simplefilter("ignore")
        return cute.compile(
            _NormQuantized(cols, data, rms, zero_centered), matrix(x, rows, cols), matrix(addend, rows, cols),
            matrix(addend, rows, cols), vector(gamma, cols), vector(beta, cols), vector(Float32), vector(Int32),
            matrix(data, rows, cols), matrix(data, cols, rows), vector(Float32), vector(Float32, rows), vector(Float32, rows),
            vector(record), vector(record), Int32(0), Int32(0), Float32(0), make_fake_stream(), options="--enable-tvm-ffi",
        )  # fmt: skip


_kernels: dict[tuple[Any, ...], Any] = {}


def _compile(key: tuple[Any, ...]) -> Any:
    try:
        return _compiled_norm_quantized(*key)
    except Exception as error:  # whatever a compiler package may raise in another version
        warnings.warn(
            f"{__name__} was not compiled, norms take two launches instead: {type(error).__name__}: {error}", stacklevel=2
        )
        return None


def norm_quantized(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    total: torch.Tensor | None,
    gamma: torch.Tensor,
    beta: torch.Tensor | None,
    eps: float,
    zero_centered: bool,
    rms: bool,
    q: Quantization,
) -> tuple[Quantized, torch.Tensor, torch.Tensor] | None:
    """kernels.norm.forward of x, or of `total` = x + residual, with delayed scaling in both layouts: (Quantized, mean, rstd). None
    where that is not served or the kernel is not compiled: nothing can be while a CUDA graph is captured.
    """
    rows, cols = x.shape
    served = x.dtype in (torch.float16, torch.bfloat16) and rows > 0 and rows % ROWS == 0
    if not (served and cluster_size(cols)):
        return None
    matrices = (x,) if residual is None else (x, residual)
    if any(m.dtype != x.dtype or not m.is_contiguous() or m.data_ptr() % 16 for m in matrices):
        return None
    records = q.tenant >= 0
    dtypes = (x.dtype, gamma.dtype, None if beta is None else beta.dtype, q.dtype)
    key = (_SOURCE, cols, *dtypes, residual is not None, records, rms, zero_centered)
    if key not in _kernels:
        if torch.cuda.is_current_stream_capturing():
            return None
        _kernels[key] = _compile(key)
    kernel = _kernels[key]
    if kernel is None:
        return None
    out = new_quantized(x, rows, cols, q)
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    state = arena(x.device) if records else None
    inputs = (None if t is None else t.detach() for t in (x, residual, total, gamma, beta))
    with torch.cuda.device(x.device):
        kernel(
            *inputs, q.scales, q.slots, out.data, out.data_t, out.scale_inv, mean, rstd, state and state.amax_bits,
            state and state.owner, q.slot, q.tenant, eps,
        )  # fmt: skip
    return out, mean, rstd
