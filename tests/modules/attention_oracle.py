"""Attention and Transformer layers in plain PyTorch and float64, written for the tests from the formulas alone."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def attend(q, k, v, hidden=None, scale=None) -> torch.Tensor:
    """q [B, H, S, D], k [B, G, T, D], v [B, G, T, E], hidden True = masked out -> [B, H, S, E]; rows that see nothing are zero."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = q @ k.transpose(-1, -2) * (scale if scale is not None else 1 / math.sqrt(q.shape[-1]))
    if hidden is None:
        return scores.softmax(-1) @ v
    hidden = hidden.broadcast_to(scores.shape)
    scores = scores.masked_fill(hidden, -1e300).softmax(-1).masked_fill(hidden.all(-1, keepdim=True), 0.0)
    return scores @ v


def slopes(heads: int) -> list[float]:
    """ALiBi's: 2^(-8 i / n) for the first n heads, n the power of two below, then the odd ones of twice as many heads."""
    n = 1
    while n * 2 <= heads:
        n *= 2
    return [2 ** (-8 * (i + 1) / n) for i in range(n)] + [2 ** (-8 * (i + 1) / (2 * n)) for i in range(0, 2 * n, 2)][: heads - n]


def one_sequence(
    q,
    k,
    v,
    *,
    causal=False,
    window=(-1, -1),
    bottom_right=False,
    hidden=None,
    bias=None,
    pre=False,
    alibi=None,
    offset=None,
    scale=None,
):
    """One sequence without padding, row by row: q [S, H, D], k [T, G, D], v [T, G, E] -> ([S, H, E], largest score of each head).

    window: keys seen to the left and right, -1 = all. bias, hidden (True = masked out) [H, S, T]; alibi: slope of each head;
    offset: each head's logit of a key whose value is zero.
    """
    queries, heads, keys = q.shape[0], q.shape[1], k.shape[0]
    scale = q.shape[2] ** -0.5 if scale is None else scale
    shift = keys - queries if bottom_right else 0
    rows, largest = [], [-math.inf] * heads
    for row in range(queries):
        for head in range(heads):
            group = head * k.shape[1] // heads
            seen = [
                col
                for col in range(keys)
                if not (causal and col > row + shift)
                and not (window[0] >= 0 and col < row + shift - window[0])
                and not (window[1] >= 0 and col > row + shift + window[1])
                and not (hidden is not None and hidden[head, row, col])
            ]
            if not seen:
                rows.append(q.new_zeros(v.shape[2]))
                continue
            logits = k[seen, group] @ q[row, head]
            if bias is not None and pre:
                logits = logits + bias[head, row, seen]
            logits = logits * scale
            if bias is not None and not pre:
                logits = logits + bias[head, row, seen]
            if alibi is not None:
                logits = logits - alibi[head] * torch.tensor([abs(row + shift - col) for col in seen], dtype=q.dtype)
            largest[head] = max(largest[head], logits.max().item())
            weights = (logits - logits.max().detach()).exp()
            total = weights.sum()
            if offset is not None:
                total = total + (offset[head] - logits.max().detach()).exp()
            rows.append(weights / total @ v[seen, group])
    return torch.stack(rows).view(queries, heads, v.shape[2]) if rows else q.new_zeros(0, heads, v.shape[2]), largest


def hidden_by(mask_type: str, mask, queries: int, keys: int) -> torch.Tensor | None:
    """What a mask type hides, [B or 1, 1, S, T]."""
    row, col = torch.arange(queries)[:, None], torch.arange(keys)
    hidden = torch.zeros(1, 1, queries, keys, dtype=torch.bool)
    if "causal" in mask_type:
        hidden = hidden | (col > row + (keys - queries if "bottom_right" in mask_type else 0))
    if "padding" in mask_type:
        query_mask, key_mask = mask if isinstance(mask, tuple) else (mask, mask)
        hidden = hidden | key_mask | query_mask.transpose(2, 3)
    return hidden | mask if mask_type == "arbitrary" else hidden


def heads_first(x, layout: str) -> torch.Tensor:
    """[S, B, H, D] or [B, S, H, D] -> [B, H, S, D]."""
    return x.permute(1, 2, 0, 3) if layout == "sbhd" else x.transpose(1, 2)


def heads_last(x, layout: str) -> torch.Tensor:
    """[B, H, S, D] -> [S, B, H * D] or [B, S, H * D]."""
    return (x.permute(2, 0, 1, 3) if layout == "sbhd" else x.transpose(1, 2)).flatten(2)


def norm(x, weight, bias, eps=1e-5, zero_centered=False) -> torch.Tensor:
    """LayerNorm, or RMSNorm where bias is None."""
    gain = weight + 1 if zero_centered else weight
    if bias is None:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain + bias


