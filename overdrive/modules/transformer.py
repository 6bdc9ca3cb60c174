"""`TransformerLayer`: attention and MLP with their norms and residual connections."""

from __future__ import annotations

from typing import Any

import torch

from overdrive.functional.attention_mask import Mask
from overdrive.functional.packing import Lengths
from overdrive.functional.residual import bias_dropout_add
from overdrive.modules.attention import FORMATS, mask_kind, probability
from overdrive.modules.checks import NORMALIZATIONS, InitMethod, one_of, positive_int, refuse, refuse_parallelism
from overdrive.modules.layernorm import LayerNorm, RMSNorm
from overdrive.modules.layernorm_mlp import LayerNormMLP
from overdrive.modules.multihead_attention import Call, MultiheadAttention, attend_with_residual, watched, with_residual

_CROSS = ("encoder_output", "enc_dec_attn_mask", "enc_dec_attn_mask_type", "enc_dec_window_size", "enc_dec_bottom_right_diagonal")


def _branch(outputs: Any, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, residual) of a sublayer that returned x and, if the residual is to come from there, its norm's output."""
    return outputs if isinstance(outputs, tuple) else (outputs, residual)


class TransformerLayer(torch.nn.Module):
    """x + attention(norm(x)), then the same with an MLP; a GPT or BERT block, in FP8 inside an `autocast`.

    Shapes: [S, B, hidden], [B, S, hidden] with attn_input_format="bshd", or [T, hidden] with "thd", sequences packed end to end.
    Submodules: `self_attention`, `layernorm_mlp`, and `layernorm` with output_layernorm. Dropout, residual and the MLP's norm are
    one kernel.

    layer_type: "encoder", or "decoder", which attends to forward's encoder_output between the two (`inter_attention`, always behind
    a norm of its own); enc_dec_attn_mask_type, enc_dec_window_size and enc_dec_bottom_right_diagonal say to what of it, and are not
    read in encoders. parallel_attention_mlp has no place for it and raises ValueError.

    apply_residual_connection_post_layernorm: the residual is the norm's output, not its input. output_layernorm: no norm before
    attention, one at the end. parallel_attention_mlp: attention and MLP both read x, and x + dropout(attention + MLP) comes out.
    drop_path_rate: probability of dropping a whole branch of one sample. hidden_dropout, attention_dropout act in training only.
    self_attn_mask_type and the arguments of attention: see MultiheadAttention; activation: see LayerNormMLP. seq_length and
    micro_batch_size are not needed; ub_* matter only with ub_tp_comm_overlap.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        num_attention_heads: int,
        num_gqa_groups: int | None = None,
        layernorm_epsilon: float = 1e-5,
        hidden_dropout: float = 0.1,
        attention_dropout: float = 0.1,
        init_method: InitMethod | None = None,
        output_layer_init_method: InitMethod | None = None,
        layer_number: int | None = None,
        kv_channels: int | None = None,
        self_attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        bottom_right_diagonal: bool | None = None,
        enc_dec_attn_mask_type: str = "no_mask",
        enc_dec_bottom_right_diagonal: bool | None = None,
        enc_dec_window_size: tuple[int, int] | None = None,
        tp_group: Any = None,
        tp_size: int = 1,
        params_dtype: torch.dtype | None = None,
        get_rng_state_tracker: Any = None,
        fuse_wgrad_accumulation: bool = False,
        seq_length: int | None = None,
        micro_batch_size: int | None = None,
        sequence_parallel: bool = False,
        apply_residual_connection_post_layernorm: bool = False,
        output_layernorm: bool = False,
        parallel_attention_mlp: bool = False,
        layer_type: str = "encoder",
        drop_path_rate: float = 0.0,
        set_parallel_mode: bool = False,
        fuse_qkv_params: bool = False,
        rotary_pos_interleaved: bool = False,
        zero_centered_gamma: bool = False,
        qkv_weight_interleaved: bool = True,
        ub_tp_comm_overlap: bool = False,
        ub_overlap_ag: bool = True,
        ub_overlap_rs: bool = True,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = True,
        ub_bulk_wgrad: bool = True,
        bias: bool = True,
        activation: str = "gelu",
        activation_params: dict[str, Any] | None = None,
        normalization: str = "LayerNorm",
        device: torch.device | str | None = None,
        attn_input_format: str = "sbhd",
        name: str | None = None,
        qk_norm_type: str | None = None,
        qk_norm_eps: float = 1e-6,
        qk_norm_before_rope: bool = False,
        softmax_type: str = "vanilla",
    ) -> None:
        super().__init__()
        self.name = name
        label = self._label
        parallelism = {"tp_group": tp_group, "tp_size": tp_size, "sequence_parallel": sequence_parallel}
        refuse_parallelism(label, {**parallelism, "ub_tp_comm_overlap": ub_tp_comm_overlap})
        one_of(label, "layer_type", layer_type, ("encoder", "decoder"))
        one_of(label, "normalization", normalization, NORMALIZATIONS)
        mask_kind(label, "self_attn_mask_type", self_attn_mask_type, window_size, bottom_right_diagonal)
        cross = (enc_dec_attn_mask_type, enc_dec_window_size, enc_dec_bottom_right_diagonal)
        mask_kind(label, "enc_dec_attn_mask_type", *cross)
        if parallel_attention_mlp and layer_type == "decoder":
            raise ValueError(
                f"{label}: parallel_attention_mlp reads one input in both branches, which leaves no place for cross attention; "
                "leave it out, or use layer_type='encoder'"
            )
        if parallel_attention_mlp and (apply_residual_connection_post_layernorm or output_layernorm):
            raise ValueError(
                f"{label}: parallel_attention_mlp reads one input in both branches; it goes neither with output_layernorm nor with "
                "apply_residual_connection_post_layernorm"
            )
        self.layer_number = 1 if layer_number is None else positive_int(label, "layer_number", layer_number)
        self.layer_type = layer_type
        self.apply_residual_connection_post_layernorm = apply_residual_connection_post_layernorm
        self.output_layernorm = output_layernorm
        self.parallel_attention_mlp = parallel_attention_mlp
        self.attn_input_format = one_of(label, "attn_input_format", attn_input_format, FORMATS)
        self.hidden_dropout = probability(label, "hidden_dropout", hidden_dropout)
        self.drop_path_rate = probability(label, "drop_path_rate", drop_path_rate)
        self._packed, self._batch_dim = attn_input_format == "thd", attn_input_format.find("b")

        common: dict[str, Any] = {
            "init_method": init_method,
            "output_layer_init_method": output_layer_init_method,
            "params_dtype": params_dtype,
            "get_rng_state_tracker": get_rng_state_tracker,
            "fuse_wgrad_accumulation": fuse_wgrad_accumulation,
            "set_parallel_mode": set_parallel_mode,
            "zero_centered_gamma": zero_centered_gamma,
            "normalization": normalization,
            "bias": bias,
            "device": device,
        }

        def attention(submodule: str, **options: Any) -> MultiheadAttention:
            return MultiheadAttention(
                hidden_size,
                num_attention_heads,
                kv_channels=kv_channels,
                attention_dropout=attention_dropout,
                layernorm_epsilon=layernorm_epsilon,
                layer_number=self.layer_number,
                num_gqa_groups=num_gqa_groups,
                fuse_qkv_params=fuse_qkv_params,
                qkv_weight_interleaved=qkv_weight_interleaved,
                rotary_pos_interleaved=rotary_pos_interleaved,
                qkv_format=attn_input_format,
                qk_norm_type=qk_norm_type,
                qk_norm_eps=qk_norm_eps,
                qk_norm_before_rope=qk_norm_before_rope,
                softmax_type=softmax_type,
                return_layernorm_output=apply_residual_connection_post_layernorm,
                name=f"{name}.{submodule}" if name else None,
                **common,
                **options,
            )

        self.self_attention = attention(
            "self_attention",
            input_layernorm=not output_layernorm,
            attn_mask_type=self_attn_mask_type,
            window_size=window_size,
            bottom_right_diagonal=bottom_right_diagonal,
        )
        if layer_type == "decoder":
            self.inter_attention = attention(
                "inter_attention",
                attention_type="cross",
                input_layernorm=True,
                attn_mask_type=enc_dec_attn_mask_type,
                window_size=enc_dec_window_size,
                bottom_right_diagonal=enc_dec_bottom_right_diagonal,
            )
        self.layernorm_mlp = LayerNormMLP(
            hidden_size,
            ffn_hidden_size,
            eps=layernorm_epsilon,
            activation=activation,
            activation_params=activation_params,
            return_layernorm_output=apply_residual_connection_post_layernorm,
            name=f"{name}.layernorm_mlp" if name else None,
            **common,
        )
        if output_layernorm:
            norm = LayerNorm if normalization == "LayerNorm" else RMSNorm
            self.layernorm = norm(
                hidden_size,
                eps=layernorm_epsilon,
                params_dtype=params_dtype,
                zero_centered_gamma=zero_centered_gamma,
                device=device,
            )

    @property
    def _label(self) -> str:
        return f"TransformerLayer {self.name!r}" if self.name else "TransformerLayer"

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Mask = None,
        self_attn_mask_type: str | None = None,
        window_size: tuple[int, int] | None = None,
        bottom_right_diagonal: bool | None = None,
        encoder_output: torch.Tensor | None = None,
        enc_dec_attn_mask: Mask = None,
        enc_dec_attn_mask_type: str | None = None,
        enc_dec_window_size: tuple[int, int] | None = None,
        enc_dec_bottom_right_diagonal: bool | None = None,
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
    ) -> torch.Tensor:
        """hidden_states [S, B, hidden], [B, S, hidden] or [T, hidden] -> the same shape, in its dtype or torch.autocast's.

        attention_mask is read with padding and arbitrary masks, see DotProductAttention.forward; rotary_pos_emb: see
        MultiheadAttention.forward; is_first_microbatch: see Linear's. Only decoders take encoder_output, [T, B, hidden],
        [B, T, hidden] or [T, hidden], and enc_dec_*, which do for their cross attention what the others do for self attention.
        Rotary embeddings, biases and inference_params are of self attention alone.

        Packed ("thd") sequences are those of cu_seqlens_q and cu_seqlens_kv, int32 [B + 1], see DotProductAttention.forward; in
        decoders the first are of hidden_states, in both attentions, the second of encoder_output. With inference_params they are
        of cross attention alone.
        """
        masking = (self_attn_mask_type, window_size, bottom_right_diagonal)
        cross_masking = (enc_dec_attn_mask_type, enc_dec_window_size, enc_dec_bottom_right_diagonal)
        told = (is_first_microbatch, checkpoint_core_attention)
        bias = (core_attention_bias_type, core_attention_bias, alibi_slopes)
        lengths = (cu_seqlens_q, cu_seqlens_kv, cu_seqlens_q_padded, cu_seqlens_kv_padded, max_seqlen_q, max_seqlen_kv)
        own, gaps = lengths, pad_between_seqs
        if self.layer_type == "encoder":
            self._refuse_cross(encoder_output, enc_dec_attn_mask, *cross_masking)
        elif self._packed:
            own = (cu_seqlens_q, cu_seqlens_q, cu_seqlens_q_padded, cu_seqlens_q_padded, max_seqlen_q, max_seqlen_q)
            own, gaps = (own, gaps) if inference_params is None else ((None,) * 6, None)
        else:
            said = zip(Lengths._fields, (*lengths, pad_between_seqs))
            refuse(self._label, {name: (value, None) for name, value in said}, "decoders take it with attn_input_format='thd' only")
        call = Call(attention_mask, None, masking, *told, inference_params, rotary_pos_emb, bias, own, gaps)
        starts = cu_seqlens_q if cu_seqlens_q_padded is None else cu_seqlens_q_padded
        samples = starts if self._packed else self._batch_dim
        if inference_params is not None and samples is None and self.training and self.drop_path_rate > 0:
            raise RuntimeError(
                f"{self._label}: drop_path_rate={self.drop_path_rate} is on, and inference_params is for inference; use .eval()"
            )
        attended, residual = attend_with_residual(self.self_attention, hidden_states, call)
        if self.layer_type == "decoder":
            hidden = self._add(*_branch(attended, residual), samples)
            rest = {"lengths": lengths, "pad_between_seqs": pad_between_seqs}
            call = Call(enc_dec_attn_mask, encoder_output, cross_masking, *told, **rest)
            attended, residual = attend_with_residual(self.inter_attention, hidden, call)
        if self.parallel_attention_mlp:
            mlp_out, residual = with_residual(self.layernorm_mlp, residual, is_first_microbatch=is_first_microbatch)
            return self._add(attended, residual, samples, mlp_out)
        out = self._mlp(*_branch(attended, residual), samples, is_first_microbatch)
        return self.layernorm(out) if self.output_layernorm else out

    def _refuse_cross(self, *arguments: Any) -> None:
        """An error that names the first argument of cross attention that was given."""
        for name, value in zip(_CROSS, arguments):
            if value is not None:
                raise ValueError(
                    f"{self._label}: {name} is for cross attention, this is an encoder layer; leave it out, or build it with "
                    "layer_type='decoder'"
                )

    def _mlp(self, x: torch.Tensor, residual: torch.Tensor, samples: Any, first: bool | None) -> torch.Tensor:
        """The MLP and both residual sums around it: of x and the residual before it, and after it."""
        mlp = self.layernorm_mlp
        dropout, drop_path = (self.hidden_dropout, self.drop_path_rate) if self.training else (0.0, 0.0)
        if watched(mlp, "forward_fused_residual") or drop_path > 0:
            hidden = self._add(x, residual, samples)
            x, residual = _branch(*with_residual(mlp, hidden, is_first_microbatch=first))
        elif mlp.return_layernorm_output:
            x, residual = _branch(*mlp.forward_fused_residual(x, None, residual, dropout, is_first_microbatch=first))
        else:
            return mlp.forward_between_residuals(x, residual, dropout, first)
        return self._add(x, residual, samples)

    def _add(self, x: torch.Tensor, residual: torch.Tensor, samples: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
        if not self.training:
            return bias_dropout_add(x, bias, residual)
        return bias_dropout_add(x, bias, residual, self.hidden_dropout, self.drop_path_rate, samples)
