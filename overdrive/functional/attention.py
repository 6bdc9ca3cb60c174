"""Scaled dot-product attention by the backend that attention_backends chooses, or as it is defined.

Shapes: B batch, H heads, G groups of K/V heads (H % G == 0), S queries, T keys, D head dim of Q and K, E head dim of V. Backends
read views [B, H, S, D], [B, G, T, D], [B, G, T, E] of any strides, so nothing is copied between the QKV GEMM and the kernel, and
they answer in the query's memory order, so nothing is copied after it either. flash-attn-4 also writes the gradients of Q, K and V
into one matrix where Q, K and V are views of one.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel

from overdrive.functional.attention_backends import BY_NAME, SDPA, Case, Decision, cannot_run, decide, route, torch_refusal
from overdrive.functional.attention_mask import Mask, MaskKind, document_mask, places, score_mask, square_causal
from overdrive.functional.flex import flex
from overdrive.functional.node import applied, first_order
from overdrive.functional.packing import Packing, Side, alike, packings
from overdrive.ops.attention import attention_backward, attention_forward, places_in_one_matrix, views_at

_LARGE = 2**36
"""Multiplications (batch x heads x queries x keys x head dim) from which on layers keep the GPU busier than the host."""


@functools.cache
def _priority(names: tuple[str, ...]) -> list[int]:
    ordered = [int(SDPA[name]) for name in names]  # pyright: ignore[reportArgumentType]
    return ordered + [backend for backend in torch._C._get_sdp_priority_order() if backend not in ordered]


def _sdpa(names, query, key, value, mask, causal, dropout, scale) -> torch.Tensor:
    """F.scaled_dot_product_attention by the first of `names` that torch lets run."""
    grouped = query.shape[1] != key.shape[1]
    if torch.compiler.is_compiling() or len(names) == 1:
        forced = None if torch.compiler.is_compiling() else BY_NAME[names[0]]
        if forced and (reason := torch_refusal(forced, query, key, value, mask, causal, dropout)):
            raise cannot_run(forced.name, reason)
        with sdpa_kernel([SDPA[name] for name in names], set_priority=True):
            return F.scaled_dot_product_attention(query, key, value, mask, dropout, causal, scale=scale, enable_gqa=grouped)
    # what sdpa_kernel does, without its 14 us of switching each backend off and on
    previous = torch._C._get_sdp_priority_order()
    torch._C._set_sdp_priority_order(_priority(names))
    try:
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, causal, scale=scale, enable_gqa=grouped)
    finally:
        torch._C._set_sdp_priority_order(previous)


class FlashAttention4(torch.autograd.Function):
    """attention_forward, whose gradients are views of one matrix where Q, K and V are."""

    @staticmethod
    def forward(ctx: Any, query, key, value, causal, scale):
        out, lse = attention_forward(query, key, value, causal, scale)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, dout):  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, out, lse = ctx.saved_tensors
        places = [] if torch.compiler.is_compiling() else places_in_one_matrix(query, key, value)
        gradients = attention_backward(dout, query, key, value, out, lse, ctx.causal, ctx.scale, places)
        if places:
            gradients = views_at(places, gradients[0], query.shape, key.shape, value.shape)
        return *gradients, None, None


_flash_attention_4 = applied(FlashAttention4)


class Scores(NamedTuple):
    """What becomes of the scores besides scale and mask.

    bias [1 or B, 1 or H, 1 or S, T], added to Q K^T before it is scaled (pre_scale) or after. slopes f32 [H] or [B, H]: how much
    ALiBi takes off per step between a query's place and a key's. offset [H]: the logit of one more key, whose value is zero (0:
    softmax off by one). max_logit: also give each head's largest score.
    """

    bias: torch.Tensor | None = None
    pre_scale: bool = False
    slopes: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    max_logit: bool = False


def default_slopes(heads: int, device: torch.device | None = None) -> torch.Tensor:
    """f32 [heads]: 2^(-8 / n), its square, and so on for n heads, n a power of two; heads beyond that take the odd powers of its
    root (Press et al., arXiv:2108.12409).
    """
    whole = 2 ** (heads.bit_length() - 1)
    head = torch.arange(1, heads + 1, device=device, dtype=torch.float32)
    return torch.where(head <= whole, -8 * head / whole, -4 * (2 * (head - whole) - 1) / whole).exp2()


def _bias(scores: Scores, kind: MaskKind, mask: Mask, query: torch.Tensor, keys: int, scale: float | None) -> torch.Tensor | None:
    """What `scores` adds to the scaled scores, [1 or B, 1 or H, 1 or S, T]."""
    if scores.slopes is not None:
        rows, columns = places(kind, mask, query.shape[2], keys, query.device)
        slopes = scores.slopes.view(-1, query.shape[1], 1, 1)  # of every batch element or of each
        return -slopes * (rows - columns).abs()
    if scores.bias is None or not scores.pre_scale:
        return scores.bias
    return scores.bias * (query.shape[-1] ** -0.5 if scale is None else scale)


def _case(query, key, value, mask, causal, dropout, *scores) -> Any:
    kind = "tensor" if mask is not None else "causal" if causal else "none"
    drops = "none" if dropout == 0 else "any" if dropout * 16 % 1 else "sixteenths"
    batch, heads, queries, dim = query.shape
    _, groups, keys, value_dim = value.shape
    size = "large" if batch * heads * queries * keys * dim >= _LARGE else "small"
    return query.device.type, query.dtype, kind, drops, dim, value_dim, heads != groups, size, *scores


def _scores_case(scores: Scores | None, bias: torch.Tensor | None, *tensors: torch.Tensor) -> tuple[str, bool, bool, bool]:
    """What the Case of Q, K and V says of them."""
    if scores is None:
        return "none", False, False, False
    if bias is None:
        kind = "none"
    elif not bias.requires_grad or not torch.is_grad_enabled():
        kind = "constant"
    else:
        kind = "gradient" if any(x.requires_grad for x in tensors) else "gradient alone"
    return kind, bias is not None and bias.dtype != tensors[0].dtype, scores.offset is not None, scores.max_logit


def _repeated(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """K and V with a head for each of Q's."""
    return tuple(x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    scale: float | None = None,
) -> torch.Tensor:
    """[B, H, S, D], [B, G, T, D], [B, G, T, E] -> [B, H, S, E], by the best backend for the case.

    mask: bool, broadcast to [B, H, S, T], True = attend; every row attends to something. causal: S == T and no mask.
    Raises ValueError if OVERDRIVE_ATTENTION names a backend that cannot run it.
    """
    return scored_attention(query, key, value, mask, causal, dropout, scale)[0]


