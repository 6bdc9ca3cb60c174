"""Residual add with bias and dropout, its gradient, and the norm that follows.

Shapes: x, residual, out [T, K]; bias [K]. The dropout mask is ops.residual.dropout_scale's, bit for bit, recomputed wherever it is
needed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from overdrive.kernels.norm import forward
from overdrive.kernels.tile import dense, load_tile, run_tiles
from overdrive.ops.quantize import Mode, Quantization
from overdrive.ops.residual import GOLDEN, dropout_threshold

_GOLDEN: tl.constexpr = tl.constexpr(GOLDEN)


@triton.jit
def _mix(h):
    """ops.residual._mix in 32-bit unsigned arithmetic."""
    h = (h ^ (h >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    h = (h ^ (h >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return h ^ (h >> 16)


@triton.jit
def _dropout(value, rows, cols, seed, threshold, keep):
    """value * dropout_scale of its elements. Neighbours in a thread share a hash, which the compiler finds out."""
    golden = tl.full((), _GOLDEN, tl.uint32)
    key = _mix(tl.load(seed).to(tl.uint32) + golden)
    row = (_mix(rows.to(tl.uint32) + key) ^ _mix((key ^ (tl.load(seed) >> 32).to(tl.uint32)) + golden))[:, None]
    h = row + ((cols >> 1).to(tl.uint32) * golden)[None, :]
    h = (h ^ (h >> 16)) * tl.full((), 0x7FEB352D, tl.uint32) + row
    h = (h ^ (h >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    h = h ^ (h >> 16)
    half = tl.where(((cols & 1) == 1)[None, :], h >> 16, h & 0xFFFF)
    return value * tl.where(half.to(tl.int32) < threshold, 0.0, keep)


@triton.jit
def _residual_source(args, DROPOUT: tl.constexpr, row0, r, cols, T, F):
    """Source: residual + dropout(x + bias); args (x, stride, bias, residual, residual_stride, seed, threshold, keep)."""
    x, stride, bias, residual, residual_stride, seed, threshold, keep = args
    value = load_tile(x, stride, row0, r, cols, T, F)
    if bias is not None:
        value += tl.load(bias + cols, cols < F, 0.0).to(tl.float32)[None, :]
    if DROPOUT:
        value = _dropout(value, row0 + r, cols, seed, threshold, keep)
    return (load_tile(residual, residual_stride, row0, r, cols, T, F) + value,)


@triton.jit
def _gradient_source(args, DROPOUT: tl.constexpr, row0, r, cols, T, F):
    """Source: dropout(dout); args (dout, stride, seed, threshold, keep)."""
    dout, stride, seed, threshold, keep = args
    value = load_tile(dout, stride, row0, r, cols, T, F)
    if DROPOUT:
        value = _dropout(value, row0 + r, cols, seed, threshold, keep)
    return (value,)


def _dropout_args(p: float, seed: torch.Tensor | None) -> tuple[Any, ...]:
    """(seed, threshold, keep)."""
    if p <= 0:
        return None, 0, 1.0
    return seed, dropout_threshold(p), 1 / (1 - p) if p < 1 else 0.0


def _residual_args(x, bias, residual, p, seed) -> tuple[Any, ...]:
    """Arguments of the source; x and residual are dense."""
    return x, x.stride(0), None if bias is None else dense(bias), residual, residual.stride(0), *_dropout_args(p, seed)


def residual_add(
    x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, p: float, seed: torch.Tensor | None
) -> torch.Tensor:
    """overdrive::residual_add."""
    args, q = _residual_args(dense(x), bias, dense(residual), p, seed), Quantization(Mode.PLAIN, residual.dtype)
    return run_tiles(_residual_source, args, p > 0, residual, residual.shape, q)[0].data


def residual_backward(
    dout: torch.Tensor, p: float, seed: torch.Tensor | None, bias_grad: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """overdrive::residual_backward."""
    dout = dense(dout)
    args, q = (dout, dout.stride(0), *_dropout_args(p, seed)), Quantization(Mode.PLAIN, dout.dtype)
    out, column_sum = run_tiles(_gradient_source, args, p > 0, dout, dout.shape, q, bias_grad=bias_grad)
    return out.data, column_sum


def residual_norm(x, bias, residual, p, seed, gamma, beta, eps, zero_centered, rms, sm_margin, *tail) -> tuple[torch.Tensor, ...]:
    """overdrive::residual_norm."""
    out = residual.new_empty(residual.shape)
    x, residual = dense(x), dense(residual)
    args, itemsize = _residual_args(x, bias, residual, p, seed), x.itemsize + residual.itemsize
    gamma, beta = dense(gamma), None if beta is None else dense(beta)
    addends = (x, residual) if p == 0 and bias is None else None
    of_rows = (_residual_source, args, p > 0, itemsize, out, out)
    how = (gamma, beta, eps, zero_centered, rms, sm_margin, Quantization(*tail))
    quantized, mean, rstd = forward(*of_rows, *how, addends)
    return (out, *quantized, mean, rstd)
