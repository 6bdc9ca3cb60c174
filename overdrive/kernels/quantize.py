"""Quantize a matrix: the tile consumer over plain loads."""

from __future__ import annotations

import torch

from overdrive.kernels.tile import dense, load_source, run_tiles
from overdrive.ops.quantize import Quantization


def quantize(x: torch.Tensor, bias_grad: bool, *tail) -> tuple[torch.Tensor, ...]:
    """overdrive::quantize."""
    x = dense(x)
    out, column_sum = run_tiles(load_source, (x, x.stride(0)), None, x, x.shape, Quantization(*tail), bias_grad=bias_grad)
    return (*out, column_sum)
