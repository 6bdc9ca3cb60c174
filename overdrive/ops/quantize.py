"""Quantization to FP8: one scale per tensor (delayed, current) or per block (1x128, 128x128), with the transposed copy.

Shapes: T tokens (rows), K features (columns), Tp = T rounded up to PAD. Quantized data has Tp rows, the extra ones zero, because an
FP8 GEMM contracts over multiples of 16; its users narrow results back to T.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
import torch.nn.functional as F

from overdrive.ops.library import define
from overdrive.ops.scaling import arena

BLOCK = 128
PAD = 16
FP8_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
_FP32_MAX = torch.finfo(torch.float32).max


class Mode(IntEnum):
    """How a tensor is quantized. PLAIN keeps the input's dtype."""

    PLAIN = 0
    DELAYED = 1
    CURRENT = 2
    BLOCK_1D = 3
    BLOCK_2D = 4

    @property
    def per_tensor(self) -> bool:
        """Whether one scale serves the whole tensor."""
        return self in (Mode.DELAYED, Mode.CURRENT)


QUANTIZATION = (
    "int mode, ScalarType dtype, Tensor? scales, Tensor? slots, int slot, int tenant, bool power_of_2, bool row, bool col"
)
"""Schema tail of every op whose output may be quantized.

mode: a Mode. dtype: FP8 dtype (PLAIN: output dtype). scales: f32 [capacity] snapshot from begin_step; slots: i32, this
layer's indices into it; slot: which of them (DELAYED only). tenant: record the amax for it, none if < 0. power_of_2: round
scales down to 2**n. row, col: whether [T, K] and the transposed copy are wanted. """


class Quantization(NamedTuple):
    """The arguments of QUANTIZATION, in order."""

    mode: Mode = Mode.PLAIN
    dtype: torch.dtype = torch.float32
    scales: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    slot: int = 0
    tenant: int = -1
    power_of_2: bool = False
    row: bool = True
    col: bool = False


class Quantized(NamedTuple):
    """What ops with a QUANTIZATION tail return; what was not asked for is empty (inside of an op still None).

    data [Tp, K], data_t [K, Tp]: FP8, contiguous (PLAIN: data [T, K] in `dtype`, nothing else). scale_inv, scale_inv_t: f32
    reciprocal scales. Per tensor: [1], serving both. BLOCK_1D: [Tp, K/128] and [K, Tp/128], rows fastest. BLOCK_2D: [Tp/128,
    K/128] and [K/128, Tp/128], each row padded to a multiple of 4 blocks, as cuBLAS reads them.
    """

    data: torch.Tensor | None
    data_t: torch.Tensor | None
    scale_inv: torch.Tensor | None
    scale_inv_t: torch.Tensor | None