def scored_attention(
    query, key, value, mask, causal: bool, dropout: float, scale: float | None, scores: Scores | None = None, bias=None, dead=None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(what `attention` gives with `bias` [1 or B, 1 or H, 1 or S, T] added to the scaled scores, each head's largest or None)."""
    query, key, value = [x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value)]
    case = _case(query, key, value, mask, causal, dropout, *_scores_case(scores, bias, query, key, value))
    names, repeat = (("reference",), False) if query.numel() == 0 or key.numel() == 0 else route(*case)
    if names[0] == "flash-attn-4":
        return _flash_attention_4(query, key, value, causal, query.shape[-1] ** -0.5 if scale is None else scale), None
    offset, max_logit = (None, False) if scores is None else (scores.offset, scores.max_logit)
    if names[0] == "reference":
        return reference_attention(query, key, value, mask, causal, dropout, scale, bias, offset, max_logit, dead)
    if names[0] == "flex":
        return flex(query, key, value, mask, causal, scale, bias, offset), None
    if repeat:
        key, value = _repeated(query, key, value)
    if bias is not None:
        mask, causal = _biased(bias, mask, causal, query), False
    return _sdpa(names, query, key, value, mask, causal, dropout, scale), None


def _biased(bias: torch.Tensor | None, mask: torch.Tensor | None, causal: bool, query) -> torch.Tensor | None:
    """bias and mask as the one tensor [.., .., S, T] that torch adds to the scores, in the query's dtype only where the bias is:
    rounded to bf16, one of -8, where exp(-8) still counts, is off by up to 0.016, and its probability by as much of itself.
    """
    if causal:
        mask = square_causal(query.shape[2], query.device)
    if bias is None:
        return mask
    if mask is not None:
        bias = bias.masked_fill(~mask, -torch.inf)
    bias = bias.expand(-1, -1, query.shape[2], -1)
    if bias.dtype != query.dtype:
        return bias.to(torch.float64 if query.dtype == torch.float64 else torch.float32)
    # torch aligns strides for its kernels, not the beginning, which a compiler does not tell
    return bias if torch.compiler.is_compiling() or bias.storage_offset() % 8 == 0 else bias.clone()


def reference_attention(
    query, key, value, mask=None, causal=False, dropout=0.0, scale=None, bias=None, offset=None, max_logit=False, dead=None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention as it is defined, in plain PyTorch and f32 (f64 of f64): whatever no backend takes.

    dead: rows that count for nothing in each head's largest score, which is -inf where there is none.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    key, value = _repeated(query, key.to(dtype), value.to(dtype))
    with torch.autocast(query.device.type, enabled=False):
        logits = query.to(dtype) @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        mask = _biased(None, mask, causal, query)
        if bias is not None:
            logits = logits + bias
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        largest = None
        if max_logit:
            counted = logits.detach() if dead is None else logits.detach().masked_fill(dead, -torch.inf)
            lowest = counted.new_full((1, counted.shape[1], 1, 1), -torch.inf)
            largest = torch.cat([counted.transpose(0, 1).flatten(1), lowest.view(-1, 1)], 1).amax(1).float()
        if offset is not None:
            sink = offset.to(dtype).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
            probabilities = torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
        else:
            probabilities = logits.softmax(-1)
        out = F.dropout(probabilities, dropout) @ value
    return out.to(query.dtype), largest


def dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Mask,
    kind: MaskKind,
    batch_first: bool,
    dropout: float = 0.0,
    scale: float | None = None,
    scores: Scores | None = None,
) -> Any:
    """Attention of [S, B, H, D], or [B, S, H, D] if batch_first, to [S, B, H * E] or [B, S, H * E].

    attention_mask: bool, True = masked out, as `kind` reads it. A query that may attend to nothing gives zeros. With
    scores.max_logit the result is (that, f32 [H]).
    """
    query, key, value, bias, mask, causal, dead = _prepared(query, key, value, attention_mask, kind, batch_first, scale, scores)
    back = (0, 2, 1, 3) if batch_first else (2, 0, 1, 3)
    out, largest = scored_attention(query, key, value, mask, causal, dropout, scale, scores, bias, dead)
    out = out.permute(back)
    if dead is not None:  # where, as masked_fill copies first
        out = torch.where(dead.permute(back), 0.0, out)
    return out.flatten(2) if largest is None else (out.flatten(2), largest)


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    side_q: Side,
    side_kv: Side,
    kind: MaskKind,
    dropout: float = 0.0,
    scale: float | None = None,
    scores: Scores | None = None,
) -> Any:
    """dot_product_attention within each sequence of [N, H, D], [M, G, D], [M, G, E] -> [N, H * E]; tokens of none give zeros."""
    query, key, value = autocasted(query, key, value)
    backend = _packed_backend(query, key, value, side_q, side_kv, kind, dropout, scores)
    if backend == "flash-varlen":
        from overdrive.functional.flash_varlen import flash_varlen  # torch's part of it takes a while to load

        return flash_varlen(query, key, value, side_q, side_kv, kind.window, scale).flatten(1)
    packing_q, packing_kv = packings(side_q, side_kv)
    if backend == "flex":
        mask, offset = document_mask(kind, packing_q, packing_kv), None if scores is None else scores.offset
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        return flex(query, key, value, mask, False, scale, None, offset)[0].transpose(0, 1).flatten(1)
    out = dot_product_attention(*_padded(query, key, value, packing_q, packing_kv), kind, True, dropout, scale, scores)
    return (packing_q.pack(out[0]), out[1]) if isinstance(out, tuple) else packing_q.pack(out)


