"""Matrix products: out = a @ b.T (+ bias), both operands with the contraction last, in fp32/fp16/bf16 or FP8.

Shapes: a [M, K], b [N, K], bias [N], addend and out [M, N]. FP8 operands are quantized data with their reciprocal scales
(ops.quantize.Quantized).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from overdrive.ops.library import Kernel, define
from overdrive.ops.quantize import BLOCK, Mode


def dequantize(data: torch.Tensor, scale_inv: torch.Tensor, mode: int) -> torch.Tensor:
    """f32 values of quantized data [R, C]."""
    rows, cols = data.shape
    if mode == Mode.BLOCK_1D:
        scale_inv = scale_inv.repeat_interleave(BLOCK, 1)[:, :cols]
    elif mode == Mode.BLOCK_2D:
        scale_inv = scale_inv.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :cols]
    return data.float() * scale_inv


def _gemm(a, b, scale_a, scale_b, bias, dtype, mode_a, mode_b, fast_accumulation, addend=None) -> torch.Tensor:
    if mode_a == Mode.PLAIN:
        out = F.linear(a.to(dtype), b.to(dtype), bias if bias is None else bias.to(dtype))
    else:
        out = dequantize(a, scale_a, mode_a) @ dequantize(b, scale_b, mode_b).t()
        out = (out if bias is None else out + bias.float()).to(dtype)
    return out if addend is None else out.add_(addend)


def _gemm_cuda(a, b, scale_a, scale_b, bias, dtype, mode_a, mode_b, fast_accumulation, addend=None) -> torch.Tensor:
    how = (a, b, scale_a, scale_b, bias, dtype, mode_a, mode_b, fast_accumulation)
    if host_decides(a.shape[0], b.shape[0], b.shape[1], a) and (mode_a != Mode.PLAIN or a.dtype == b.dtype):
        return _small_gemm(*how, addend)
    out = _large_gemm(*how)
    return out if addend is None else out.add_(addend)


def _large_gemm(a, b, scale_a, scale_b, bias, dtype, mode_a, mode_b, fast_accumulation) -> torch.Tensor:
    if a.numel() == 0 or b.numel() == 0:  # cuBLAS leaves the output of an empty product unwritten
        out = a.new_zeros((a.shape[0], b.shape[0]), dtype=dtype)
        return out if bias is None else out + bias
    if mode_a == Mode.PLAIN:
        if dtype != a.dtype:
            out = torch.mm(a, b.t(), out_dtype=dtype)
            return out if bias is None else out + bias
        return torch.mm(a, b.t()) if bias is None else torch.addmm(bias, a, b.t())
    late_bias = bias if dtype == torch.float32 else None  # cuBLASLt takes no bias with f32 output
    if late_bias is not None:
        bias = None
    if mode_a in (Mode.DELAYED, Mode.CURRENT):
        out = torch._scaled_mm(a, b.t(), scale_a, scale_b, bias=bias, out_dtype=dtype, use_fast_accum=fast_accumulation)
    else:
        out = _block_gemm(a, b, scale_a, scale_b, bias, dtype, mode_a, mode_b)
    return out if late_bias is None else out + late_bias


@functools.cache
def _sms_of_hopper(device: torch.device) -> int:
    """Multiprocessors of a Hopper GPU, 0 for any other."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count if (properties.major, properties.minor) == (9, 0) else 0


_SMALL = 2**30
"""Multiplications of a product that takes a Hopper GPU 3 to 8 us, which is less than the host takes to launch it."""
_SMALL_CONTRACTION = 2048
"""Of such a product: in a long one programs that each contract all of it are slow."""
_SMALL_ROWS = BLOCK // 2
"""That such a product has at the least."""


def host_decides(m: int, n: int, k: int, like: torch.Tensor) -> bool:
    """Whether a product of such a matrix, [m, k] by [k, n], is so small that kernels.small_gemm takes it.

    Measured on an H200 in a training step: its launch takes the host 12 to 15 us, torch._scaled_mm 45 to 60, with scale blocks 70
    to 107, torch.addmm 54, torch.mm 30. On the GPU it is as fast up to a contraction of 1024, and up to 3 us slower beyond.
    """
    if m < _SMALL_ROWS or not 0 < m * n * k <= _SMALL or k > _SMALL_CONTRACTION or not like.is_cuda:
        return False
    return like.dtype not in (torch.float32, torch.float64) and _sms_of_hopper(like.device) > 0