def padded(size: int) -> int:
    """`size` rounded up to PAD."""
    return -(-size // PAD) * PAD


def blocks(size: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // BLOCK)


def new_block_scales(like: torch.Tensor, mode: int, rows: int, cols: int) -> torch.Tensor:
    """Empty scales of a [rows, cols] tensor in the layout the GEMM reads."""
    if mode == Mode.BLOCK_1D:
        return like.new_empty((blocks(cols), rows), dtype=torch.float32).t()
    return like.new_empty((blocks(rows), -(-blocks(cols) // 4) * 4), dtype=torch.float32)


def new_quantized(like: torch.Tensor, rows: int, cols: int, q: Quantization) -> Quantized:
    """Uninitialised outputs on `like`'s device: what fakes return and kernels fill."""
    if q.mode == Mode.PLAIN:
        return Quantized(like.new_empty((rows, cols), dtype=q.dtype), None, None, None)
    rows = padded(rows)
    data = like.new_empty((rows, cols), dtype=q.dtype) if q.row else None
    data_t = like.new_empty((cols, rows), dtype=q.dtype) if q.col else None
    if q.mode in (Mode.DELAYED, Mode.CURRENT):
        return Quantized(data, data_t, like.new_empty(1, dtype=torch.float32), None)
    scale_inv = new_block_scales(like, q.mode, rows, cols) if q.row else None
    scale_inv_t = new_block_scales(like, q.mode, cols, rows) if q.col else None
    return Quantized(data, data_t, scale_inv, scale_inv_t)


def saturating_cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """f32 to FP8, clamped to the largest finite value; NaN stays NaN."""
    return x.clamp(-FP8_MAX[dtype], FP8_MAX[dtype]).to(dtype)


def scale_from_amax(amax: torch.Tensor, dtype: torch.dtype, power_of_2: bool) -> torch.Tensor:
    """FP8_MAX / amax, finite; 1 where amax is 0, inf or NaN; rounded down to a power of two if asked."""
    scale = (torch.full_like(amax, FP8_MAX[dtype]) / amax).clamp(max=_FP32_MAX)  # number / tensor would round twice
    if power_of_2:
        scale = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)
    return torch.where((amax > 0) & amax.isfinite(), scale, 1.0)


def _quantize_blocks(x: torch.Tensor, mode: int, q: Quantization) -> tuple[torch.Tensor, torch.Tensor]:
    rows, cols = x.shape
    height = 1 if mode == Mode.BLOCK_1D else BLOCK
    tiles = F.pad(x, (0, -cols % BLOCK, 0, -rows % height)).view(-(-rows // height), height, blocks(cols), BLOCK)
    scale = scale_from_amax(tiles.abs().amax((1, 3)), q.dtype, q.power_of_2)
    data = saturating_cast(tiles * scale[:, None, :, None], q.dtype).flatten(2).flatten(0, 1)[:rows, :cols]
    scale_inv = new_block_scales(x, mode, rows, cols).fill_(1)
    scale_inv[:, : scale.shape[1]] = 1 / scale
    return data.contiguous(), scale_inv


def quantize_value(x: torch.Tensor, q: Quantization) -> Quantized:
    """Reference: quantize a [T, K] value, f32 arithmetic. Other ops hand the value they computed here."""
    if q.mode == Mode.PLAIN:
        return Quantized(x.to(q.dtype, copy=True).contiguous(), None, None, None)
    x = x.float()
    amax = x.abs().amax() if x.numel() else x.new_zeros(())
    x = F.pad(x, (0, 0, 0, padded(x.shape[0]) - x.shape[0])).contiguous()
    if q.mode in (Mode.BLOCK_1D, Mode.BLOCK_2D):
        data, scale_inv = _quantize_blocks(x, q.mode, q) if q.row else (None, None)
        data_t, scale_inv_t = _quantize_blocks(x.t(), q.mode, q) if q.col else (None, None)
        return Quantized(data, data_t, scale_inv, scale_inv_t)
    if q.mode == Mode.DELAYED:
        assert q.scales is not None
        assert q.slots is not None
        if q.tenant >= 0 and x.numel():
            arena(x.device).record(q.slots, q.slot, amax, q.tenant)
        scale = q.scales[q.slots[q.slot : q.slot + 1]]
    else:
        scale = scale_from_amax(amax.reshape(1), q.dtype, q.power_of_2)
    data = saturating_cast(x * scale, q.dtype)
    return Quantized(data if q.row else None, data.t().contiguous() if q.col else None, 1 / scale, None)


def _quantize(x: torch.Tensor, bias_grad: bool, *tail) -> tuple[torch.Tensor | None, ...]:
    column_sum = x.float().sum(0).to(x.dtype) if bias_grad else None
    return (*quantize_value(x, Quantization(*tail)), column_sum)


def _quantize_fake(x: torch.Tensor, bias_grad: bool, *tail) -> tuple[torch.Tensor | None, ...]:
    return (*new_quantized(x, x.shape[0], x.shape[1], Quantization(*tail)), x.new_empty(x.shape[1]) if bias_grad else None)


quantize = define(
    f"quantize(Tensor x, bool bias_grad, {QUANTIZATION}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_quantize,
    kernel=("quantize", "quantize"),
    fake=_quantize_fake,
)
"""Quantize x [T, K] -> (*Quantized, bias_grad). bias_grad [K] is x summed over T in f32, in x's dtype (empty if not asked for)."""