def _packed_backend(query, key, value, side_q: Side, side_kv: Side, kind: MaskKind, dropout: float, scores: Scores | None) -> str:
    """The backend that takes packed sequences as they lie, or "" if they are to be padded."""
    packed = _packed_case(side_q, side_kv, kind, scores)
    if query.numel() == 0 or key.numel() == 0 or not packed:
        return ""
    views = (x.transpose(0, 1)[None] for x in (query, key, value))
    name = route(*_case(*views, side_q.offsets, False, dropout, *_scores_case(scores, None), packed))[0][0]
    return name if packed in BY_NAME[name].packed else ""


def _packed_case(side_q: Side, side_kv: Side, kind: MaskKind, scores: Scores | None) -> str:
    """Case.packed; "" with biases, which are of padded sequences."""
    if scores is not None and (scores.bias is not None or scores.slopes is not None):
        return ""
    return "bottom-right" if kind.bottom_right or kind.window == (-1, -1) or alike(side_q, side_kv) else "top-left"


def _padded(query, key, value, packing_q: Packing, packing_kv: Packing) -> tuple[Any, Any, Any, Any]:
    """Packed Q, K and V as a batch, and its padding masks."""
    return packing_q.pad(query), packing_kv.pad(key), packing_kv.pad(value), (packing_q.padded, packing_kv.padded)


