"""`MultiheadAttention`: projections to Q, K and V (after a norm, if wanted), attention, output projection."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from overdrive.functional.attention_mask import Mask
from overdrive.functional.packing import Lengths, Places, packed_places
from overdrive.functional.qkv import QKVLayout, outputs_of
from overdrive.modules.attention import FORMATS, DotProductAttention, gqa_groups
from overdrive.modules.base import autocasts
from overdrive.modules.checks import NORMALIZATIONS, InitMethod, default_device, one_of, positive_int, refuse_parallelism
from overdrive.modules.inference import cached_places
from overdrive.modules.layernorm_linear import LayerNormLinear
from overdrive.modules.linear import Linear
from overdrive.modules.qk_norm import head_norm
from overdrive.modules.rotary import rotate_query_and_key


def watched(module: torch.nn.Module, method: str) -> bool:
    """Whether `module` must be called as module(...): it has hooks, or something else stands in its place (FSDP, LoRA, ...)."""
    hooks = module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    return bool(hooks) or not hasattr(type(module), method)


def with_residual(module: Any, inp: torch.Tensor, **arguments: Any) -> tuple[Any, torch.Tensor]:
    """(module(inp), inp for the residual branch), where possible as one autograd node that adds up the gradients of both."""
    if watched(module, "forward_with_residual"):
        return module(inp, **arguments), inp
    return module.forward_with_residual(inp, **arguments)


class Call(NamedTuple):
    """What one forward is told besides hidden_states, grouped as the arguments of attention follow one another.

    masking: attn_mask_type, window_size, bottom_right_diagonal. bias: core_attention_bias_type, core_attention_bias, alibi_slopes.
    lengths: cu_seqlens_q, cu_seqlens_kv, cu_seqlens_q_padded, cu_seqlens_kv_padded, max_seqlen_q, max_seqlen_kv.
    """

    mask: Mask
    encoder_output: torch.Tensor | None
    masking: tuple[Any, ...]
    first: bool | None
    checkpoint: bool
    inference_params: Any = None
    rotary_pos_emb: Any = None
    bias: tuple[Any, ...] = ("no_bias", None, None)
    lengths: tuple[Any, ...] = (None,) * 6
    pad_between_seqs: bool | None = None

    def of_module(self) -> tuple[Any, ...]:
        """As arguments of MultiheadAttention.forward, after hidden_states."""
        told = (self.first, self.checkpoint, self.inference_params, self.rotary_pos_emb)
        return (self.mask, self.encoder_output, *self.masking, *told, *self.bias, *self.lengths, True, self.pad_between_seqs)

    def of_core(self) -> tuple[Any, ...]:
        """As arguments of DotProductAttention.forward, after value_layer."""
        told = (True, self.inference_params, self.pad_between_seqs)
        return (self.mask, None, *self.lengths, *self.masking, self.checkpoint, *self.bias, *told)


def attend_with_residual(module: Any, hidden: torch.Tensor, call: Call) -> tuple[Any, torch.Tensor]:
    """with_residual of a MultiheadAttention."""
    if watched(module, "forward_with_residual"):
        return module(hidden, *call.of_module()), hidden
    return module.forward_with_residual(hidden, call)


class MultiheadAttention(torch.nn.Module):
    """Attention of [S, B, hidden], [B, S, hidden] with qkv_format="bshd", or [T, hidden] with "thd", sequences packed end to end.
    Its projections are in FP8 inside an `autocast`.

    attention_type: "self", or "cross" where keys and values come from forward's encoder_output. Submodules: `layernorm_qkv` if
    input_layernorm, else `qkv`, or in cross attention `layernorm_query`, else `query_layer`, and `key_value`, which no norm
    precedes; `core_attention`; `proj`. kv_channels: channels per head, hidden_size / num_attention_heads unless given.
    fuse_qkv_params: one QKV weight (one of K and V) instead of query_weight, key_weight and value_weight; its rows lie as [groups,
    heads / groups + 2, channels] ([groups, 2, channels]) if qkv_weight_interleaved, else, and in split parameters always, as
    [Q; K; V] ([K; V]). qk_norm_type: "RMSNorm", "LayerNorm" or "L2Normalization" of Q and K over the channels of each head
    (`q_norm`, `k_norm`), after the rotary embedding or, if qk_norm_before_rope, before it. rotary_pos_interleaved: neighbouring
    channels turn together, else those half of the turning ones apart. return_bias: leave proj's bias to the caller. forward returns
    out[, bias][, norm output].
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        kv_channels: int | None = None,
        attention_dropout: float = 0.1,
        layernorm_epsilon: float = 1e-5,
        init_method: InitMethod | None = None,
        output_layer_init_method: InitMethod | None = None,
        layer_number: int | None = None,
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        bottom_right_diagonal: bool | None = None,
        tp_group: Any = None,
        tp_size: int = 1,
        num_gqa_groups: int | None = None,
        fuse_wgrad_accumulation: bool = False,
        get_rng_state_tracker: Any = None,
        sequence_parallel: bool = False,
        params_dtype: torch.dtype | None = None,
        return_bias: bool = False,
        return_layernorm_output: bool = False,
        input_layernorm: bool = False,
        attention_type: str = "self",
        set_parallel_mode: bool = False,
        fuse_qkv_params: bool = False,
        zero_centered_gamma: bool = False,
        qkv_weight_interleaved: bool = True,
        rotary_pos_interleaved: bool = False,
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        bias: bool = True,
        normalization: str = "LayerNorm",
        device: torch.device | str | None = None,
        qkv_format: str = "sbhd",
        name: str | None = None,
        qk_norm_type: str | None = None,
        qk_norm_eps: float = 1e-6,
        qk_norm_before_rope: bool = False,
        seq_length: int | None = None,
        micro_batch_size: int | None = None,
        softmax_type: str = "vanilla",
    ) -> None:
        super().__init__()
        self.name = name
        overlaps = {
            "ub_overlap_ag": ub_overlap_ag,
            "ub_overlap_rs": ub_overlap_rs,
            "ub_overlap_rs_dgrad": ub_overlap_rs_dgrad,
            "ub_bulk_dgrad": ub_bulk_dgrad,
            "ub_bulk_wgrad": ub_bulk_wgrad,
        }
        parallelism = {"tp_group": tp_group, "tp_size": tp_size, "sequence_parallel": sequence_parallel}
        refuse_parallelism(self._label, {**parallelism, **overlaps})
        self.attention_type = one_of(self._label, "attention_type", attention_type, ("self", "cross"))
        self.hidden_size = positive_int(self._label, "hidden_size", hidden_size)
        self.num_attention_heads = positive_int(self._label, "num_attention_heads", num_attention_heads)
        self.num_gqa_groups = gqa_groups(self._label, num_attention_heads, num_gqa_groups)
        self.hidden_size_per_attention_head = self._head_dim(kv_channels)
        self.layer_number = None if layer_number is None else positive_int(self._label, "layer_number", layer_number)
        self.qkv_format = one_of(self._label, "qkv_format", qkv_format, FORMATS)
        self.input_layernorm, self.return_bias = input_layernorm, return_bias
        self.return_layernorm_output = return_layernorm_output and input_layernorm
        self.qkv_weight_interleaved = qkv_weight_interleaved  # split parameters lie as [Q; K; V] whatever it says
        one_of(self._label, "normalization", normalization, NORMALIZATIONS)

        sizes = (self.num_attention_heads, self.num_gqa_groups, self.hidden_size_per_attention_head)
        self._layouts = {interleaved: QKVLayout(*sizes, interleaved) for interleaved in (False, True)}
        query_size, kv_size = (n * self.hidden_size_per_attention_head for n in (num_attention_heads, self.num_gqa_groups))
        common: dict[str, Any] = {
            "fuse_wgrad_accumulation": fuse_wgrad_accumulation,
            "get_rng_state_tracker": get_rng_state_tracker,
            "bias": bias,
            "params_dtype": params_dtype,
            "device": device,
        }
        projection = {**common, "init_method": init_method, "parallel_mode": "column" if set_parallel_mode else None}
        normed = {
            "eps": layernorm_epsilon,
            "normalization": normalization,
            "zero_centered_gamma": zero_centered_gamma,
            "return_layernorm_output": return_layernorm_output,
        }

        def project(submodule: str, norm: bool, **sizes: int) -> Linear | LayerNormLinear:
            split = None if fuse_qkv_params else sizes
            options = {**projection, "parameters_split": split, "name": f"{name}.{submodule}" if name else None}
            width = sum(sizes.values())
            return LayerNormLinear(hidden_size, width, **normed, **options) if norm else Linear(hidden_size, width, **options)

        if attention_type == "self":
            submodule = "layernorm_qkv" if input_layernorm else "qkv"
            self.add_module(submodule, project(submodule, input_layernorm, query=query_size, key=kv_size, value=kv_size))
        else:
            submodule = "layernorm_query" if input_layernorm else "query_layer"
            self.add_module(submodule, project(submodule, input_layernorm, query=query_size))
            self.key_value = project("key_value", False, key=kv_size, value=kv_size)
        self._query_projection = submodule
        self.rotary_pos_interleaved, self.qk_norm_before_rope = rotary_pos_interleaved, qk_norm_before_rope
        head_dim = self.hidden_size_per_attention_head
        self.q_norm: Any = head_norm(self._label, qk_norm_type, head_dim, qk_norm_eps, params_dtype, device)
        self.k_norm: Any = head_norm(self._label, qk_norm_type, head_dim, qk_norm_eps, params_dtype, device)
        self.core_attention = DotProductAttention(
            num_attention_heads,
            self.hidden_size_per_attention_head,
            num_gqa_groups=self.num_gqa_groups,
            attention_dropout=attention_dropout,
            qkv_format=qkv_format,
            attn_mask_type=attn_mask_type,
            window_size=window_size,
            bottom_right_diagonal=bottom_right_diagonal,
            get_rng_state_tracker=get_rng_state_tracker,
            layer_number=layer_number,
            attention_type=attention_type,
            softmax_type=softmax_type,
            name=f"{name}.core_attention" if name else None,
        ).to(default_device(device))  # softmax_offset
        self.proj = Linear(
            query_size,
            hidden_size,
            init_method=output_layer_init_method,
            return_bias=return_bias,
            parallel_mode="row" if set_parallel_mode else None,
            save_original_input=True,  # which attention's backward keeps anyway
            name=f"{name}.proj" if name else None,
            **common,
        )

    @property
    def _label(self) -> str:
        return f"MultiheadAttention {self.name!r}" if self.name else "MultiheadAttention"

    def _head_dim(self, kv_channels: int | None) -> int:
        if kv_channels is not None:
            return positive_int(self._label, "kv_channels", kv_channels)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"{self._label}: hidden_size={self.hidden_size} must be a multiple of "
                f"num_attention_heads={self.num_attention_heads}; change one of them or give kv_channels"
            )
        return self.hidden_size // self.num_attention_heads

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Mask = None,
        encoder_output: torch.Tensor | None = None,
        attn_mask_type: str | None = None,
        window_size: tuple[int, int] | None = None,
        bottom_right_diagonal: bool | None = None,
        is_first_microbatch: bool | None = None,
        checkpoint_core_attention: bool = False,
        inference_params: Any = None,
        rotary_pos_emb: Any = None,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: torch.Tensor | None = None,
        alibi_slopes: torch.Tensor | None = None,
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_kv: torch.Tensor | None = None,
        cu_seqlens_q_padded: torch.Tensor | None = None,
        cu_seqlens_kv_padded: torch.Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        fast_zero_fill: bool = True,
        pad_between_seqs: bool | None = None,
    ) -> Any:
        """hidden_states [S, B, hidden], [B, S, hidden] or [T, hidden] -> out of that shape[, bias][, norm output].

        encoder_output: what cross attention attends to, [T, B, hidden], [B, T, hidden] or [T, hidden], in the dtype of
        hidden_states. Masks, lengths (cu_seqlens_*, max_seqlen_*, pad_between_seqs) and per-call overrides as in
        DotProductAttention.forward, is_first_microbatch as in Linear.forward. rotary_pos_emb: f32 [P, 1, 1, R], the angles that a
        RotaryPositionEmbedding gives, or a pair of them, for Q and for K; P is at least the longest sequence, in packed ones with
        the padding behind it. ValueError where encoder_output is missing, given to self attention, or of the wrong shape.
        """
        masking = (attn_mask_type, window_size, bottom_right_diagonal)
        told = (is_first_microbatch, checkpoint_core_attention, inference_params, rotary_pos_emb)
        bias = (core_attention_bias_type, core_attention_bias, alibi_slopes)
        lengths = (cu_seqlens_q, cu_seqlens_kv, cu_seqlens_q_padded, cu_seqlens_kv_padded, max_seqlen_q, max_seqlen_kv)
        call = Call(attention_mask, encoder_output, masking, *told, bias, lengths, pad_between_seqs)
        return self._attend(hidden_states, call, False)[0]

    def forward_with_residual(self, hidden_states: torch.Tensor, call: Call) -> tuple[Any, torch.Tensor]:
        """(what forward returns, hidden_states for the residual branch, whose gradient then joins inside the norm's backward)."""
        return self._attend(hidden_states, call, True)

    def _attend(self, hidden: torch.Tensor, call: Call, keep_residual: bool) -> tuple[Any, torch.Tensor]:
        lead = self.qkv_format[:-2]
        if hidden.dim() != len(lead) + 1:
            raise ValueError(
                f"{self._label}: hidden_states must be [{', '.join(lead)}, hidden_size={self.hidden_size}], got shape "
                f"{list(hidden.shape)}"
            )
        self._check_encoder_output(call.encoder_output, hidden)
        project = self._project_self if call.encoder_output is None else self._project_cross
        (query, key, value), norm_out, residual = project(hidden, call, keep_residual)
        query, key = self._position(query, key, call)
        out = self.proj(self.core_attention(query, key, value, *call.of_core()), is_first_microbatch=call.first)
        if self.return_bias:
            out = (*out, *norm_out)
        elif norm_out:
            out = (out, *norm_out)
        return out, residual

    def _check_encoder_output(self, encoder_output: Any, hidden: torch.Tensor) -> None:
        """An error unless encoder_output is there where, and only where, it is attended to, and fits hidden_states."""
        if self.attention_type == "self":
            if encoder_output is not None:
                raise ValueError(
                    f"{self._label}: encoder_output is for cross attention, this is self attention; leave it out, or build it with "
                    "attention_type='cross'"
                )
            return
        if not isinstance(encoder_output, torch.Tensor):
            got = "nothing" if encoder_output is None else type(encoder_output).__name__
            raise (ValueError if encoder_output is None else TypeError)(
                f"{self._label}: encoder_output must be a tensor, as cross attention attends to it; got {got}"
            )
        batch_dim, shape = self.qkv_format.find("b"), encoder_output.shape
        fits = len(shape) == hidden.dim() and shape[-1] == self.hidden_size
        if not fits or (batch_dim >= 0 and shape[batch_dim] != hidden.shape[batch_dim]):
            sizes = [f"batch={hidden.shape[dim]}" if dim == batch_dim else "any length" for dim in range(hidden.dim() - 1)]
            raise ValueError(
                f"{self._label}: encoder_output must be [{', '.join(sizes)}, hidden_size={self.hidden_size}], as qkv_format is "
                f"{self.qkv_format!r}; got shape {list(shape)}"
            )
        if encoder_output.device != hidden.device:
            raise ValueError(
                f"{self._label}: encoder_output is on {encoder_output.device}, hidden_states on {hidden.device}; move one of them "
                "with .to()"
            )
        if encoder_output.dtype != hidden.dtype and not autocasts(hidden.device):
            raise TypeError(
                f"{self._label}: encoder_output has dtype {encoder_output.dtype}, hidden_states {hidden.dtype}; convert one or use "
                "torch.autocast"
            )

    def _position(self, query: torch.Tensor, key: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """Q and K normed and turned, as far as asked for and in the order asked for."""
        if self.q_norm is not None and self.qk_norm_before_rope:
            query, key = self.q_norm(query), self.k_norm(key)
        if call.rotary_pos_emb is not None:
            how = (call.rotary_pos_emb, self.qkv_format, self.rotary_pos_interleaved, self._places(query, key, call))
            query, key = rotate_query_and_key(self._label, query, key, *how)
        if self.q_norm is not None and not self.qk_norm_before_rope:
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key

    def _places(self, query: torch.Tensor, key: torch.Tensor, call: Call) -> tuple[Places, Places] | None:
        """Where the tokens of Q and of K stand; None if each sequence of a padded batch begins at position 0."""
        if call.inference_params is not None:
            batch = None if self.qkv_format == "thd" else query.shape[self.qkv_format.index("b")]
            places = cached_places(self._label, call.inference_params, batch)
            return places, places
        if self.qkv_format != "thd":
            return None
        lengths = Lengths(*call.lengths, pad_between_seqs=call.pad_between_seqs)
        return packed_places(lengths, query.shape[0], key.shape[0], query.device)

    def _project_self(self, hidden: torch.Tensor, call: Call, keep_residual: bool) -> tuple[Any, list[torch.Tensor], torch.Tensor]:
        """((Q, K, V), the norm's output if it is to be returned, hidden for the residual branch)."""
        module: Any = getattr(self, self._query_projection)
        layout = self._layouts[self.qkv_weight_interleaved and not module.has_split_parameters]
        residual, norm_out = hidden, []
        if watched(module, "forward_qkv"):
            qkv = module(hidden, is_first_microbatch=call.first)
            if self.return_layernorm_output:
                qkv, *norm_out = qkv
            return outputs_of(qkv, layout), norm_out, residual
        qkv = module.forward_qkv(hidden, layout, call.first, keep_residual)
        if keep_residual:
            qkv, residual = qkv
        if self.return_layernorm_output:
            qkv, *norm_out = qkv
        return qkv, norm_out, residual

    def _project_cross(self, hidden: torch.Tensor, call: Call, keep_residual: bool) -> tuple[Any, list[torch.Tensor], torch.Tensor]:
        """`_project_self`, with K and V from the encoder's output."""
        module: Any = getattr(self, self._query_projection)
        options, norm_out = {"is_first_microbatch": call.first}, []
        query, residual = with_residual(module, hidden, **options) if keep_residual else (module(hidden, **options), hidden)
        if self.return_layernorm_output:
            query, *norm_out = query
        head_dim, key_value = self.hidden_size_per_attention_head, self.key_value(call.encoder_output, **options)
        if self.qkv_weight_interleaved and not self.key_value.has_split_parameters:
            key, value = key_value.unflatten(-1, (self.num_gqa_groups, 2, head_dim)).unbind(-2)
        else:
            key, value = key_value.unflatten(-1, (2, self.num_gqa_groups, head_dim)).unbind(-3)
        return (query.unflatten(-1, (self.num_attention_heads, head_dim)), key, value), norm_out, residual
