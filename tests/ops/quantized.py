"""Quantization by hand, for tests to compare ops with: FP8 from its definition, blocks in loops, f32 arithmetic in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from overdrive.ops.gemm import dequantize
from overdrive.ops.quantize import Mode, Quantization, Quantized, quantize
from tests.numerics import E4M3, E5M2, assert_same_bits, bits

FP8 = (E4M3, E5M2)
MODES = tuple(mode for mode in Mode if mode != Mode.PLAIN)
PER_TENSOR = (Mode.DELAYED, Mode.CURRENT)
FP32_MAX = np.float32(np.finfo(np.float32).max)


def _grid(exponent_bits: int, mantissa_bits: int, finite: int) -> np.ndarray:
    """Values of the bytes 0 .. finite - 1."""
    code = np.arange(finite)
    exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    significand = np.where(exponent == 0, 0, 1) + mantissa / (1 << mantissa_bits)
    return significand * 2.0 ** (np.maximum(exponent, 1) - bias)


GRIDS = {E4M3: _grid(4, 3, 0x7F), E5M2: _grid(5, 2, 0x7C)}


def encode(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Bytes of the nearest FP8 values, ties to even, saturating; 0xFF for NaN (as numerics.bits has it)."""
    grid = GRIDS[dtype]
    size = np.minimum(np.nan_to_num(np.abs(x.astype(np.float64)), nan=0.0, posinf=grid[-1]), grid[-1])
    below = np.searchsorted(grid, size, side="right") - 1
    above = np.minimum(below + 1, len(grid) - 1)
    middle = (grid[below] + grid[above]) / 2
    code = np.where((size > middle) | ((size == middle) & (below % 2 == 1)), above, below)
    return np.where(np.isnan(x), 0xFF, code | (np.signbit(x) << 7)).astype(np.uint8)


def scale_for(amax: np.float32, dtype: torch.dtype, power_of_2: bool) -> np.float32:
    """FP8_MAX / amax in f32, at most FP32_MAX; 1 where amax says nothing."""
    if amax == 0 or not np.isfinite(amax):
        return np.float32(1)
    with np.errstate(over="ignore"):
        scale = min(np.float32(GRIDS[dtype][-1]) / amax, FP32_MAX)
    return np.float32(2.0 ** (np.frexp(scale)[1] - 1)) if power_of_2 else scale


def by_hand(x: torch.Tensor, q: Quantization) -> dict[str, np.ndarray]:
    """What x [T, K] has to become: bytes and reciprocal scales under the names of Quantized; block scales without their padding."""
    values = x.detach().cpu().float().numpy()
    values = np.concatenate((values, np.zeros((-len(values) % 16, values.shape[1]), np.float32)))
    out = {}
    for suffix, wanted, value in (("", q.row, values), ("_t", q.col, values.T)):
        if q.mode in PER_TENSOR:
            amax = np.abs(value).max() if value.size else np.float32(0)
            scale = (
                np.float32(q.scales[q.slots[q.slot]].item()) if q.mode == Mode.DELAYED else scale_for(amax, q.dtype, q.power_of_2)
            )
            scales = factor = np.full(1, scale, np.float32)
        else:
            height = 1 if q.mode == Mode.BLOCK_1D else 128
            starts = [range(0, size, step) for size, step in zip(value.shape, (height, 128))]
            scales = np.ones([len(s) for s in starts], np.float32)
            for i, top in enumerate(starts[0]):
                for j, left in enumerate(starts[1]):
                    block = value[top : top + height, left : left + 128]
                    scales[i, j] = scale_for(np.abs(block).max(), q.dtype, q.power_of_2)
            factor = scales.repeat(height, 0)[: value.shape[0]].repeat(128, 1)[:, : value.shape[1]]
        with np.errstate(over="ignore", invalid="ignore"):
            if wanted:
                out[f"data{suffix}"] = encode(value * factor, q.dtype)
            if wanted or q.mode in PER_TENSOR:
                out[f"scale_inv{suffix}"] = np.float32(1) / scales
    return out