def linear(x, p: dict, name: str) -> torch.Tensor:
    """x W^T (+ b), with W and b concatenated from split ones where they are split."""
    parts = [name + part for part in ("query_", "key_", "value_") if f"{name}{part}weight" in p] or [name]
    y = x @ torch.cat([p[part + "weight"] for part in parts]).t()
    return y + torch.cat([p[part + "bias"] for part in parts]) if parts[0] + "bias" in p else y


def qkv(y, heads: int, groups: int, dim: int, interleaved: bool) -> tuple[torch.Tensor, ...]:
    """[.., .., features] -> q [.., .., H, D], k and v [.., .., G, D]."""
    lead = y.shape[:2]
    if interleaved:
        y = y.reshape(*lead, groups, heads // groups + 2, dim)
        return y[..., :-2, :].reshape(*lead, heads, dim), y[..., -2, :], y[..., -1, :]
    q, k, v = y.tensor_split([heads * dim, (heads + groups) * dim], -1)
    return q.reshape(*lead, heads, dim), k.reshape(*lead, groups, dim), v.reshape(*lead, groups, dim)


def multihead(x, p: dict, heads: int, groups: int, dim: int, layout="sbhd", mask_type="causal", mask=None, interleaved=False):
    """(attention output before proj's bias, proj's bias, norm output) of MultiheadAttention's parameters p."""
    normed = x
    if "layernorm_qkv.layer_norm_weight" in p:
        normed = norm(x, p["layernorm_qkv.layer_norm_weight"], p.get("layernorm_qkv.layer_norm_bias"))
    y = linear(normed, p, "layernorm_qkv." if normed is not x else "qkv.")
    q, k, v = (heads_first(part, layout) for part in qkv(y, heads, groups, dim, interleaved))
    out = attend(q, k, v, hidden_by(mask_type, mask, q.shape[2], k.shape[2]).to(x.device))
    return heads_last(out, layout) @ p["proj.weight"].t(), p.get("proj.bias", 0.0), normed


def cross(x, encoder, p: dict, heads: int, groups: int, dim: int, layout="sbhd", mask_type="no_mask", mask=None, interleaved=False):
    """`multihead` with attention_type="cross": K and V of `encoder`, laid out as [groups, 2, dim] or as [K; V]."""
    normed, name = x, "query_layer."
    if "layernorm_query.layer_norm_weight" in p:
        name = "layernorm_query."
        normed = norm(x, p[name + "layer_norm_weight"], p.get(name + "layer_norm_bias"))
    q = linear(normed, p, name).unflatten(-1, (heads, dim))
    key_value = linear(encoder, p, "key_value.")
    if interleaved:
        key_value = key_value.unflatten(-1, (groups, 2, dim))
        k, v = key_value[..., 0, :], key_value[..., 1, :]
    else:
        k, v = (part.unflatten(-1, (groups, dim)) for part in key_value.tensor_split(2, -1))
    q, k, v = (heads_first(part, layout) for part in (q, k, v))
    out = attend(q, k, v, hidden_by(mask_type, mask, q.shape[2], k.shape[2]).to(x.device))
    return heads_last(out, layout) @ p["proj.weight"].t(), p.get("proj.bias", 0.0), normed


ACTIVATIONS = {
    "gelu": lambda h: F.gelu(h, approximate="tanh"),
    "swiglu": lambda h: F.silu(h.tensor_split(2, -1)[0]) * h.tensor_split(2, -1)[1],
}


def part_of(p: dict, module: str) -> dict:
    """The parameters of one submodule."""
    return {name.removeprefix(f"{module}."): value for name, value in p.items() if name.startswith(f"{module}.")}


def layer(x, p: dict, *, mode="", activation="gelu", encoder=None, enc_dec_mask_type="no_mask", enc_dec_mask=None, **attention):
    """TransformerLayer's forward in evaluation. mode: "", "post", "output" or "parallel", which norm and residual placement."""
    mlp = part_of(p, "layernorm_mlp")
    attended, bias, normed = multihead(x, part_of(p, "self_attention"), **attention)
    hidden = (normed if mode == "post" else x) + attended + bias
    if encoder is not None:
        masking = {"mask_type": enc_dec_mask_type, "mask": enc_dec_mask}
        attended, bias, normed = cross(hidden, encoder, part_of(p, "inter_attention"), **{**attention, **masking})
        hidden = (normed if mode == "post" else hidden) + attended + bias
    source = x if mode == "parallel" else hidden
    normed = norm(source, mlp["layer_norm_weight"], mlp.get("layer_norm_bias"))
    out = linear(ACTIVATIONS[activation](linear(normed, mlp, "fc1_")), mlp, "fc2_")
    out = (normed if mode == "post" else hidden) + out
    return norm(out, p["layernorm.weight"], p.get("layernorm.bias")) if mode == "output" else out
