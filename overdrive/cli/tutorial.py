"""What Transformer Engine's quickstart tutorial imports as `quickstart_utils`, and what `overdrive quickstart` measures with.

Shapes: S sequence, B batch, H heads, D head dim.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import overdrive.pytorch as te
from overdrive.bench.plain import share, share_mlp, share_whole
from overdrive.bench.timing import first_backward

__all__ = [
    "BasicMLP",
    "DotProductAttention",
    "share_parameters_with_basic_te_model",
    "share_parameters_with_fused_te_model",
    "share_parameters_with_transformerlayer_te_model",
    "speedometer",
]


def speedometer(
    module: nn.Module,
    input: Tensor,
    output_grad: Tensor,
    forward_kwargs: Mapping[str, Any] | None = None,
    autocast_kwargs: Mapping[str, Any] | None = None,
    fp8_autocast_kwargs: Mapping[str, Any] | None = None,
    timing_iters: int = 50,
    warmup_iters: int = 50,
) -> float:
    """Print and return the mean time in milliseconds of one forward and backward of `module`.

    `autocast_kwargs` go to `te.autocast`; `fp8_autocast_kwargs`, the older name, to `te.fp8_autocast`. Without either the
    module runs in the precision of its parameters.
    """
    if autocast_kwargs is not None and fp8_autocast_kwargs is not None:
        raise ValueError("speedometer takes autocast_kwargs or its older name fp8_autocast_kwargs, not both")

    def step() -> None:
        if fp8_autocast_kwargs is not None:
            context = te.fp8_autocast(**fp8_autocast_kwargs)
        else:
            context = te.autocast(**(autocast_kwargs or {"enabled": False}))
        with context:
            output = module(input, **(forward_kwargs or {}))
        output.backward(output_grad)

    milliseconds = mean_time(step, input.device, timing_iters, warmup_iters)
    print(f"Mean time: {milliseconds:.3f} ms")
    return milliseconds


def mean_time(step: Callable[[], None], device: torch.device, timing_iters: int, warmup_iters: int) -> float:
    """Mean time of `step` in milliseconds: the GPU's own clock on a GPU, the wall clock on a CPU."""
    with first_backward():
        for _ in range(warmup_iters):
            step()
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(timing_iters):
            step()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / timing_iters
    began = time.perf_counter()
    for _ in range(timing_iters):
        step()
    return (time.perf_counter() - began) * 1e3 / timing_iters


class DotProductAttention(nn.Module):
    """Attention in four plain PyTorch steps, scores and all: what a fused kernel is compared with."""

    def __init__(self, num_attention_heads: int, kv_channels: int, attention_dropout: float) -> None:
        super().__init__()
        self.hidden_size = num_attention_heads * kv_channels
        self.scale = kv_channels**-0.5
        self.dropout = nn.Dropout(attention_dropout)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """`[S, B, H, D]` three times in, `[S, B, H * D]` out. True in `attention_mask` hides a position."""
        q_BHSD, k_BHSD, v_BHSD = (t.permute(1, 2, 0, 3) for t in (query * self.scale, key, value))
        scores_BHSS = q_BHSD @ k_BHSD.transpose(-1, -2)
        if attention_mask is not None:
            scores_BHSS = scores_BHSS.masked_fill(attention_mask, torch.finfo(scores_BHSS.dtype).min)
        context_BHSD = self.dropout(scores_BHSS.softmax(dim=-1)) @ v_BHSD
        return context_BHSD.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), self.hidden_size)


class BasicMLP(nn.Module):
    """Linear, GELU, Linear. `linear` chooses whose Linear."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int, linear: Callable[..., nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.linear1 = linear(hidden_size, ffn_hidden_size, bias=True)
        self.linear2 = linear(ffn_hidden_size, hidden_size, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., hidden_size]` in and out."""
        return self.linear2(nn.functional.gelu(self.linear1(x), approximate="tanh"))


def share_parameters_with_basic_te_model(te_model: Any, basic_model: Any) -> None:
    """Let a layer of `te.Linear` and `te.LayerNorm` use the parameters of the plain PyTorch layer."""
    for name in ("ln1", "qkv_projection", "projection", "ln2"):
        share(getattr(te_model, name), getattr(basic_model, name))
    for name in ("linear1", "linear2"):
        share(getattr(te_model.mlp, name), getattr(basic_model.mlp, name))


def share_parameters_with_fused_te_model(te_model: Any, basic_model: Any) -> None:
    """Let a layer of `te.LayerNormLinear` and `te.LayerNormMLP` use the parameters of the plain PyTorch layer."""
    share(te_model.ln_qkv, basic_model.ln1, "layer_norm_")
    share(te_model.ln_qkv, basic_model.qkv_projection)
    share(te_model.projection, basic_model.projection)
    share_mlp(te_model.ln_mlp, basic_model)


def share_parameters_with_transformerlayer_te_model(te_model: Any, basic_model: Any) -> None:
    """Let a `te.TransformerLayer` use the parameters of the plain PyTorch layer."""
    share_whole(te_model, basic_model)
