"""Sums over tokens, in two passes: of bands of rows, then of their sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from overdrive.kernels.launch import Launcher
from overdrive.kernels.tile import column_sums, dense

_ROWS, _COLUMNS, _HEIGHT, _STAGES = 128, 256, 16, 4
_LARGE = 2**22
"""Elements from which this is faster than torch's sum; below, both only wait for the launch, and torch's costs the host less."""


@triton.jit(do_not_specialize=["T"])
def _band_sums(args, T, K, ROWS: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr):
    """sums [bands, K] of x [T, K], a band being ROWS rows; args (x, stride, sums)."""
    x, stride, sums = args
    band = tl.program_id(1)
    cols = tl.program_id(0) * BK + tl.arange(0, BK)
    total = tl.zeros([BT, BK], tl.float32)
    for step in tl.range(0, ROWS // BT, num_stages=STAGES):
        rows = band * ROWS + step * BT + tl.arange(0, BT)
        places = rows[:, None].to(tl.int64) * stride + cols[None, :]
        total += tl.load(x + places, (rows < T)[:, None] & (cols < K)[None, :], 0.0).to(tl.float32)
    tl.store(sums + band.to(tl.int64) * K + cols, tl.sum(total, 0), cols < K)


_BAND_SUMS = Launcher(_band_sums, (_ROWS, _HEIGHT, _COLUMNS, _STAGES), 4)


def column_sum(x: torch.Tensor) -> torch.Tensor:
    """overdrive::column_sum."""
    rows, cols = x.shape
    if x.numel() < _LARGE or x.dtype == torch.float64:
        return x.sum(0)
    x = dense(x)
    bands = -(-rows // _ROWS)
    partial, out = x.new_empty((1, bands, cols), dtype=torch.float32), x.new_empty(cols)
    _BAND_SUMS((-(-cols // _COLUMNS), bands, 1), x.get_device(), ((x, x.stride(0), partial), rows, cols))
    column_sums(partial, out)
    return out
