"""Norms of Q and K over the channels of a head (arXiv:2010.04245, arXiv:2302.05442)."""

from __future__ import annotations

import torch

from overdrive.functional.norm import NormOptions, layer_norm
from overdrive.modules.checks import epsilon, one_of
from overdrive.modules.layernorm import LayerNorm, RMSNorm

QK_NORMS = (None, "L2Normalization", "RMSNorm", "LayerNorm")


class L2Normalization(torch.nn.Module):
    """y = x / sqrt(sum(x^2) + eps) over the last dimension, in f32; no parameters."""

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = epsilon("L2Normalization", eps)

    def forward(self, inp: torch.Tensor) -> torch.Tensor:
        """inp [.., K] -> the same shape and dtype: the RMS norm with another eps and the constant gain 1 / sqrt(K)."""
        size = inp.shape[-1]
        gain = inp.new_full((size,), size**-0.5, dtype=torch.float32)
        return layer_norm(inp, gain, None, NormOptions(self.eps / size, False, True))

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


def head_norm(
    module: str, kind: str | None, channels: int, eps: float, dtype: torch.dtype | None, device: torch.device | str | None
) -> torch.nn.Module | None:
    """The norm that qk_norm_type names, of one of Q and K; None without."""
    if one_of(module, "qk_norm_type", kind, QK_NORMS) is None:
        return None
    eps = epsilon(f"{module}: qk_norm_eps", eps)
    if kind == "L2Normalization":
        return L2Normalization(eps)
    return (RMSNorm if kind == "RMSNorm" else LayerNorm)(channels, eps=eps, params_dtype=dtype, device=device)
