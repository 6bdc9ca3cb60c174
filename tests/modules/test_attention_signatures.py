"""Positional order of the arguments is Transformer Engine's: code written for it passes them by position."""

from __future__ import annotations

import inspect

import pytest

from overdrive.modules.attention import DotProductAttention
from overdrive.modules.multihead_attention import MultiheadAttention
from overdrive.modules.transformer import TransformerLayer

SIGNATURES = {
    (DotProductAttention, "__init__"): """
        num_attention_heads kv_channels num_gqa_groups attention_dropout qkv_format attn_mask_type window_size
        bottom_right_diagonal sequence_parallel tp_size get_rng_state_tracker tp_group layer_number attention_type cp_group
        cp_global_ranks cp_stream cp_comm_type softmax_scale softmax_type return_max_logit name
    """,
    (DotProductAttention, "forward"): """
        query_layer key_layer value_layer attention_mask qkv_format cu_seqlens_q cu_seqlens_kv cu_seqlens_q_padded
        cu_seqlens_kv_padded max_seqlen_q max_seqlen_kv attn_mask_type window_size bottom_right_diagonal
        checkpoint_core_attention core_attention_bias_type core_attention_bias alibi_slopes fast_zero_fill inference_params
        pad_between_seqs fp8_output num_splits
    """,
    (MultiheadAttention, "__init__"): """
        hidden_size num_attention_heads kv_channels attention_dropout layernorm_epsilon init_method output_layer_init_method
        layer_number attn_mask_type window_size bottom_right_diagonal tp_group tp_size num_gqa_groups fuse_wgrad_accumulation
        get_rng_state_tracker sequence_parallel params_dtype return_bias return_layernorm_output input_layernorm
        attention_type set_parallel_mode fuse_qkv_params zero_centered_gamma qkv_weight_interleaved rotary_pos_interleaved
        ub_overlap_ag ub_overlap_rs ub_overlap_rs_dgrad ub_bulk_dgrad ub_bulk_wgrad bias normalization device qkv_format name
        qk_norm_type qk_norm_eps qk_norm_before_rope seq_length micro_batch_size softmax_type
    """,
    (MultiheadAttention, "forward"): """
        hidden_states attention_mask encoder_output attn_mask_type window_size bottom_right_diagonal is_first_microbatch
        checkpoint_core_attention inference_params rotary_pos_emb core_attention_bias_type core_attention_bias alibi_slopes
        cu_seqlens_q cu_seqlens_kv cu_seqlens_q_padded cu_seqlens_kv_padded max_seqlen_q max_seqlen_kv fast_zero_fill
        pad_between_seqs
    """,
    (TransformerLayer, "__init__"): """
        hidden_size ffn_hidden_size num_attention_heads num_gqa_groups layernorm_epsilon hidden_dropout attention_dropout
        init_method output_layer_init_method layer_number kv_channels self_attn_mask_type window_size bottom_right_diagonal
        enc_dec_attn_mask_type enc_dec_bottom_right_diagonal enc_dec_window_size tp_group tp_size params_dtype
        get_rng_state_tracker fuse_wgrad_accumulation seq_length micro_batch_size sequence_parallel
        apply_residual_connection_post_layernorm output_layernorm parallel_attention_mlp layer_type drop_path_rate
        set_parallel_mode fuse_qkv_params rotary_pos_interleaved zero_centered_gamma qkv_weight_interleaved ub_tp_comm_overlap
        ub_overlap_ag ub_overlap_rs ub_overlap_rs_dgrad ub_bulk_dgrad ub_bulk_wgrad bias activation activation_params
        normalization device attn_input_format name qk_norm_type qk_norm_eps qk_norm_before_rope softmax_type
    """,
    (TransformerLayer, "forward"): """
        hidden_states attention_mask self_attn_mask_type window_size bottom_right_diagonal encoder_output enc_dec_attn_mask
        enc_dec_attn_mask_type enc_dec_window_size enc_dec_bottom_right_diagonal is_first_microbatch checkpoint_core_attention
        inference_params rotary_pos_emb core_attention_bias_type core_attention_bias alibi_slopes cu_seqlens_q cu_seqlens_kv
        cu_seqlens_q_padded cu_seqlens_kv_padded max_seqlen_q max_seqlen_kv fast_zero_fill pad_between_seqs
    """,
}


@pytest.mark.parametrize(("cls", "method"), SIGNATURES)
def test_positional_order(cls, method):
    assert list(inspect.signature(getattr(cls, method)).parameters)[1:] == SIGNATURES[cls, method].split()
