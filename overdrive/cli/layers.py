"""The Transformer layer of the tutorial, first in plain PyTorch, then from ever larger pieces.

Shapes: S sequence, B batch, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import overdrive.pytorch as te
from overdrive.cli.tutorial import BasicMLP, DotProductAttention


@dataclass(frozen=True)
class Size:
    """What every stage of the quickstart is built from."""

    hidden: int
    ffn: int
    heads: int
    sequence: int
    batch: int


class SdpaAttention(nn.Module):
    """`DotProductAttention` through torch's own fused attention."""

    def __init__(self, num_attention_heads: int, kv_channels: int, attention_dropout: float) -> None:
        super().__init__()
        self.dropout = attention_dropout

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """`[S, B, H, D]` three times in, `[S, B, H * D]` out. The only mask this command makes is the causal one."""
        q_BHSD, k_BHSD, v_BHSD = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        context_BHSD = nn.functional.scaled_dot_product_attention(
            q_BHSD,
            k_BHSD,
            v_BHSD,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=attention_mask is not None,
        )
        return context_BHSD.permute(2, 0, 1, 3).flatten(2)


class PlainLayer(nn.Module):
    """Pre-norm layer of Linear and LayerNorm: PyTorch's by default, overdrive's on request."""

    def __init__(
        self,
        size: Size,
        dropout: float,
        linear: Callable[..., nn.Module] = nn.Linear,
        layer_norm: Callable[..., nn.Module] = nn.LayerNorm,
        attention: Callable[..., nn.Module] = DotProductAttention,
    ) -> None:
        super().__init__()
        self.heads = size.heads
        self.ln1 = layer_norm(size.hidden, eps=1e-5)
        self.qkv_projection = linear(size.hidden, 3 * size.hidden, bias=True)
        self.attention = attention(size.heads, size.hidden // size.heads, dropout)
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


def transformer_layer(size: Size, dropout: float, causal: bool) -> te.TransformerLayer:
    """The same layer in one module."""
    return te.TransformerLayer(
        size.hidden,
        size.ffn,
        size.heads,
        layernorm_epsilon=1e-5,
        hidden_dropout=dropout,
        attention_dropout=dropout,
        self_attn_mask_type="causal" if causal else "no_mask",
    )


def causal_mask(size: Size, device: torch.device) -> Tensor:
    """True above the diagonal: a token does not see those after it."""
    return torch.ones(size.sequence, size.sequence, dtype=torch.bool, device=device).triu(1)
