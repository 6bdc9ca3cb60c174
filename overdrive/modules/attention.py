"""`DotProductAttention`: softmax(scale * Q K^T + mask) V."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from overdrive.functional.attention import Decision, dot_product_attention
from overdrive.functional.attention import explain as explain_attention
from overdrive.functional.attention_mask import MASK_KINDS, Mask, MaskKind, check_mask
from overdrive.modules.base import warn_of_foreign_state
from overdrive.modules.checks import one_of, positive_int, refuse, refuse_parallelism

FORMATS = ("sbhd", "bshd")
LATER = "not built yet"


def qkv_layout(module: str, value: str, name: str = "qkv_format") -> str:
    """`value`, given as argument `name`, if it is a layout that attention takes, else an error."""
    if value == "thd":
        raise NotImplementedError(
            f"{module}: {name}='thd' is {LATER}; pad the sequences and use 'sbhd' or 'bshd' with a padding mask"
        )
    return one_of(module, name, value, FORMATS)


def mask_kind(module: str, name: str, value: str, window_size: Any = None, bottom_right_diagonal: bool | None = None) -> MaskKind:
    """What `value`, a mask type given as argument `name`, means; window_size may only say the same."""
    kind = MASK_KINDS[one_of(module, name, value, MASK_KINDS)]
    full = (None, (-1, -1), (-1, 0)) if kind.causal else (None, (-1, -1))
    if (tuple(window_size) if window_size is not None else None) not in full:
        raise NotImplementedError(f"{module}: window_size={window_size!r} with {name}={value!r} is {LATER}; leave it out")
    return kind if bottom_right_diagonal is None or not kind.causal else kind._replace(bottom_right=bottom_right_diagonal)


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
    """softmax(softmax_scale * Q K^T, masked) V per head, dropout on the probabilities in training; no parameters.

    kv_channels: head dim of Q and K and of V, or a pair (Q and K, V). num_gqa_groups: heads of K and V, each serving
    num_attention_heads / num_gqa_groups query heads. qkv_format: "sbhd" or "bshd". attn_mask_type: no_mask, causal,
    causal_bottom_right, padding, padding_causal, padding_causal_bottom_right, arbitrary. softmax_scale: 1 / sqrt(head dim) unless
    given. get_rng_state_tracker: a callable whose result's fork() is entered around attention. Sizes that do not divide and unknown
    names raise ValueError; what is not built yet NotImplementedError. `explain` says which backend runs; OVERDRIVE_ATTENTION forces
    one of cudnn, flash, efficient, flash-attn-4, cpu, math.
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
        softmax = {"softmax_type": (softmax_type, "vanilla"), "return_max_logit": (return_max_logit, False)}
        refuse(self._label, {"attention_type": (attention_type, "self"), **softmax}, LATER)
        self.num_attention_heads = positive_int(self._label, "num_attention_heads", num_attention_heads)
        self.num_gqa_groups = gqa_groups(self._label, num_attention_heads, num_gqa_groups)
        self.head_dims = kv_channels if isinstance(kv_channels, tuple) else (kv_channels, kv_channels)
        for size in self.head_dims:
            positive_int(self._label, "kv_channels", size)
        dim, value_dim = self.head_dims
        self._widths = (num_attention_heads, dim, self.num_gqa_groups, dim, self.num_gqa_groups, value_dim)
        self.attention_dropout = probability(self._label, "attention_dropout", attention_dropout)
        self.qkv_format = qkv_layout(self._label, qkv_format)
        self.attn_mask_type = attn_mask_type
        self.window_size, self.bottom_right_diagonal = window_size, bottom_right_diagonal
        self._kind = mask_kind(self._label, "attn_mask_type", attn_mask_type, window_size, bottom_right_diagonal)
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
    ) -> torch.Tensor:
        """Q [S, B, H, D], K [T, B, G, D], V [T, B, G, E] -> [S, B, H * E]; with "bshd" B and S change places, in and out.

        attention_mask: bool, True = masked out; [B, 1, 1, S] with padding masks, [B or 1, H or 1, S or 1, T] with arbitrary; not
        read with the others. A query that is padding, or may attend to nothing, gives zeros. checkpoint_core_attention: keep only
        Q, K and V, and attend again in backward. ValueError or TypeError for shapes, dtypes, devices that do not fit.
        """
        refuse(
            self._label,
            {
                "cu_seqlens_q": (cu_seqlens_q, None),
                "cu_seqlens_kv": (cu_seqlens_kv, None),
                "cu_seqlens_q_padded": (cu_seqlens_q_padded, None),
                "cu_seqlens_kv_padded": (cu_seqlens_kv_padded, None),
                "max_seqlen_q": (max_seqlen_q, None),
                "max_seqlen_kv": (max_seqlen_kv, None),
                "core_attention_bias_type": (core_attention_bias_type, "no_bias"),
                "core_attention_bias": (core_attention_bias, None),
                "alibi_slopes": (alibi_slopes, None),
                "inference_params": (inference_params, None),
                "pad_between_seqs": (pad_between_seqs, None),
                "fp8_output": (fp8_output, False),
                "num_splits": (num_splits, 1),
            },
            LATER,
        )
        layout = self.qkv_format if qkv_format is None else qkv_layout(self._label, qkv_format)
        kind = self._kind_of_call(attn_mask_type, window_size, bottom_right_diagonal)
        self._check(query_layer, key_layer, value_layer, attention_mask, kind, layout)
        dropout = self.attention_dropout if self.training else 0.0
        arguments = (query_layer, key_layer, value_layer, attention_mask, kind, layout == "bshd", dropout, self.softmax_scale)
        with contextlib.nullcontext() if self._rng_fork is None else self._rng_fork():
            if checkpoint_core_attention and torch.is_grad_enabled():
                return checkpoint(dot_product_attention, *arguments, use_reentrant=False)  # pyright: ignore[reportReturnType]
            return dot_product_attention(*arguments)

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: Any, prefix: str, *arguments: Any
    ) -> None:
        foreign = [key for key in state_dict if key.startswith(prefix) and key.endswith("_extra_state")]
        for key in foreign:  # Transformer Engine keeps FP8 state here, overdrive has none
            warn_of_foreign_state(key, state_dict.pop(key))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def explain(
        self, query_layer: torch.Tensor, key_layer: torch.Tensor, value_layer: torch.Tensor, attention_mask: Mask = None
    ) -> Decision:
        """Which backend forward would take with these arguments, and why not each other one; print it."""
        self._check(query_layer, key_layer, value_layer, attention_mask, self._kind, self.qkv_format)
        dropout = self.attention_dropout if self.training else 0.0
        batch_first = self.qkv_format == "bshd"
        return explain_attention(query_layer, key_layer, value_layer, attention_mask, self._kind, batch_first, dropout)

    def _kind_of_call(self, attn_mask_type: str | None, window_size: Any, bottom_right_diagonal: bool | None) -> MaskKind:
        if attn_mask_type is None and window_size is None and bottom_right_diagonal is None:
            return self._kind
        if bottom_right_diagonal is None and attn_mask_type is None:
            bottom_right_diagonal = self.bottom_right_diagonal
        return mask_kind(self._label, "attn_mask_type", attn_mask_type or self.attn_mask_type, window_size, bottom_right_diagonal)

    def _check(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Mask, kind: MaskKind, layout: str) -> None:
        batch_dim, sequence_dim = (1, 0) if layout == "sbhd" else (0, 1)
        shape, key_shape, value_shape = query.shape, key.shape, value.shape
        fits = (
            len(shape) == len(key_shape) == len(value_shape) == 4
            and (shape[2], shape[3], key_shape[2], key_shape[3], value_shape[2], value_shape[3]) == self._widths
            and shape[batch_dim] == key_shape[batch_dim]
            and key_shape[0] == value_shape[0]
            and key_shape[1] == value_shape[1]
            and query.dtype == key.dtype == value.dtype
            and query.device == key.device == value.device
        )
        if not fits:
            self._refuse_inputs(query, key, value, layout)
        if kind.takes_mask:
            heads = self.num_attention_heads
            check_mask(kind, mask, shape[batch_dim], heads, shape[sequence_dim], key_shape[sequence_dim])

    def _refuse_inputs(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: str) -> None:
        """Say what does not fit."""
        heads, dim, groups, _, _, value_dim = self._widths
        named = (("query_layer", query, heads, dim), ("key_layer", key, groups, dim), ("value_layer", value, groups, value_dim))
        for name, x, count, width in named:
            if x.dim() != 4 or x.shape[2] != count or x.shape[3] != width:
                raise ValueError(
                    f"{self._label}: {name} must be [{', '.join(layout[:2])}, {count} heads, {width} channels], as qkv_format is "
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
