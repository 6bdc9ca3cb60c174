"""The Transformer layer in plain PyTorch that everything else is compared with, and how others come to use its parameters.

Shapes: S sequence, B batch, T = S * B tokens, H heads, G groups of K/V heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": partial(F.gelu, approximate="tanh"), "silu": F.silu}
GATED = {"geglu": "gelu", "swiglu": "silu"}
ACTIVATIONS = (*FUNCTIONS, *GATED)
"""The smooth ones: rounding flips gradients at a kink, which no bound on errors could tell from a mistake."""

NORMALIZATIONS = {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm}


@dataclass(frozen=True)
class Size:
    """The sizes of a layer and of its input."""

    hidden: int
    ffn: int
    heads: int
    sequence: int
    batch: int


@dataclass(frozen=True)
class Spec(Size):
    """Which layer, and what it is given. groups: heads of K and V, one for each head unless given."""

    groups: int | None = None
    activation: str = "gelu"
    normalization: str = "LayerNorm"
    bias: bool = True
    causal: bool = True
    dropout: float = 0.0
    dtype: torch.dtype = torch.bfloat16

    @property
    def tokens(self) -> int:
        """T."""
        return self.sequence * self.batch

    @property
    def kv_heads(self) -> int:
        """G."""
        return self.groups or self.heads

    @property
    def head_dim(self) -> int:
        """D."""
        return self.hidden // self.heads

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the four linears."""
        wide = 2 * self.ffn if self.activation in GATED else self.ffn
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        return {
            "qkv": (self.hidden, qkv),
            "proj": (self.hidden, self.hidden),
            "fc1": (self.hidden, wide),
            "fc2": (self.ffn, self.hidden),
        }

    @property
    def gemms(self) -> list[tuple[int, int, int]]:
        """(M, N, K) of the products [M, K] @ [K, N] of a step: each linear's output, input gradient and weight gradient."""
        t = self.tokens
        return [gemm for k, n in self.linears.values() for gemm in ((t, n, k), (t, k, n), (n, k, t))]

    @property
    def attention_flops(self) -> tuple[float, float]:
        """Operations of attention: two products forward, five backward, half of each where a token sees only those before it."""
        product = 2 * self.batch * self.heads * self.sequence**2 * self.head_dim / (2 if self.causal else 1)
        return 2 * product, 5 * product

    @property
    def flops(self) -> float:
        """Operations of a step's GEMMs and attention."""
        return sum(2 * m * n * k for m, n, k in self.gemms) + sum(self.attention_flops)


class MLP(nn.Module):
    """Linear, activation, Linear; a gated activation takes the first half of what it gets."""

    def __init__(self, spec: Spec, **like: Any) -> None:
        super().__init__()
        (hidden, wide), (ffn, _) = spec.linears["fc1"], spec.linears["fc2"]
        self.linear1 = nn.Linear(hidden, wide, bias=spec.bias, **like)
        self.linear2 = nn.Linear(ffn, hidden, bias=spec.bias, **like)
        self.gated = spec.activation in GATED
        self.function = FUNCTIONS[GATED.get(spec.activation, spec.activation)]

    def forward(self, x: Tensor) -> Tensor:
        """`[..., hidden]` in and out."""
        x = self.linear1(x)
        if self.gated:
            a, b = x.chunk(2, dim=-1)
            return self.linear2(self.function(a) * b)
        return self.linear2(self.function(x))


class EagerLayer(nn.Module):
    """x + attention(norm(x)), then the same with an MLP, as one writes it: torch's fused attention, nothing else fused.

    Rows of the QKV weight lie as [H, 3, D], with fewer groups than heads as [Q; K; V]: both give Q, K and V as views.
    """

    def __init__(self, spec: Spec, device: torch.device | None = None) -> None:
        super().__init__()
        like: dict[str, Any] = {"device": device, "dtype": spec.dtype}
        norm = NORMALIZATIONS[spec.normalization]
        self.heads, self.groups, self.head_dim = spec.heads, spec.kv_heads, spec.head_dim
        self.causal, self.dropout = spec.causal, spec.dropout
        self.ln1 = norm(spec.hidden, eps=1e-5, **like)
        self.qkv_projection = nn.Linear(*spec.linears["qkv"], bias=spec.bias, **like)
        self.projection = nn.Linear(*spec.linears["proj"], bias=spec.bias, **like)
        self.ln2 = norm(spec.hidden, eps=1e-5, **like)
        self.mlp = MLP(spec, **like)

    def forward(self, x: Tensor) -> Tensor:
        """`[S, B, hidden]` in and out."""
        dropout = self.dropout if self.training else 0.0
        x = x + F.dropout(self.projection(self.attention(self.qkv_projection(self.ln1(x)), dropout)), dropout)
        return x + F.dropout(self.mlp(self.ln2(x)), dropout)

    def attention(self, qkv: Tensor, dropout: float) -> Tensor:
        """`[S, B, (H + 2 G) * D]` in, `[S, B, H * D]` out."""
        grouped = self.groups != self.heads
        if grouped:
            widths = [self.heads * self.head_dim, self.groups * self.head_dim, self.groups * self.head_dim]
            parts = [part.unflatten(-1, (-1, self.head_dim)) for part in qkv.split(widths, dim=-1)]
        else:
            parts = qkv.unflatten(-1, (self.heads, -1)).chunk(3, dim=-1)
        q_BHSD, k_BGSD, v_BGSD = (part.permute(1, 2, 0, 3) for part in parts)
        context_BHSD = F.scaled_dot_product_attention(
            q_BHSD, k_BGSD, v_BGSD, dropout_p=dropout, is_causal=self.causal, enable_gqa=grouped
        )
        return context_BHSD.permute(2, 0, 1, 3).flatten(2)


def share_plain(target: nn.Module, source: nn.Module) -> None:
    """Let one plain layer use the parameters of another."""
    for name, parameter in source.named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(target.get_submodule(owner), leaf, parameter)


def share(target: Any, source: Any, prefix: str = "") -> None:
    """Let `target` use the very weight and bias of `source`, under the names `prefix + "weight"` and `prefix + "bias"`."""
    for name in ("weight", "bias"):
        parameter = getattr(source, name, None)
        if parameter is not None:
            setattr(target, prefix + name, parameter)


def share_mlp(target: Any, plain: Any) -> None:
    """Let a `te.LayerNormMLP` use the parameters of the plain layer's second half."""
    share(target, plain.ln2, "layer_norm_")
    share(target, plain.mlp.linear1, "fc1_")
    share(target, plain.mlp.linear2, "fc2_")


def share_whole(target: Any, plain: Any) -> None:
    """Let a `te.TransformerLayer` use the parameters of the plain layer; one QKV weight takes the place of three."""
    share(target.self_attention.layernorm_qkv, plain.ln1, "layer_norm_")
    share(target.self_attention.layernorm_qkv, plain.qkv_projection)
    share(target.self_attention.proj, plain.projection)
    share_mlp(target.layernorm_mlp, plain)
