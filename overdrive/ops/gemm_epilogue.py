"""Products with what follows them in their epilogue: an activation, the gradient of one, a sum.

Shapes: x [T, K], weight [F, K] and bias [F] of fc1, pre and out [T, F]; dy [T, N], weight [N, F] of fc2. Sums and activations: f32.
On CUDA: fp16 and bf16 with K, F and N multiples of 8, or FP8 of which they are multiples of 16 (T of 128 where an amax is taken),
and what `scaling.support.is_gemm_epilogue_available` asks for.
"""

from __future__ import annotations

import torch

from overdrive.ops.activation import value_and_slope
from overdrive.ops.gemm import _gemm
from overdrive.ops.library import define
from overdrive.ops.quantize import QUANTIZATION, Mode, Quantization, new_quantized, quantize_value


def _product(a, b, scale_a, scale_b, bias) -> torch.Tensor:
    """a b^T + bias in f32; FP8 where there are scales, one for each of both."""
    mode = Mode.PLAIN if scale_a is None else Mode.CURRENT
    return _gemm(a, b, scale_a, scale_b, bias, torch.float32, mode, mode, False)


def _gemm_activation(x, weight, bias, name) -> tuple[torch.Tensor, torch.Tensor]:
    pre = _product(x, weight, None, None, bias)
    return pre.to(x.dtype), value_and_slope(name, pre)[0].to(x.dtype)


gemm_activation = define(
    "gemm_activation(Tensor x, Tensor weight, Tensor? bias, str name) -> (Tensor, Tensor)",
    reference=_gemm_activation,
    kernel=("gemm_epilogue", "gemm_activation"),
    fake=lambda x, weight, bias, name: (x.new_empty((x.shape[0], weight.shape[0])), x.new_empty((x.shape[0], weight.shape[0]))),
)
"""x, weight, bias -> (pre, out): pre = x weight^T + bias and out = act(pre) before pre is rounded, both in x's dtype, which is the
weight's and the bias's too. name: a key of ops.activation.ACTIVATIONS that does not gate; on CUDA "gelu"."""


def _gemm_activation_backward(out, dy, weight, pre, name, bias_grad) -> tuple[torch.Tensor, torch.Tensor | None]:
    value, slope = value_and_slope(name, pre.float())
    dpre = dy.float() @ weight.float() * slope
    out.copy_(value)
    return dpre.to(pre.dtype), dpre.sum(0).to(pre.dtype) if bias_grad else None


gemm_activation_backward = define(
    "gemm_activation_backward(Tensor(a!) out, Tensor dy, Tensor weight, Tensor pre, str name, bool bias_grad) -> (Tensor, Tensor)",
    reference=_gemm_activation_backward,
    kernel=("gemm_epilogue", "gemm_activation_backward"),
    fake=lambda out, dy, weight, pre, name, bias_grad: (
        pre.new_empty(pre.shape),
        pre.new_empty(pre.shape[1]) if bias_grad else None,
    ),
)
"""Returns dpre = (dy weight) act'(pre) and, if asked for, its sum over T before it is rounded; writes act(pre), which the gradient
of fc2's weight needs, to the contiguous `out`: it may be pre itself. All in one dtype; name as in gemm_activation."""


def _gemm_activation_quantized(a, b, scale_a, scale_b, bias, pre_dtype, name, *tail) -> tuple[torch.Tensor | None, ...]:
    pre = _product(a, b, scale_a, scale_b, bias)
    return pre.to(pre_dtype), *quantize_value(value_and_slope(name, pre)[0], Quantization(*tail))


gemm_activation_quantized = define(
    "gemm_activation_quantized(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias, ScalarType pre_dtype, str name, "
    f"{QUANTIZATION}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_gemm_activation_quantized,
    kernel=("gemm_epilogue", "gemm_activation_quantized"),
    fake=lambda a, b, scale_a, scale_b, bias, pre_dtype, name, *tail: (
        a.new_empty((a.shape[0], b.shape[0]), dtype=pre_dtype),
        *new_quantized(a, a.shape[0], b.shape[0], Quantization(*tail)),
    ),
)
"""a [T, K] and b [F, K] in FP8 with one scale each, bias [F] -> (pre, *Quantized out): pre = a b^T + bias in pre_dtype with fast
accumulation, out = act(pre) before pre is rounded (on CUDA after, with CURRENT). On CUDA the mode is DELAYED or CURRENT."""


def _gemm_add(a, b, scale_a, scale_b, bias, addend, dtype, fast_accumulation) -> torch.Tensor:
    out = _product(a, b, scale_a, scale_b, bias)
    return (out if addend is None else out + addend.float()).to(dtype)


gemm_add = define(
    "gemm_add(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias, Tensor? addend, ScalarType dtype, "
    "bool fast_accumulation) -> Tensor",
    reference=_gemm_add,
    kernel=("gemm_epilogue", "gemm_add"),
    fake=lambda a, b, scale_a, scale_b, bias, addend, dtype, fast: a.new_empty((a.shape[0], b.shape[0]), dtype=dtype),
)
"""a [T, K] b [N, K]^T + bias [N] + addend [T, N] of FP8 with one scale each, rounded once, in `dtype`, which is also bias's and
addend's."""
