"""The Transformer layer of the tutorial, first in plain PyTorch, then from ever larger pieces.

Shapes: S sequence, B batch, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import overdrive.pytorch as te
from overdrive.bench.plain import Size
from overdrive.cli.tutorial import BasicMLP, DotProductAttention


class PlainLayer(nn.Module):
    """Pre-norm layer of Linear and LayerNorm: PyTorch's by default, overdrive's on request."""

    def __init__(
        self,
        size: Size,
        dropout: float,
        linear: Callable[..., nn.Module] = nn.Linear,
        layer_norm: Callable[..., nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.heads = size.heads
        self.ln1 = layer_norm(size.hidden, eps=1e-5)
        self.qkv_projection = linear(size.hidden, 3 * size.hidden, bias=True)
        self.attention = DotProductAttention(size.heads, size.hidden // size.heads, dropout)
        self.projection = linear(size.hidden, size.hidden, bias=True)
        self.dropout = nn.Dropout(dropout)
        self.ln2 = layer_norm(size.hidden, eps=1e-5)
        self.mlp = BasicMLP(size.hidden, size.ffn, linear)

    def forward(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        """`[S, B, hidden]` in and out."""
        qkv = self.qkv_projection(self.ln1(x)).unflatten(-1, (self.heads, -1))
        x = x + self.dropout(self.projection(self.attention(*qkv.chunk(3, dim=-1), attention_mask)))
        return x + self.dropout(self.mlp(self.ln2(x)))


class FusedLayer(nn.Module):
    """The same layer of LayerNormLinear and LayerNormMLP."""

    def __init__(self, size: Size, dropout: float) -> None:
        super().__init__()
        self.heads = size.heads
        self.ln_qkv = te.LayerNormLinear(size.hidden, 3 * size.hidden, eps=1e-5, bias=True)
        self.attention = DotProductAttention(size.heads, size.hidden // size.heads, dropout)
        self.projection = te.Linear(size.hidden, size.hidden, bias=True)
        self.dropout = nn.Dropout(dropout)
        self.ln_mlp = te.LayerNormMLP(size.hidden, size.ffn, eps=1e-5, bias=True)

    def forward(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        """`[S, B, hidden]` in and out."""
        qkv = self.ln_qkv(x).unflatten(-1, (self.heads, -1))
        x = x + self.dropout(self.projection(self.attention(*qkv.chunk(3, dim=-1), attention_mask)))
        return x + self.dropout(self.ln_mlp(x))


def causal_mask(size: Size, device: torch.device) -> Tensor:
    """True above the diagonal: a token does not see those after it."""
    return torch.ones(size.sequence, size.sequence, dtype=torch.bool, device=device).triu(1)