def _prepared(query, key, value, attention_mask, kind: MaskKind, batch_first: bool, scale: float | None, scores: Scores | None):
    """(Q, K and V as views [B, H, S, D], bias, score mask, causal, dead), see attention_mask.score_mask."""
    order = (0, 2, 1, 3) if batch_first else (1, 2, 0, 3)
    query, key, value = [x.permute(order) for x in autocasted(query, key, value)]
    bias = None if scores is None else _bias(scores, kind, attention_mask, query, key.shape[2], scale)
    return query, key, value, bias, *score_mask(kind, attention_mask, query.shape[2], key.shape[2], query.device)


def split_qkv(qkv: torch.Tensor, heads: int, groups: int, head_dim: int, interleaved: bool) -> tuple[torch.Tensor, ...]:
    """The QKV product [.., (H + 2 G) * D] as Q [.., H, D], K and V [.., G, D], views of it.

    interleaved: features lie as [G, H / G + 2, D], else as [Q; K; V].
    """
    if not interleaved:
        sizes = [heads * head_dim, groups * head_dim, groups * head_dim]
        query, key, value = qkv.split(sizes, -1)  # backward is one concatenation
        return (
            query.unflatten(-1, (heads, head_dim)),
            key.unflatten(-1, (groups, head_dim)),
            value.unflatten(-1, (groups, head_dim)),
        )
    per_group = heads // groups
    query, key, value = qkv.unflatten(-1, (groups, per_group + 2, head_dim)).split([per_group, 1, 1], -2)
    # with several groups of several query heads no single stride spans the heads: flatten copies Q then
    return query.flatten(-3, -2), key.squeeze(-2), value.squeeze(-2)


def autocasted(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`tensors` in torch.autocast's dtype where it is on."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) for x in tensors)


def explain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Mask,
    kind: MaskKind,
    batch_first: bool,
    dropout: float = 0.0,
    scale: float | None = None,
    scores: Scores | None = None,
    packed: str = "",
) -> Decision:
    """The Decision that `dot_product_attention` takes for the same arguments, or, of sequences that would be these when padded,
    `packed_attention` (packed: Case.packed); print it.
    """
    query, key, value, bias, mask, causal, _ = _prepared(query, key, value, attention_mask, kind, batch_first, scale, scores)
    case = Case(*_case(query, key, value, mask, causal, dropout, *_scores_case(scores, bias, query, key, value), packed))
    if bias is not None:
        mask, causal = _biased(bias, mask, causal, query), False
    if route(*case)[1]:
        key, value = _repeated(query, key, value)
    return decide(case, query, key, value, mask, causal, dropout)


def explain_packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    side_q: Side,
    side_kv: Side,
    kind: MaskKind,
    dropout: float = 0.0,
    scale: float | None = None,
    scores: Scores | None = None,
) -> Decision:
    """The Decision that `packed_attention` takes for the same arguments; print it."""
    padded = _padded(query, key, value, *packings(side_q, side_kv))
    return explain(*padded, kind, True, dropout, scale, scores, _packed_case(side_q, side_kv, kind, scores))