def assert_by_hand(actual: Quantized, x: torch.Tensor, q: Quantization) -> None:
    """Every byte and scale as computed by hand, and nothing where nothing was asked for."""
    expected = by_hand(x, q)
    if q.mode in PER_TENSOR:
        del expected["scale_inv_t"]
    for name in Quantized._fields:
        tensor = getattr(actual, name)
        if name not in expected:
            assert tensor.numel() == 0, f"{name} was not asked for, but has shape {list(tensor.shape)}"
            continue
        want = expected[name]
        if name.startswith("data"):
            assert tensor.dtype == q.dtype
            assert tensor.is_contiguous()
            assert tuple(tensor.shape) == want.shape, f"{name}: shape {list(tensor.shape)}, expected {list(want.shape)}"
            wrong = (bits(tensor).numpy() != want).nonzero()
            assert not len(wrong[0]), f"{name}: {len(wrong[0])} of {want.size} bytes differ, first at {[int(i[0]) for i in wrong]}"
        else:
            if q.mode == Mode.BLOCK_2D:  # rows of scales are padded to multiples of four with ones
                assert tensor.shape[1] % 4 == 0
                assert bool((tensor[:, want.shape[1] :] == 1).all())
                tensor = tensor[:, : want.shape[1]]
            assert_same_bits(tensor, torch.from_numpy(want), name)


def tail(
    mode: Mode, dtype: torch.dtype, device: str, *, scale: float = 1.0, row: bool = True, col: bool = True, power_of_2: bool = False
) -> Quantization:
    """Arguments of QUANTIZATION. scale: of DELAYED, which records no amax."""
    if mode != Mode.DELAYED:
        return Quantization(mode, dtype, power_of_2=power_of_2, row=row, col=col)
    scales, slots = torch.tensor([9.0, scale, 7.0], device=device), torch.tensor([2, 1], dtype=torch.int32, device=device)
    return Quantization(mode, dtype, scales, slots, slot=1, row=row, col=col)


def quantized(x: torch.Tensor, mode: Mode, dtype: torch.dtype, **options: Any) -> Quantized:
    """x quantized by the op; options as `tail` has them."""
    return Quantized(*quantize(x, False, *tail(mode, dtype, str(x.device), **options))[:4])


def on_cpu(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies of the arguments for the reference."""
    return tuple(arg.cpu() if isinstance(arg, torch.Tensor) else arg for arg in args)


def assert_quantized_alike(actual: Quantized, expected: Quantized, q: Quantization, what: str = "") -> None:
    """Equal bits on the CPU. On a GPU the values before quantization may differ by some last bits: then one in a thousand may be
    one FP8 step off, and what is next to nothing beside the largest value may be anything as small.
    """
    if actual.data.device.type == "cpu":
        for name in Quantized._fields:
            assert_same_bits(getattr(actual, name), getattr(expected, name), f"{what} {name}")
        return
    pairs = [("data", "scale_inv"), ("data_t", "scale_inv" if q.mode in PER_TENSOR else "scale_inv_t")]
    for data, scale_inv in pairs:
        (got, got_scale), (want, want_scale) = ([getattr(t, name).cpu() for name in (data, scale_inv)] for t in (actual, expected))
        assert (got.dtype, got.shape, got_scale.shape) == (want.dtype, want.shape, want_scale.shape), f"{what} {data}"
        if not got.numel():
            continue
        a, e = dequantize(got, got_scale, q.mode), dequantize(want, want_scale, q.mode)
        nothing = 2e-6 * e.abs().max()
        # 1 stands for an amax of 0
        amaxes = [torch.where(scale == 1, 0, scale * torch.finfo(q.dtype).max) for scale in (got_scale, want_scale)]
        torch.testing.assert_close(*amaxes, rtol=4e-6, atol=float(nothing), msg=lambda m: f"{what} {scale_inv}: {m}")  # noqa: B023
        smallest = dequantize(torch.ones_like(want.float()), want_scale, q.mode) * GRIDS[q.dtype][1]
        step = torch.maximum(a.abs(), e.abs()) * 2 * torch.finfo(q.dtype).eps + smallest
        off = (a - e).abs() - nothing
        assert bool((off <= step).all()), f"{what} {data}: {int((off > step).sum())} of {off.numel()} are over a step away"
        count = int((off > 1e-4 * e.abs()).sum())
        assert count <= max(2, 1e-3 * off.numel()), f"{what} {data}: {count} of {off.numel()} differ"
