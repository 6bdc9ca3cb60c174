"""`DotProductAttention`: softmax(scale * Q K^T + bias, masked) V."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from overdrive.functional.attention import (
    Scores,
    autocasted,
    default_slopes,
    dot_product_attention,
    packed_attention,
)
from overdrive.functional.attention import explain as explain_attention
from overdrive.functional.attention import explain_packed as explain_packed_attention
from overdrive.functional.attention_backends import Decision
from overdrive.functional.attention_mask import MASK_KINDS, Mask, MaskKind, check_mask, fits
from overdrive.functional.packing import NOTHING_SAID, Lengths, padding_masks, sides
from overdrive.modules.base import warn_of_foreign_state
from overdrive.modules.checks import default_device, one_of, positive_int, refuse, refuse_parallelism
from overdrive.modules.inference import attend_to_cache

FORMATS = ("sbhd", "bshd", "thd")
BIASES = ("no_bias", "pre_scale_bias", "post_scale_bias", "alibi")
SOFTMAXES = ("vanilla", "off-by-one", "learnable")
LATER = "not built yet"


def window(module: str, value: Any) -> tuple[int, int]:
    """`value`, argument window_size, as (left, right), -1 = no limit; None is no window."""
    if value is None:
        return -1, -1
    whole = isinstance(value, tuple | list) and all(isinstance(x, int) and not isinstance(x, bool) for x in value)
    if not whole or len(value) != 2 or min(value) < -1:
        raise ValueError(f"{module}: window_size must be a pair (keys to the left, keys to the right), -1 = all; got {value!r}")
    return value[0], value[1]


def mask_kind(module: str, name: str, value: str, window_size: Any = None, bottom_right_diagonal: bool | None = None) -> MaskKind:
    """What `value`, a mask type given as argument `name`, and a window mean; ValueError if one forbids the other."""
    kind = MASK_KINDS[one_of(module, name, value, MASK_KINDS)]
    left, right = window(module, window_size)
    if kind.causal and right > 0:
        raise ValueError(
            f"{module}: window_size={window_size!r} looks ahead, which {name}={value!r} forbids; use ({left}, 0) or another type"
        )
    if not kind.causal and (left, right) == (-1, 0):
        raise ValueError(
            f"{module}: window_size={window_size!r} means a causal mask, but {name} is {value!r}; use a causal one or leave it out"
        )
    kind = kind._replace(left=left, right=-1 if kind.causal else right)
    return kind if bottom_right_diagonal is None else kind._replace(bottom_right=bool(bottom_right_diagonal))


def probability(module: str, name: str, value: Any) -> float:
    """`value` as a float, or ValueError unless it is a number from 0 to 1 that leaves something (below 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{module}: {name} must be a probability, 0 <= {name} < 1, got {value!r}")
    return float(value)


def gqa_groups(module: str, heads: int, groups: int | None) -> int:
    """`groups`, None meaning one per head, or ValueError unless it divides `heads`."""
    groups = heads if groups is None else positive_int(module, "num_gqa_groups", groups)
    if heads % groups:
        raise ValueError(
            f"{module}: num_attention_heads={heads} must be a multiple of num_gqa_groups={groups}, as each K/V head serves equally "
            "many query heads"
        )
    return groups


class DotProductAttention(torch.nn.Module):
    """softmax(softmax_scale * Q K^T, masked) V per head, dropout on the probabilities in training.

    kv_channels: head dim of Q and K and of V, or a pair (Q and K, V). num_gqa_groups: heads of K and V, each serving
    num_attention_heads / num_gqa_groups query heads. qkv_format: "sbhd", "bshd" or "thd" (sequences packed end to end).
    attn_mask_type: no_mask, causal, causal_bottom_right, padding, padding_causal, padding_causal_bottom_right, arbitrary.
    window_size: how many keys to the left and to the right of its own place a query sees, -1 = all. bottom_right_diagonal: whether
    the last query stands at the last key or the first one at the first, in causal masks, windows and ALiBi; unless given, the first
    with the types named causal or padding_causal, the last with the others; with padding, of each sequence without it.
    softmax_scale: 1 / sqrt(head dim) unless given. softmax_type: "vanilla"; "off-by-one", with one more key of logit 0 and value 0;
    "learnable", whose logit is the parameter `softmax_offset` f32 [heads], 0 at first. return_max_logit: forward also returns each
    head's largest score. attention_type: "self" or "cross" say what the inputs are; the arithmetic is one. get_rng_state_tracker: a
    callable whose result's fork() is entered around attention. Sizes that do not divide, names unknown and windows that contradict
    the mask type raise ValueError; what is not built yet NotImplementedError. `explain` says which backend runs;
    OVERDRIVE_ATTENTION forces one of cudnn, flash, efficient, flash-attn-4, flash-varlen, cpu, math, reference, flex.
    """

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        bottom_right_diagonal: bool | None = None,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: Any = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        refuse_parallelism(
            self._label,
            {
                "sequence_parallel": sequence_parallel,
                "tp_size": tp_size,
                "tp_group": tp_group,
                "cp_group": cp_group,
                "cp_global_ranks": cp_global_ranks,
                "cp_stream": cp_stream,
            },
        )
        refuse(self._label, {"cp_comm_type": (cp_comm_type, "p2p")})
        self.attention_type = one_of(self._label, "attention_type", attention_type, ("self", "cross"))
        self.num_attention_heads = positive_int(self._label, "num_attention_heads", num_attention_heads)
        self.num_gqa_groups = gqa_groups(self._label, num_attention_heads, num_gqa_groups)
        self.head_dims = kv_channels if isinstance(kv_channels, tuple) else (kv_channels, kv_channels)
        for size in self.head_dims:
            positive_int(self._label, "kv_channels", size)
        dim, value_dim = self.head_dims
        self._widths = (num_attention_heads, dim, self.num_gqa_groups, dim, self.num_gqa_groups, value_dim)
        self.attention_dropout = probability(self._label, "attention_dropout", attention_dropout)
        self.qkv_format = one_of(self._label, "qkv_format", qkv_format, FORMATS)
        self.attn_mask_type = attn_mask_type
        self.window_size, self.bottom_right_diagonal = window_size, bottom_right_diagonal
        self._kind = mask_kind(self._label, "attn_mask_type", attn_mask_type, window_size, bottom_right_diagonal)
        self.softmax_type = one_of(self._label, "softmax_type", softmax_type, SOFTMAXES)
        self.softmax_offset: torch.Tensor | None
        if softmax_type == "learnable":
            self.softmax_offset = torch.nn.Parameter(torch.zeros(num_attention_heads, device=default_device(None)))
        else:
            offset = torch.zeros(num_attention_heads, device=default_device(None)) if softmax_type == "off-by-one" else None
            self.register_buffer("softmax_offset", offset, persistent=False)
        self.return_max_logit = bool(return_max_logit)
        self._plain_softmax = softmax_type == "vanilla" and not return_max_logit
        self.softmax_scale = self.head_dims[0] ** -0.5 if softmax_scale is None else float(softmax_scale)
        self.layer_number = layer_number
        self._rng_fork = None if get_rng_state_tracker is None else get_rng_state_tracker().fork

    @property
    def _label(self) -> str:
        return f"DotProductAttention {self.name!r}" if self.name else "DotProductAttention"

    def forward(
        self,
        query_layer: torch.Tensor,
        key_layer: torch.Tensor,
        value_layer: torch.Tensor,
        attention_mask: Mask = None,
        qkv_format: str | None = None,
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_kv: torch.Tensor | None = None,
        cu_seqlens_q_padded: torch.Tensor | None = None,
        cu_seqlens_kv_padded: torch.Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        window_size: tuple[int, int] | None = None,
        bottom_right_diagonal: bool | None = None,
        checkpoint_core_attention: bool = False,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: torch.Tensor | None = None,
        alibi_slopes: torch.Tensor | None = None,
        fast_zero_fill: bool = True,
        inference_params: Any = None,
        pad_between_seqs: bool | None = None,
        fp8_output: bool = False,
        num_splits: int = 1,
    ) -> Any:
        """Q [S, B, H, D], K [T, B, G, D], V [T, B, G, E] -> [S, B, H * E]; with "bshd" B and S change places, in and out.

        "thd": Q [N, H, D], K [M, G, D], V [M, G, E] -> [N, H * E]. cu_seqlens_q and cu_seqlens_kv int32 [B + 1]: the sum of the
        lengths of the sequences before each, and of all; the sequences begin there or, with padding between them
        (pad_between_seqs), at cu_seqlens_*_padded [B + 1]. max_seqlen_*: the longest of them, which must be given under
        torch.compile. With inference_params pre_step says all that, and these are left out. Tokens of no sequence give zeros.

        attention_mask: bool, True = masked out; [B, 1, 1, S] with padding masks (a pair for queries and keys if they differ; or
        cu_seqlens_* instead), [B or 1, H or 1, S or 1, T] with arbitrary; not read with the others. A query that is padding, or may
        attend to nothing, gives zeros. core_attention_bias [1 or B, 1 or H, 1 or S, T] is added before (core_attention_bias_type
        pre_scale_bias) or after (post_scale_bias) the scores are scaled; alibi takes off alibi_slopes f32 [H] or [B, H] (a
        geometric sequence unless given) times the distance. checkpoint_core_attention: keep only Q, K and V, and attend again in
        backward. inference_params: an InferenceParams, to whose cache K and V are appended, for Q to attend to all of it. With
        return_max_logit the result is (that, f32 [H]: each head's largest score, -inf where there is none, without gradient).
        ValueError or TypeError for shapes, dtypes, devices that do not fit.
        """
        if fp8_output or num_splits != 1:
            refuse(self._label, {"fp8_output": (fp8_output, False), "num_splits": (num_splits, 1)}, LATER)
        lengths = NOTHING_SAID
        said = cu_seqlens_q is not None or cu_seqlens_kv is not None or max_seqlen_q is not None or max_seqlen_kv is not None
        if said or cu_seqlens_q_padded is not None or cu_seqlens_kv_padded is not None or pad_between_seqs is not None:
            padded = (cu_seqlens_q_padded, cu_seqlens_kv_padded)
            lengths = Lengths(cu_seqlens_q, cu_seqlens_kv, *padded, max_seqlen_q, max_seqlen_kv, pad_between_seqs)
        if inference_params is not None:
            layout, kind = self._layout_of_call(qkv_format), self._kind_of_call(attn_mask_type, window_size, bottom_right_diagonal)
            scores = self._scores(core_attention_bias_type, core_attention_bias, alibi_slopes, query_layer.device)
            if scores is not None or lengths is not NOTHING_SAID:
                raise NotImplementedError(
                    f"{self._label}: inference_params with cu_seqlens_*, max_seqlen_*, pad_between_seqs (pre_step says how long "
                    f"sequences are), a bias, softmax_type or return_max_logit is {LATER}; leave those out"
                )
            return self._attend_to_cache(inference_params, query_layer, key_layer, value_layer, attention_mask, kind, layout)
        attend, arguments = self._call(
            query_layer,
            key_layer,
            value_layer,
            attention_mask,
            lengths,
            qkv_format,
            attn_mask_type,
            window_size,
            bottom_right_diagonal,
            core_attention_bias_type,
            core_attention_bias,
            alibi_slopes,
        )
        with contextlib.nullcontext() if self._rng_fork is None else self._rng_fork():
            if checkpoint_core_attention and torch.is_grad_enabled():
                return checkpoint(attend, *arguments, use_reentrant=False)
            return attend(*arguments)

    def _call(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Mask,
        lengths: Lengths,
        qkv_format: str | None = None,
        attn_mask_type: str | None = None,
        window_size: Any = None,
        bottom_right_diagonal: bool | None = None,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: torch.Tensor | None = None,
        alibi_slopes: torch.Tensor | None = None,
    ) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """(what computes forward's result, its arguments), which fit."""
        layout, kind = self._layout_of_call(qkv_format), self._kind_of_call(attn_mask_type, window_size, bottom_right_diagonal)
        self._check(query, key, value, layout)
        dropout = self.attention_dropout if self.training else 0.0
        scores = self._scores(core_attention_bias_type, core_attention_bias, alibi_slopes, query.device)
        if layout == "thd":
            if attention_mask is not None or kind.arbitrary:
                raise ValueError(
                    f"{self._label}: attention_mask and attn_mask_type='arbitrary' cannot say anything of qkv_format='thd', whose "
                    "sequences cu_seqlens_q and cu_seqlens_kv bound; leave them out"
                )
            packed = sides(lengths, query.shape[0], key.shape[0], query.device)
            batch, queries, keys = packed[0].offsets.shape[0] - 1, packed[0].longest, packed[1].longest
            attend, arguments = packed_attention, (query, key, value, *packed, kind._replace(padding=True))
        else:
            batch_dim, length_dim = (1, 0) if layout == "sbhd" else (0, 1)
            batch, queries, keys = query.shape[batch_dim], query.shape[length_dim], key.shape[length_dim]
            if lengths is not NOTHING_SAID:
                masks = padding_masks(lengths, batch, queries, keys, query.device)
                if masks is not None and (attention_mask is not None or not kind.padding):
                    raise ValueError(
                        f"{self._label}: cu_seqlens_q and cu_seqlens_kv stand in place of attention_mask, with a padding "
                        "attn_mask_type; leave them out otherwise"
                    )
                attention_mask = masks or attention_mask
            if kind.takes_mask:
                check_mask(kind, attention_mask, batch, self.num_attention_heads, queries, keys)
            attend, arguments = dot_product_attention, (query, key, value, attention_mask, kind, layout == "bshd")
        if scores is not None:
            self._check_scores(scores, batch, queries, keys)
        return attend, (*arguments, dropout, self.softmax_scale, scores)

    def _attend_to_cache(self, inference_params, query, key, value, mask, kind, layout) -> torch.Tensor:
        self._check(query, key, value, layout)
        query, key, value = autocasted(query, key, value)
        dropout = self.attention_dropout if self.training else 0.0
        arguments = (query, key, value, mask, kind, layout, dropout, self.softmax_scale)
        return attend_to_cache(self._label, self.layer_number, inference_params, *arguments)

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: Any, prefix: str, *arguments: Any
    ) -> None:
        foreign = [key for key in state_dict if key.startswith(prefix) and key.endswith("_extra_state")]
        for key in foreign:  # Transformer Engine keeps FP8 state here, overdrive has none
            warn_of_foreign_state(key, state_dict.pop(key))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def explain(
        self,
        query_layer: torch.Tensor,
        key_layer: torch.Tensor,
        value_layer: torch.Tensor,
        attention_mask: Mask = None,
        **arguments: Any,
    ) -> Decision:
        """Which backend forward would take with these arguments, by forward's names, and why not each other one; print it."""
        lengths = Lengths(**{name: arguments.pop(name, None) for name in Lengths._fields})
        attend, call = self._call(query_layer, key_layer, value_layer, attention_mask, lengths, **arguments)
        return (explain_packed_attention if attend is packed_attention else explain_attention)(*call)

    def _scores(
        self, bias_type: str, bias: torch.Tensor | None, slopes: torch.Tensor | None, device: torch.device
    ) -> Scores | None:
        """What the call and the module do to the scores, None if nothing."""
        if self._plain_softmax and bias_type == "no_bias" and bias is None and slopes is None:
            return None
        one_of(self._label, "core_attention_bias_type", bias_type, BIASES)
        biased = bias_type in ("pre_scale_bias", "post_scale_bias")
        if biased != (bias is not None):
            raise ValueError(
                f"{self._label}: core_attention_bias must be given with core_attention_bias_type 'pre_scale_bias' or "
                f"'post_scale_bias' and only then; got {bias_type!r} and {'a tensor' if bias is not None else None}"
            )
        if slopes is not None and bias_type != "alibi":
            raise ValueError(f"{self._label}: alibi_slopes need core_attention_bias_type='alibi', got {bias_type!r}")
        if bias_type == "alibi" and slopes is None:
            slopes = default_slopes(self.num_attention_heads, device)
        for name, tensor in (("core_attention_bias", bias), ("alibi_slopes", slopes), ("softmax_offset", self.softmax_offset)):
            if tensor is not None and (tensor.device != device or not tensor.is_floating_point()):
                raise TypeError(
                    f"{self._label}: {name} must be a floating-point tensor on {device}, got {tensor.dtype} on {tensor.device}"
                )
        return Scores(bias, bias_type == "pre_scale_bias", slopes, self.softmax_offset, self.return_max_logit)

    def _check_scores(self, scores: Scores, batch: int, queries: int, keys: int) -> None:
        """ValueError unless bias and slopes fit."""
        heads, bias, slopes = self.num_attention_heads, scores.bias, scores.slopes
        allowed = ((batch, 1), (heads, 1), (queries, 1), (keys,))
        if bias is not None and not fits(bias, allowed):
            raise ValueError(
                f"{self._label}: core_attention_bias must be [1 or {batch}, 1 or {heads} heads, 1 or {queries} queries, "
                f"{keys} keys], got {list(bias.shape)}"
            )
        if slopes is not None and not (fits(slopes, ((heads,),)) or fits(slopes, ((batch,), (heads,)))):
            raise ValueError(
                f"{self._label}: alibi_slopes must be [{heads} heads] or [{batch}, {heads} heads], got {list(slopes.shape)}"
            )

    def _layout_of_call(self, qkv_format: str | None) -> str:
        return self.qkv_format if qkv_format is None else one_of(self._label, "qkv_format", qkv_format, FORMATS)

    def _kind_of_call(self, attn_mask_type: str | None, window_size: Any, bottom_right_diagonal: bool | None) -> MaskKind:
        if attn_mask_type is None and window_size is None and bottom_right_diagonal is None:
            return self._kind
        if bottom_right_diagonal is None and attn_mask_type is None:
            bottom_right_diagonal = self.bottom_right_diagonal
        if window_size is None and (self._kind.left, self._kind.right) != (-1, -1):
            window_size = self.window_size
        return mask_kind(self._label, "attn_mask_type", attn_mask_type or self.attn_mask_type, window_size, bottom_right_diagonal)

    def _check(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: str) -> None:
        shape, key_shape, value_shape = query.shape, key.shape, value.shape
        batch_dim = 1 if layout == "sbhd" else 0
        fits = (
            len(shape) == len(key_shape) == len(value_shape) == len(layout)
            and (shape[-2], shape[-1], key_shape[-2], key_shape[-1], value_shape[-2], value_shape[-1]) == self._widths
            and key_shape[0] == value_shape[0]
            and (layout == "thd" or (shape[batch_dim] == key_shape[batch_dim] and key_shape[1] == value_shape[1]))
            and query.dtype == key.dtype == value.dtype
            and query.device == key.device == value.device
        )
        if not fits:
            self._refuse_inputs(query, key, value, layout)

    def _refuse_inputs(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: str) -> None:
        """Say what does not fit."""
        heads, dim, groups, _, _, value_dim = self._widths
        named = (("query_layer", query, heads, dim), ("key_layer", key, groups, dim), ("value_layer", value, groups, value_dim))
        for name, x, count, width in named:
            if x.dim() != len(layout) or x.shape[-2] != count or x.shape[-1] != width:
                raise ValueError(
                    f"{self._label}: {name} must be [{', '.join(layout[:-2])}, {count} heads, {width} channels], as qkv_format is "
                    f"{layout!r}; got {list(x.shape)}"
                )
            if x.dtype != query.dtype or x.device != query.device:
                raise TypeError(
                    f"{self._label}: query_layer, key_layer and value_layer must have one dtype and device, got {query.dtype} on "
                    f"{query.device} and for {name} {x.dtype} on {x.device}; convert with .to()"
                )
        raise ValueError(
            f"{self._label}: query_layer, key_layer and value_layer must agree in batch size, the latter two also in sequence "
            f"length; got {list(query.shape)}, {list(key.shape)}, {list(value.shape)}; qkv_format is {layout!r}"
        )

    def extra_repr(self) -> str:
        return (
            f"heads={self.num_attention_heads}, groups={self.num_gqa_groups}, qkv_format={self.qkv_format!r}, "
            f"attn_mask_type={self.attn_mask_type!r}, dropout={self.attention_dropout}"
        )
