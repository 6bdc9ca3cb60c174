"""The product before an activation with that in its epilogue, and the input gradient of the product after it with its gradient.

Shapes: x [T, K], weight [F, K] and bias [F] of fc1, pre and out [T, F]; dy [T, N], weight [N, F] of fc2. Sums and activations: f32.
On CUDA: fp16 and bf16, K, F and N multiples of 8, and what `scaling.support.is_gemm_epilogue_available` asks for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from overdrive.ops.activation import value_and_slope
from overdrive.ops.library import define


def _gemm_activation(x, weight, bias, name) -> tuple[torch.Tensor, torch.Tensor]:
    pre = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return pre.to(x.dtype), value_and_slope(name, pre)[0].to(x.dtype)


gemm_activation = define(
    "gemm_activation(Tensor x, Tensor weight, Tensor? bias, str name) -> (Tensor, Tensor)",
    reference=_gemm_activation,
    kernel=("gemm_activation", "gemm_activation"),
    fake=lambda x, weight, bias, name: (x.new_empty((x.shape[0], weight.shape[0])), x.new_empty((x.shape[0], weight.shape[0]))),
)
"""x, weight, bias -> (pre, out): pre = x weight^T + bias and out = act(pre) before pre is rounded, both in x's dtype, which is the
weight's and the bias's too. name: a key of ops.activation.ACTIVATIONS that does not gate; on CUDA "gelu"."""


def _gemm_activation_backward(out, dy, weight, pre, name) -> torch.Tensor:
    value, slope = value_and_slope(name, pre.float())
    dpre = (dy.float() @ weight.float() * slope).to(pre.dtype)
    out.copy_(value)
    return dpre


gemm_activation_backward = define(
    "gemm_activation_backward(Tensor(a!) out, Tensor dy, Tensor weight, Tensor pre, str name) -> Tensor",
    reference=_gemm_activation_backward,
    kernel=("gemm_activation", "gemm_activation_backward"),
    fake=lambda out, dy, weight, pre, name: pre.new_empty(pre.shape),
)
"""Returns dpre = (dy weight) act'(pre) and writes act(pre), which the gradient of fc2's weight needs, to the contiguous `out`: it
may be pre itself. All in one dtype; name as in gemm_activation."""