_small_gemm = Kernel(("small_gemm", "small_gemm"))


@functools.cache
def _own_kernel() -> Callable[..., torch.Tensor] | None:
    """kernels.gemm.block_gemm, None where Triton's experimental Gluon is not as it was when that was written."""
    try:
        return Kernel(("gemm", "block_gemm")).load()
    except (ImportError, AttributeError):
        return None


def _prefers_own_kernel(a: torch.Tensor, b: torch.Tensor, mode_a: int, mode_b: int) -> bool:
    """Whether kernels.gemm is faster than cuBLASLt; the bits are the same.

    Measured on an H200 over 81 shapes. One of its waves of 256x128 tiles takes 0.95 of two of cuBLASLt's 128x128, which counts
    unless many multiprocessors idle in the last wave; launching it takes 63 us. Both with 1x128 scales: 1.01 to 1.04, lost.
    """
    if (mode_a, mode_b) != (Mode.BLOCK_1D, Mode.BLOCK_2D):
        return False
    sms = _sms_of_hopper(a.device)
    (m, k), n = a.shape, b.shape[0]
    if not sms or m * n * k < 5e10:
        return False
    rows, cols = -(-m // BLOCK), -(-n // BLOCK)
    waves = -(-(-(-rows // 2) * cols) // sms)
    return 0.95 * 2 * waves < -(-rows * cols // sms)


def _block_gemm(a, b, scale_a, scale_b, bias, dtype, mode_a, mode_b) -> torch.Tensor:
    if _prefers_own_kernel(a, b, mode_a, mode_b) and (own := _own_kernel()) is not None:
        return own(a, b, scale_a, scale_b, bias, dtype)
    kinds = {Mode.BLOCK_1D: F.ScalingType.BlockWise1x128, Mode.BLOCK_2D: F.ScalingType.BlockWise128x128}
    operands = ((scale_a, mode_a), (scale_b, mode_b))
    # 128x128 scales are handed over transposed: [K/128 padded to 4, rows/128], the first index fastest
    (sa, sb) = (scale.t() if mode == Mode.BLOCK_2D else scale for scale, mode in operands)
    return F.scaled_mm(a, b.t(), sa, kinds[Mode(mode_a)], sb, kinds[Mode(mode_b)], bias=bias, output_dtype=dtype)


gemm = define(
    "gemm(Tensor a, Tensor b, Tensor? scale_a, Tensor? scale_b, Tensor? bias, ScalarType dtype, int mode_a, int mode_b, "
    "bool fast_accumulation, Tensor? addend=None) -> Tensor",
    reference=_gemm,
    kernel=_gemm_cuda,
    fake=lambda a, b, scale_a, scale_b, bias, dtype, *_: a.new_empty((a.shape[0], b.shape[0]), dtype=dtype),
)
"""a @ b.T + bias, summed in f32, in `dtype`; then + addend [M, N] of that dtype. mode_a, mode_b: the operands' Mode (PLAIN: no
scales)."""


def _gemms(a, b, scale_a, scale_b, c, d, scale_c, scale_d, dtype, mode_a, mode_b, mode_c, mode_d, fast_ab, fast_cd):
    return (
        _gemm(a, b, scale_a, scale_b, None, dtype, mode_a, mode_b, fast_ab),
        _gemm(c, d, scale_c, scale_d, None, dtype, mode_c, mode_d, fast_cd),
    )


gemms = define(
    "gemms(Tensor a, Tensor b, Tensor? scale_a, Tensor? scale_b, Tensor c, Tensor d, Tensor? scale_c, Tensor? scale_d, "
    "ScalarType dtype, int mode_a, int mode_b, int mode_c, int mode_d, bool fast_ab, bool fast_cd) -> (Tensor, Tensor)",
    reference=_gemms,
    kernel=("small_gemm", "small_gemms"),
    fake=lambda a, b, scale_a, scale_b, c, d, scale_c, scale_d, dtype, *_: (
        a.new_empty((a.shape[0], b.shape[0]), dtype=dtype),
        c.new_empty((c.shape[0], d.shape[0]), dtype=dtype),
    ),
)
"""(a @ b.T, c @ d.T) in one launch, of products for which `host_decides`."""
