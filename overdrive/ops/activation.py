"""The MLP's activations, forward and backward, each with an optional quantized output.

Shapes: x [T, F], or [T, 2F] for gated ones, the activated half first: y = act(x[:, :F]) * x[:, F:]. All arithmetic is f32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from overdrive.ops.library import define
from overdrive.ops.quantize import QUANTIZATION, Quantization, new_quantized, quantize_value

_GELU_SCALE = math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715
_QUICK = 1.702


class Activation(NamedTuple):
    """A pointwise function, whether it gates, and the names used for either form."""

    function: str
    gated: bool


ACTIVATIONS: dict[str, Activation] = {
    "gelu": Activation("gelu", False),
    "geglu": Activation("gelu", True),
    "qgelu": Activation("qgelu", False),
    "qgeglu": Activation("qgelu", True),
    "relu": Activation("relu", False),
    "reglu": Activation("relu", True),
    "srelu": Activation("srelu", False),
    "sreglu": Activation("srelu", True),
    "silu": Activation("silu", False),
    "swiglu": Activation("silu", True),
    "glu": Activation("sigmoid", True),
    "clamped_swiglu": Activation("clamped_silu", True),
}
"""gelu is the tanh approximation (arXiv:1606.08415), qgelu x sigmoid(1.702 x), srelu relu squared (arXiv:2109.08668), the gated
ones from arXiv:2002.05202, clamped_swiglu from gpt-oss: g = min(a, limit), u = clamp(b, +-limit) + 1, y = g sigmoid(alpha g) u."""


def _gelu(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    tanh = (_GELU_SCALE * (x + _GELU_CUBIC * x**3)).tanh()
    inner = _GELU_SCALE * (1 + 3 * _GELU_CUBIC * x.square())
    return 0.5 * x * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh.square()) * inner


def _sigmoid_linear(x: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    s = (alpha * x).sigmoid()
    return x * s, s + alpha * x * s * (1 - s)


def _sigmoid(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    s = x.sigmoid()
    return s, s * (1 - s)


# name -> x -> (value, derivative)
_FUNCTIONS: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "gelu": _gelu,
    "qgelu": lambda x: _sigmoid_linear(x, _QUICK),
    "relu": lambda x: (x.relu(), (x > 0).to(x.dtype)),
    "srelu": lambda x: (x.relu().square(), 2 * x.relu()),
    "silu": lambda x: _sigmoid_linear(x, 1.0),
    "sigmoid": _sigmoid,
}


def value_and_slope(name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(act(x), act'(x)) of an activation that does not gate, in x's dtype."""
    return _FUNCTIONS[ACTIVATIONS[name].function](x)


def _gate(x: torch.Tensor, function: str, limit: float, alpha: float) -> tuple[torch.Tensor, ...]:
    """(act(a), act'(a), b, db/db_in) of x = [a; b]."""
    a, b = x.chunk(2, dim=1)
    if function != "clamped_silu":
        return *_FUNCTIONS[function](a), b, torch.ones_like(b)
    value, slope = _sigmoid_linear(a.clamp(max=limit), alpha)
    return value, slope * (a <= limit), b.clamp(-limit, limit) + 1, (b.abs() <= limit).to(b.dtype)


def _activation(x, name, limit, alpha, *tail) -> tuple[torch.Tensor | None, ...]:
    function, gated = ACTIVATIONS[name]
    if gated:
        value, _, other, _ = _gate(x.float(), function, limit, alpha)
        return quantize_value(value * other, Quantization(*tail))
    return quantize_value(_FUNCTIONS[function](x.float())[0], Quantization(*tail))


def _activation_fake(x, name, limit, alpha, *tail) -> tuple[torch.Tensor | None, ...]:
    return new_quantized(x, x.shape[0], x.shape[1] // (2 if ACTIVATIONS[name].gated else 1), Quantization(*tail))


activation = define(
    f"activation(Tensor x, str name, float limit, float alpha, {QUANTIZATION}) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_activation,
    kernel=("activation", "activation"),
    fake=_activation_fake,
)
"""x -> Quantized y [T, F]. name: a key of ACTIVATIONS; limit and alpha serve clamped_swiglu."""


def _activation_backward(dy, x, name, limit, alpha, bias_grad, *tail) -> tuple[torch.Tensor | None, ...]:
    function, gated = ACTIVATIONS[name]
    dy32, x32 = dy.float(), x.float()
    if gated:
        value, slope, other, other_slope = _gate(x32, function, limit, alpha)
        dx = torch.cat((dy32 * other * slope, dy32 * value * other_slope), dim=1)
    else:
        dx = dy32 * _FUNCTIONS[function](x32)[1]
    column_sum = dx.sum(0).to(x.dtype) if bias_grad else None
    return (*quantize_value(dx, Quantization(*tail)), column_sum)


activation_backward = define(
    "activation_backward(Tensor dy, Tensor x, str name, float limit, float alpha, bool bias_grad, "
    f"{QUANTIZATION}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_activation_backward,
    kernel=("activation", "activation_backward"),
    fake=lambda dy, x, name, limit, alpha, bias_grad, *tail: (
        *new_quantized(x, x.shape[0], x.shape[1], Quantization(*tail)),
        x.new_empty(x.shape[1]) if bias_grad else None,
    ),
)
"""dy [T, F], x as in the forward -> (*Quantized dx, bias_grad): dx has x's shape, bias_grad is dx summed over T in f32, in
x's dtype."""


def _activation_backward_into(out, dy, x, name, limit, alpha, bias_grad) -> torch.Tensor:
    dx, *_, column_sum = _activation_backward(dy, x, name, limit, alpha, bias_grad, *Quantization(dtype=out.dtype))
    out.copy_(dx)
    return x.new_empty(0, dtype=torch.float32) if column_sum is None else column_sum


activation_backward_into = define(
    "activation_backward_into(Tensor(a!) out, Tensor dy, Tensor x, str name, float limit, float alpha, bool bias_grad) -> Tensor",
    reference=_activation_backward_into,
    kernel=("activation", "activation_backward_into"),
    fake=lambda out, dy, x, name, limit, alpha, bias_grad: (
        x.new_empty(x.shape[1]) if bias_grad else x.new_empty(0, dtype=torch.float32)
    ),
)
"""activation_backward without quantization, written to the contiguous `out`, which may be the memory of dy or x if it has dx's
shape. Returns the bias gradient."""
