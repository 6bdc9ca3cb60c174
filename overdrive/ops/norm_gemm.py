"""y = norm(x) w^T + b in one op, for few tokens: the norm's output is never written to memory.

Shapes: x [T, K]; gamma, beta [K]; weight [N, K]; bias [N]; y [T, N]. The statistics and the affine map are f32; the norm's output
is rounded to x's dtype before the product and the product summed in f32, as by `ops.norm` and `ops.gemm` one after the other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from overdrive.ops.library import define
from overdrive.ops.norm import normalized, statistics


def _norm_gemm(x, gamma, beta, weight, bias, eps, zero_centered, rms) -> torch.Tensor:
    y = normalized(x, *statistics(x, eps, rms), gamma, beta, zero_centered)
    return F.linear(y.to(x.dtype), weight, bias)


norm_gemm = define(
    "norm_gemm(Tensor x, Tensor gamma, Tensor? beta, Tensor weight, Tensor? bias, float eps, bool zero_centered, bool rms) "
    "-> Tensor",
    reference=_norm_gemm,
    kernel=("norm_gemm", "norm_gemm"),
    fake=lambda x, gamma, beta, weight, bias, eps, zero_centered, rms: x.new_empty((x.shape[0], weight.shape[0])),
)
"""norm(x) @ weight.T + bias in x's dtype, which is the weight's and the bias's too. Its backward is that of norm and gemm."""
