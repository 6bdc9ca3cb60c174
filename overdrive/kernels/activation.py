"""Activations, forward and backward, as sources of the tile consumer.

Shapes: x [T, F], or gated [T, 2F] with the activated half first; dy [T, F]. Each element is loaded once, also by a gated gradient,
whose two halves a program writes together; where scale blocks keep it from that, two programs side by side share the cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from overdrive.kernels.tile import dense, load_tile, run_tiles
from overdrive.ops.activation import _GELU_CUBIC, _GELU_SCALE, _QUICK, ACTIVATIONS
from overdrive.ops.quantize import BLOCK, Mode, Quantization, Quantized

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
_SCALE: tl.constexpr = tl.constexpr(_GELU_SCALE)
_CUBIC: tl.constexpr = tl.constexpr(_GELU_CUBIC)
_ALPHA_QUICK: tl.constexpr = tl.constexpr(_QUICK)


@triton.jit
def _sigmoid2(x):
    """1 / (1 + 2**-x) by two special-function instructions, relative error about 1e-6."""
    return tl.inline_asm_elementwise(
        "{ .reg .f32 e; neg.f32 e, $1; ex2.approx.ftz.f32 e, e; add.f32 e, e, 0f3F800000; rcp.approx.ftz.f32 $0, e; }",
        "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _sigmoid_linear(x, alpha):
    s = _sigmoid2(alpha * _LOG2_E * x)
    return x * s, s + (alpha * x) * (s - s * s)


@triton.jit
def _evaluate(x, FUNCTION: tl.constexpr):
    """(value, derivative) of ops.activation._FUNCTIONS[FUNCTION]; what is unused costs nothing."""
    if FUNCTION == "gelu":  # 1 + tanh(u) = 2 sigmoid(2u)
        square = x * x
        s = _sigmoid2(x * (_LOG2_E * 2 * _SCALE + square * (_LOG2_E * 2 * _SCALE * _CUBIC)))
        return x * s, s + x * (2 * _SCALE + square * (6 * _SCALE * _CUBIC)) * (s - s * s)
    elif FUNCTION == "qgelu":
        return _sigmoid_linear(x, _ALPHA_QUICK)
    elif FUNCTION == "silu":
        return _sigmoid_linear(x, 1.0)
    elif FUNCTION == "sigmoid":
        s = _sigmoid2(_LOG2_E * x)
        return s, s - s * s
    else:
        r = tl.where(x <= 0, 0.0, x)  # keeps NaN
        if FUNCTION == "relu":
            return r, tl.where(x > 0, 1.0, 0.0)
        else:
            tl.static_assert(FUNCTION == "srelu")
            return r * r, 2 * r


@triton.jit
def _gate(a, b, limit, alpha, FUNCTION: tl.constexpr):
    """ops.activation._gate: (act(a), act'(a), factor of b, its slope)."""
    if FUNCTION == "clamped_silu":
        value, slope = _sigmoid_linear(tl.where(a > limit, limit, a), alpha)
        factor = tl.where(b > limit, limit, tl.where(b < -limit, -limit, b)) + 1
        return value, tl.where(a <= limit, slope, slope * 0), factor, tl.where(tl.abs(b) <= limit, 1.0, 0.0)
    else:
        value, slope = _evaluate(a, FUNCTION)
        return value, slope, b, 1.0


@triton.jit
def _forward(args, FUNCTION: tl.constexpr, row0, r, cols, T, F):
    """Source: act(x); args (x, stride)."""
    value, _ = _evaluate(load_tile(args[0], args[1], row0, r, cols, T, F), FUNCTION)
    return (value,)


@triton.jit
def _gated_forward(args, FUNCTION: tl.constexpr, row0, r, cols, T, F):
    """Source: act(a) * b; args (x, stride, limit, alpha)."""
    x, stride, limit, alpha = args
    a = load_tile(x, stride, row0, r, cols, T, F)
    b = load_tile(x + F, stride, row0, r, cols, T, F)
    value, _, factor, _ = _gate(a, b, limit, alpha, FUNCTION)
    return (value * factor,)


@triton.jit
def _backward(args, FUNCTION: tl.constexpr, row0, r, cols, T, F):
    """Source: dy act'(x); args (dy, dy_stride, x, stride)."""
    dy, dy_stride, x, stride = args
    _, slope = _evaluate(load_tile(x, stride, row0, r, cols, T, F), FUNCTION)
    return (load_tile(dy, dy_stride, row0, r, cols, T, F) * slope,)


@triton.jit
def _gated_tiles(args, FUNCTION: tl.constexpr, row0, r, cols, T, F):
    """The gradients of columns `cols` of a and of b."""
    dy, dy_stride, x, stride, limit, alpha = args
    dy_tile = load_tile(dy, dy_stride, row0, r, cols, T, F)
    a = load_tile(x, stride, row0, r, cols, T, F)
    b = load_tile(x + F, stride, row0, r, cols, T, F)
    value, slope, factor, factor_slope = _gate(a, b, limit, alpha, FUNCTION)
    return dy_tile * factor * slope, dy_tile * value * factor_slope


@triton.jit
def _gated_backward(args, FUNCTION: tl.constexpr, row0, r, cols, T, F):
    """Source of two halves; args (dy, dy_stride, x, stride, limit, alpha)."""
    return _gated_tiles(args, FUNCTION, row0, r, cols, T, F)


@triton.jit
def _gated_backward_joined(args, FUNCTION: tl.constexpr, row0, r, cols, T, K):
    """Source of all K = 2F columns, for scale blocks that straddle the halves; reads everything twice."""
    F = K // 2
    da, db = _gated_tiles(args, FUNCTION, row0, r, tl.where(cols < F, cols, tl.where(cols < K, cols - F, F)), T, F)
    return (tl.where((cols < F)[None, :], da, db),)


def activated(
    x: torch.Tensor, name: str, limit: float, alpha: float, q: Quantization, amax: torch.Tensor | None = None
) -> Quantized:
    """act(x), quantized; amax: of CURRENT, where it is known already."""
    x = dense(x)
    (rows, cols), (function, gated) = x.shape, ACTIVATIONS[name]
    source, args, cols = (
        (_gated_forward, (x, x.stride(0), limit, alpha), cols // 2) if gated else (_forward, (x, x.stride(0)), cols)
    )
    return run_tiles(source, args, function, x, (rows, cols), q, inputs=1 + gated, amax=amax)[0]


def activation(x: torch.Tensor, name: str, limit: float, alpha: float, *tail) -> Quantized:
    """overdrive::activation."""
    return activated(x, name, limit, alpha, Quantization(*tail))


def _gradient(
    dy: torch.Tensor, x: torch.Tensor, name: str, limit: float, alpha: float, bias_grad: bool, q: Quantization, into: Any = None
) -> tuple[Quantized, torch.Tensor | None]:
    dy, x = dense(dy), dense(x)
    function, gated = ACTIVATIONS[name]
    source, args, halves = _backward, (dy, dy.stride(0), x, x.stride(0)), 1
    if gated:
        straddling = q.mode in (Mode.BLOCK_1D, Mode.BLOCK_2D) and dy.shape[1] % BLOCK
        source, halves = (_gated_backward_joined, 1) if straddling else (_gated_backward, 2)
        args = (*args, limit, alpha)
    return run_tiles(source, args, function, x, x.shape, q, inputs=2 + gated, halves=halves, bias_grad=bias_grad, into=into)


def activation_backward(
    dy: torch.Tensor, x: torch.Tensor, name: str, limit: float, alpha: float, bias_grad: bool, *tail
) -> tuple[torch.Tensor | None, ...]:
    """overdrive::activation_backward."""
    out, column_sum = _gradient(dy, x, name, limit, alpha, bias_grad, Quantization(*tail))
    return (*out, column_sum)


def activation_backward_into(
    out: torch.Tensor, dy: torch.Tensor, x: torch.Tensor, name: str, limit: float, alpha: float, bias_grad: bool
) -> torch.Tensor:
    """overdrive::activation_backward_into: a program loads all of a tile before it stores there."""
    column_sum = _gradient(dy, x, name, limit, alpha, bias_grad, Quantization(dtype=out.dtype), out)[1]
    return x.new_empty(0, dtype=torch.float32) if column_sum is None else column_sum
