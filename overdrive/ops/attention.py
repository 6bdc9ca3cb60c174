"""Attention with its softmax statistics, and the gradients of Q, K and V, which can come back as one matrix.

Shapes: B batch, H heads, G groups of K/V heads (H % G == 0), S queries, T keys, D head dim of Q and K, E head dim of V. Q, K and V
are views [B, H, S, D], [B, G, T, D], [B, G, T, E] of any strides whose last is 1. causal: the last query sees every key, each
earlier one a key less; S <= T.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from overdrive.ops.library import define


def new_output(query: torch.Tensor, value_dim: int) -> torch.Tensor:
    """An empty [B, H, S, E] whose memory is [B, S, H, E] or [S, B, H, E], as the query's tokens lie."""
    batch, heads, length, _ = query.shape
    if query.stride(0) > query.stride(2):
        return query.new_empty((batch, length, heads, value_dim)).transpose(1, 2)
    return query.new_empty((length, batch, heads, value_dim)).permute(1, 2, 0, 3)


@functools.cache
def _row(*spans: tuple[int, int, int, int]) -> int:
    """The length of the row that spans (start, count, stride, width) fill without gap or overlap; 0 if they do not."""
    end = 0
    for start, width in sorted((start + i * stride, width) for start, count, stride, width in spans for i in range(count)):
        if start != end:
            return 0
        end += width
    return end


def places_in_one_matrix(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> list[int]:
    """Offset and strides (of batch, heads, sequence) of Q, then K, then V in the dense matrix of tokens by features that they are,
    each element of it in one of them; [] if there is no such matrix.
    """
    (batch, _, length, _), start, places, spans = query.shape, query.storage_offset(), [], []
    storage, steps = query.untyped_storage()._cdata, set()
    for x in (query, key, value):
        (b, heads, s, width), (across, stride, along, last), place = x.shape, x.stride(), x.storage_offset() - start
        if (b, s, last) != (batch, length, 1) or x.untyped_storage()._cdata != storage or x.dtype != query.dtype:
            return []
        places += (place, across, stride, along)
        spans.append((place, heads, stride, width))
        steps.add((across if batch > 1 else 0, along if length > 1 else 0))
    row = _row(*spans)
    batch_first = (row * length if batch > 1 else 0, row if length > 1 else 0)
    batch_second = (row if batch > 1 else 0, row * batch if length > 1 else 0)
    return places if row > 0 and steps in ({batch_first}, {batch_second}) else []


def views_at(places: list[int], flat: torch.Tensor, *shapes: torch.Size) -> tuple[torch.Tensor, ...]:
    """Views of `flat`, such a matrix, of those shapes in those places."""
    return tuple(flat.as_strided(shape, (*places[i + 1 : i + 4], 1), places[i]) for shape, i in zip(shapes, (0, 4, 8)))


def _wide(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)


def _scores(query: torch.Tensor, key: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    scores = query @ key.transpose(-1, -2) * scale
    if not causal:
        return scores
    queries, keys = scores.shape[-2:]
    later = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).triu(keys - queries + 1)
    return scores.masked_fill(later, -torch.inf)


def _attention(query, key, value, causal, scale) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = _wide(query, key, value)
    repeats = q.shape[1] // k.shape[1]
    scores = _scores(q, k.repeat_interleave(repeats, 1), causal, scale)
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp() @ v.repeat_interleave(repeats, 1)
    return new_output(query, value.shape[3]).copy_(out), lse.float()


def _attention_fake(query, key, value, causal, scale) -> tuple[torch.Tensor, torch.Tensor]:
    return new_output(query, value.shape[3]), query.new_empty(query.shape[:3], dtype=torch.float32)


attention_forward = define(
    "attention_forward(Tensor query, Tensor key, Tensor value, bool causal, float scale) -> (Tensor, Tensor)",
    reference=_attention,
    kernel=("attention", "attention_forward"),
    fake=_attention_fake,
)
"""softmax(scale * Q K^T, masked) V and the log of each row's softmax denominator, f32 [B, H, S]. On GPUs by flash-attn-4."""


def _gradients(dout, query, key, value, out, lse, causal, scale, places) -> tuple[torch.Tensor | None, ...]:
    dy, q, k, v, o = _wide(dout, query, key, value, out)
    groups = k.shape[1]
    repeats = q.shape[1] // groups
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    p = (_scores(q, k, causal, scale) - lse[..., None]).exp()
    ds = p * (dy @ v.transpose(-1, -2) - (dy * o).sum(-1, keepdim=True)) * scale
    per_head = ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ dy
    gradients = (ds @ k, *(x.unflatten(1, (groups, repeats)).sum(2) for x in per_head))
    outputs = new_gradients(query, key, value, places)
    for x, gradient in zip(views_at(places, outputs[0], query.shape, key.shape, value.shape) if places else outputs, gradients):
        x.copy_(gradient)
    return outputs


def new_gradients(query, key, value, places) -> tuple[Any, ...]:
    """attention_backward's outputs, uninitialised."""
    if places:
        return query.new_empty(query.numel() + key.numel() + value.numel()), None, None
    return tuple(torch.empty_like(x) for x in (query, key, value))


attention_backward = define(
    "attention_backward(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, bool causal, float scale, "
    "int[] places) -> (Tensor, Tensor, Tensor)",
    reference=_gradients,
    kernel=("attention", "attention_backward"),
    fake=lambda dout, query, key, value, out, lse, causal, scale, places: new_gradients(query, key, value, places),
)
"""(dQ, dK, dV); with `places_in_one_matrix` all of them in the first tensor, `views_at` those places."""
