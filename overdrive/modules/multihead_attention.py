"""`MultiheadAttention`: QKV projection (after a norm, if wanted), attention, output projection."""

from __future__ import annotations

from typing import Any

import torch

from overdrive.functional.attention_mask import Mask
from overdrive.functional.qkv import QKVLayout, outputs_of
from overdrive.modules.attention import LATER, DotProductAttention, gqa_groups, qkv_layout
from overdrive.modules.checks import NORMALIZATIONS, InitMethod, one_of, positive_int, refuse, refuse_parallelism
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


class MultiheadAttention(torch.nn.Module):
    """Self attention of [S, B, hidden], or [B, S, hidden] with qkv_format="bshd", its projections in FP8 inside an `autocast`.

    Submodules: `layernorm_qkv` if input_layernorm, else `qkv`; `core_attention`; `proj`. kv_channels: channels per head,
    hidden_size / num_attention_heads unless given. fuse_qkv_params: one QKV weight instead of query_weight, key_weight and
    value_weight; its rows lie as [groups, heads / groups + 2, channels] if qkv_weight_interleaved, else, and in split parameters
    always, as [Q; K; V]. qk_norm_type: "RMSNorm", "LayerNorm" or "L2Normalization" of Q and K over the channels of each head
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
        one_of(self._label, "attention_type", attention_type, ("self", "cross"))
        refuse(self._label, {"attention_type": (attention_type, "self")}, LATER)
        self.hidden_size = positive_int(self._label, "hidden_size", hidden_size)
        self.num_attention_heads = positive_int(self._label, "num_attention_heads", num_attention_heads)
        self.num_gqa_groups = gqa_groups(self._label, num_attention_heads, num_gqa_groups)
        self.hidden_size_per_attention_head = self._head_dim(kv_channels)
        self.layer_number = None if layer_number is None else positive_int(self._label, "layer_number", layer_number)
        self.qkv_format = qkv_layout(self._label, qkv_format)
        self.input_layernorm, self.return_bias = input_layernorm, return_bias
        self.return_layernorm_output = return_layernorm_output and input_layernorm
        self.qkv_weight_interleaved = qkv_weight_interleaved  # split parameters lie as [Q; K; V] whatever it says
        one_of(self._label, "normalization", normalization, NORMALIZATIONS)

        query_size, kv_size = (n * self.hidden_size_per_attention_head for n in (num_attention_heads, self.num_gqa_groups))
        common: dict[str, Any] = {
            "fuse_wgrad_accumulation": fuse_wgrad_accumulation,
            "get_rng_state_tracker": get_rng_state_tracker,
            "bias": bias,
            "params_dtype": params_dtype,
            "device": device,
        }
        qkv = {
            "init_method": init_method,
            "parameters_split": None if fuse_qkv_params else {"query": query_size, "key": kv_size, "value": kv_size},
            "parallel_mode": "column" if set_parallel_mode else None,
            "name": f"{name}.qkv" if name else None,
        }
        if input_layernorm:
            self.layernorm_qkv = LayerNormLinear(
                hidden_size,
                query_size + 2 * kv_size,
                eps=layernorm_epsilon,
                normalization=normalization,
                zero_centered_gamma=zero_centered_gamma,
                return_layernorm_output=return_layernorm_output,
                **{**common, **qkv, "name": f"{name}.layernorm_qkv" if name else None},
            )
        else:
            self.qkv = Linear(hidden_size, query_size + 2 * kv_size, **common, **qkv)
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
            softmax_type=softmax_type,
            name=f"{name}.core_attention" if name else None,
        )
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
        """hidden_states [S, B, hidden] or [B, S, hidden] -> out of that shape[, bias][, norm output].

        Masks and per-call overrides as in DotProductAttention.forward, is_first_microbatch as in Linear.forward.
        rotary_pos_emb: f32 [P >= S, 1, 1, R], the angles that a RotaryPositionEmbedding gives, or a pair of them, for Q and for K.
        """
        outputs, _ = self._attend(
            hidden_states,
            is_first_microbatch,
            False,
            encoder_output,
            rotary_pos_emb,
            attention_mask=attention_mask,
            attn_mask_type=attn_mask_type,
            window_size=window_size,
            bottom_right_diagonal=bottom_right_diagonal,
            checkpoint_core_attention=checkpoint_core_attention,
            inference_params=inference_params,
            core_attention_bias_type=core_attention_bias_type,
            core_attention_bias=core_attention_bias,
            alibi_slopes=alibi_slopes,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_kv=cu_seqlens_kv,
            cu_seqlens_q_padded=cu_seqlens_q_padded,
            cu_seqlens_kv_padded=cu_seqlens_kv_padded,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_kv=max_seqlen_kv,
            pad_between_seqs=pad_between_seqs,
        )
        return outputs

    def forward_with_residual(
        self,
        hidden_states: torch.Tensor,
        is_first_microbatch: bool | None = None,
        encoder_output: torch.Tensor | None = None,
        rotary_pos_emb: Any = None,
        **attention: Any,
    ) -> tuple[Any, torch.Tensor]:
        """(what forward returns, hidden_states for the residual branch, whose gradient then joins inside the norm's backward)."""
        return self._attend(hidden_states, is_first_microbatch, True, encoder_output, rotary_pos_emb, **attention)

    def _attend(
        self,
        hidden: torch.Tensor,
        first: bool | None,
        keep_residual: bool,
        encoder_output: torch.Tensor | None,
        rotary_pos_emb: Any,
        **attention: Any,
    ) -> tuple[Any, torch.Tensor]:
        refuse(self._label, {"encoder_output": (encoder_output, None)}, LATER)
        if hidden.dim() != 3:
            raise ValueError(
                f"{self._label}: hidden_states must be [{', '.join(self.qkv_format[:2])}, hidden_size={self.hidden_size}], "
                f"got shape {list(hidden.shape)}"
            )
        (query, key, value), norm_out, residual = self._project(hidden, first, keep_residual)
        query, key = self._position(query, key, rotary_pos_emb)
        out = self.proj(self.core_attention(query, key, value, **attention), is_first_microbatch=first)
        if self.return_bias:
            out = (*out, *norm_out)
        elif norm_out:
            out = (out, *norm_out)
        return out, residual

    def _position(self, query: torch.Tensor, key: torch.Tensor, rotary_pos_emb: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Q and K normed and turned, as far as asked for and in the order asked for."""
        if self.q_norm is not None and self.qk_norm_before_rope:
            query, key = self.q_norm(query), self.k_norm(key)
        if rotary_pos_emb is not None:
            interleaved = self.rotary_pos_interleaved
            query, key = rotate_query_and_key(self._label, query, key, rotary_pos_emb, self.qkv_format, interleaved)
        if self.q_norm is not None and not self.qk_norm_before_rope:
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key

    def _project(
        self, hidden: torch.Tensor, first: bool | None, keep_residual: bool
    ) -> tuple[Any, list[torch.Tensor], torch.Tensor]:
        """((Q, K, V), the norm's output if it is to be returned, hidden for the residual branch)."""
        module: Any = self.layernorm_qkv if self.input_layernorm else self.qkv
        sizes = (self.num_attention_heads, self.num_gqa_groups, self.hidden_size_per_attention_head)
        layout = QKVLayout(*sizes, self.qkv_weight_interleaved and not module.has_split_parameters)
        residual, norm_out = hidden, []
        if watched(module, "forward_qkv"):
            qkv = module(hidden, is_first_microbatch=first)
            if self.return_layernorm_output:
                qkv, *norm_out = qkv
            return outputs_of(qkv, layout), norm_out, residual
        qkv = module.forward_qkv(hidden, layout, first, keep_residual)
        if keep_residual:
            qkv, residual = qkv
        if self.return_layernorm_output:
            qkv, *norm_out = qkv
        return qkv, norm_out, residual
