"""Names, order and defaults of arguments are Transformer Engine's (TE-SPEC); arguments of parallelism refuse by name."""

from __future__ import annotations

import contextlib
import inspect
import re
from typing import Any

import pytest

import overdrive.pytorch as te

OVERLAPS = "ub_overlap_ag=F, ub_overlap_rs=F, ub_overlap_rs_dgrad=F"
ATTENTION = """core_attention_bias_type="no_bias", core_attention_bias=N, alibi_slopes=N, cu_seqlens_q=N, cu_seqlens_kv=N,
    cu_seqlens_q_padded=N, cu_seqlens_kv_padded=N, max_seqlen_q=N, max_seqlen_kv=N, fast_zero_fill=T, pad_between_seqs=N"""
NORM = "normalized_shape=N, eps=1e-5, sequence_parallel=N, params_dtype=N, zero_centered_gamma=F, hidden_size=N"

SIGNATURES = {
    "Linear": f"""in_features, out_features, sequence_parallel=F, fuse_wgrad_accumulation=F, tp_group=N, tp_size=1,
        get_rng_state_tracker=N, rng_tracker_name=N, init_method=N, bias=T, return_bias=F, params_dtype=N, parallel_mode=N,
        parameters_split=N, device=N, {OVERLAPS}, ub_bulk_dgrad=F, ub_bulk_wgrad=F, ub_name=N, delay_wgrad_compute=F,
        symmetric_ar_type=N, save_original_input=F, name=N""",
    "Linear.forward": "inp, is_first_microbatch=N, fp8_output=F, fp8_grad=F",
    "LayerNormLinear": f"""in_features, out_features, eps=1e-5, sequence_parallel=F, fuse_wgrad_accumulation=F, tp_group=N,
        tp_size=1, get_rng_state_tracker=N, init_method=N, bias=T, normalization="LayerNorm", return_bias=F, params_dtype=N,
        parallel_mode=N, return_layernorm_output=F, return_layernorm_output_gathered=F, parameters_split=N,
        zero_centered_gamma=F, device=N, {OVERLAPS}, ub_bulk_wgrad=F, ub_bulk_dgrad=F, ub_name=N, delay_wgrad_compute=F,
        symmetric_ar_type=N, name=N""",
    "LayerNormLinear.forward": "inp, is_first_microbatch=N, fp8_output=F, fp8_grad=F",
    "LayerNormMLP": """hidden_size, ffn_hidden_size, eps=1e-5, sequence_parallel=F, return_bias=F, get_rng_state_tracker=N,
        tp_group=N, tp_size=1, init_method=N, bias=T, normalization="LayerNorm", activation="gelu", activation_params=N,
        output_layer_init_method=N, fuse_wgrad_accumulation=F, params_dtype=N, return_layernorm_output=F,
        return_layernorm_output_gathered=F, seq_length=N, micro_batch_size=N, set_parallel_mode=F, zero_centered_gamma=F,
        device=N, ub_overlap_ag=F, name=N, ub_overlap_rs=F, ub_overlap_rs_dgrad=F, ub_bulk_dgrad=F, ub_bulk_wgrad=F,
        delay_wgrad_compute=F, symmetric_ar_type=N, checkpoint=F""",
    "LayerNormMLP.forward": "inp, is_first_microbatch=N",
    "LayerNorm": NORM,
    "RMSNorm": NORM,
    "DotProductAttention": """num_attention_heads, kv_channels, num_gqa_groups=N, attention_dropout=0.0, qkv_format="sbhd",
        attn_mask_type="causal", window_size=N, bottom_right_diagonal=N, sequence_parallel=F, tp_size=1,
        get_rng_state_tracker=N, tp_group=N, layer_number=N, attention_type="self", cp_group=N, cp_global_ranks=N, cp_stream=N,
        cp_comm_type="p2p", softmax_scale=N, softmax_type="vanilla", return_max_logit=F, name=N""",
    "DotProductAttention.forward": """query_layer, key_layer, value_layer, attention_mask=N, qkv_format=N, cu_seqlens_q=N,
        cu_seqlens_kv=N, cu_seqlens_q_padded=N, cu_seqlens_kv_padded=N, max_seqlen_q=N, max_seqlen_kv=N, attn_mask_type=N,
        window_size=N, bottom_right_diagonal=N, checkpoint_core_attention=F, core_attention_bias_type="no_bias",
        core_attention_bias=N, alibi_slopes=N, fast_zero_fill=T, inference_params=N, pad_between_seqs=N, fp8_output=F,
        num_splits=1""",
    "MultiheadAttention": f"""hidden_size, num_attention_heads, kv_channels=N, attention_dropout=0.1, layernorm_epsilon=1e-5,
        init_method=N, output_layer_init_method=N, layer_number=N, attn_mask_type="causal", window_size=N,
        bottom_right_diagonal=N, tp_group=N, tp_size=1, num_gqa_groups=N, fuse_wgrad_accumulation=F, get_rng_state_tracker=N,
        sequence_parallel=F, params_dtype=N, return_bias=F, return_layernorm_output=F, input_layernorm=F,
        attention_type="self", set_parallel_mode=F, fuse_qkv_params=F, zero_centered_gamma=F, qkv_weight_interleaved=T,
        rotary_pos_interleaved=F, {OVERLAPS}, ub_bulk_dgrad=F, ub_bulk_wgrad=F, bias=T, normalization="LayerNorm", device=N,
        qkv_format="sbhd", name=N, qk_norm_type=N, qk_norm_eps=1e-6, qk_norm_before_rope=F, seq_length=N, micro_batch_size=N,
        softmax_type="vanilla" """,
    "MultiheadAttention.forward": f"""hidden_states, attention_mask=N, encoder_output=N, attn_mask_type=N, window_size=N,
        bottom_right_diagonal=N, is_first_microbatch=N, checkpoint_core_attention=F, inference_params=N, rotary_pos_emb=N,
        {ATTENTION}""",
    "TransformerLayer": """hidden_size, ffn_hidden_size, num_attention_heads, num_gqa_groups=N, layernorm_epsilon=1e-5,
        hidden_dropout=0.1, attention_dropout=0.1, init_method=N, output_layer_init_method=N, layer_number=N, kv_channels=N,
        self_attn_mask_type="causal", window_size=N, bottom_right_diagonal=N, enc_dec_attn_mask_type="no_mask",
        enc_dec_bottom_right_diagonal=N, enc_dec_window_size=N, tp_group=N, tp_size=1, params_dtype=N,
        get_rng_state_tracker=N, fuse_wgrad_accumulation=F, seq_length=N, micro_batch_size=N, sequence_parallel=F,
        apply_residual_connection_post_layernorm=F, output_layernorm=F, parallel_attention_mlp=F, layer_type="encoder",
        drop_path_rate=0.0, set_parallel_mode=F, fuse_qkv_params=F, rotary_pos_interleaved=F, zero_centered_gamma=F,
        qkv_weight_interleaved=T, ub_tp_comm_overlap=F, ub_overlap_ag=T, ub_overlap_rs=T, ub_overlap_rs_dgrad=F,
        ub_bulk_dgrad=T, ub_bulk_wgrad=T, bias=T, activation="gelu", activation_params=N, normalization="LayerNorm",
        device=N, attn_input_format="sbhd", name=N, qk_norm_type=N, qk_norm_eps=1e-6, qk_norm_before_rope=F,
        softmax_type="vanilla" """,
    "TransformerLayer.forward": f"""hidden_states, attention_mask=N, self_attn_mask_type=N, window_size=N,
        bottom_right_diagonal=N, encoder_output=N, enc_dec_attn_mask=N, enc_dec_attn_mask_type=N, enc_dec_window_size=N,
        enc_dec_bottom_right_diagonal=N, is_first_microbatch=N, checkpoint_core_attention=F, inference_params=N,
        rotary_pos_emb=N, {ATTENTION}""",
    "RotaryPositionEmbedding": """dim, rotary_percent=1.0, seq_len_interpolation_factor=N, pretrained_max_position_embeddings=N,
        rotary_base=1e4, interleaved=F""",
    "RotaryPositionEmbedding.forward": "max_seq_len, offset=0",
    "apply_rotary_pos_emb": """t, freqs, tensor_format="sbhd", start_positions=N, interleaved=F, fused=F, cu_seqlens=N, cp_size=1,
        cp_rank=0""",
    "autocast": "enabled=T, calibrating=F, recipe=N, amax_reduction_group=N, _graph=F",
    "fp8_autocast": "enabled=T, calibrating=F, fp8_recipe=N, fp8_group=N, _graph=F",
}
"""What TE-SPEC says, word for word (F, T, N = False, True, None), but for device: None is the GPU where there is one."""


def parse(text: str) -> list[tuple[str, Any]]:
    """(name, default) of each argument; inspect's `empty` where there is none."""
    values = {"F": False, "T": True, "N": None}
    pairs = (argument.strip().partition("=") for argument in re.split(r",\s", text))
    return [(name, eval(value, values) if equals else inspect.Parameter.empty) for name, equals, value in pairs]


def positional(function: Any) -> list[tuple[str, Any]]:
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]


@pytest.mark.parametrize("path", SIGNATURES)
def test_positional_order_names_and_defaults(path):
    name, _, method = path.partition(".")
    target = getattr(te, name)
    assert positional(getattr(target, method) if method else target) == parse(SIGNATURES[path])


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_keywords_of_the_norms(name):
    keywords = {p.name: p.default for p in inspect.signature(getattr(te, name)).parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert keywords.items() >= {"device": None, "dtype": None, "sm_margin": 0, "bias": True, "elementwise_affine": True}.items()


# --- parallelism ------------------------------------------------------------------------------------------------------

GROUP = object()
PARALLEL = {"sequence_parallel": True, "tp_group": GROUP, "tp_size": 2}
UB = {"ub_overlap_ag": True, "ub_overlap_rs": True, "ub_overlap_rs_dgrad": True, "ub_bulk_dgrad": True, "ub_bulk_wgrad": True}
SIZES = {
    "Linear": (16, 16),
    "LayerNormLinear": (16, 16),
    "LayerNormMLP": (16, 16),
    "LayerNorm": (16,),
    "RMSNorm": (16,),
    "DotProductAttention": (2, 8),
    "MultiheadAttention": (16, 2),
    "TransformerLayer": (16, 32, 2),
}
REFUSED = {
    "Linear": {**PARALLEL, **UB, "ub_name": "proj", "symmetric_ar_type": "multimem_all_reduce", "rng_tracker_name": "model"},
    "LayerNormLinear": {
        **PARALLEL,
        **UB,
        "ub_name": "qkv",
        "symmetric_ar_type": "two_shot",
        "return_layernorm_output_gathered": True,
    },
    "LayerNormMLP": {**PARALLEL, **UB, "symmetric_ar_type": "two_shot", "return_layernorm_output_gathered": True},
    "LayerNorm": {"sequence_parallel": True},
    "RMSNorm": {"sequence_parallel": True},
    "DotProductAttention": {
        **PARALLEL,
        "cp_group": GROUP,
        "cp_global_ranks": [0, 1],
        "cp_stream": GROUP,
        "cp_comm_type": "a2a",
    },
    "MultiheadAttention": {**PARALLEL, **UB},
    "TransformerLayer": {**PARALLEL, "ub_tp_comm_overlap": True},
}


@pytest.mark.parametrize(("layer", "name"), [(layer, name) for layer, arguments in REFUSED.items() for name in arguments])
def test_an_argument_of_parallelism_refuses_and_names_itself(layer, name, device):
    arguments = {} if layer == "DotProductAttention" else {"device": device}
    with pytest.raises(NotImplementedError, match=rf"{layer}.*\b{name}=.*leave it"):
        getattr(te, layer)(*SIZES[layer], **arguments, **{name: REFUSED[layer][name]})


@pytest.mark.parametrize("layer", SIZES)
def test_arguments_of_parallelism_are_taken_at_their_defaults(layer, device):
    defaults = {name: value for name, value in parse(SIGNATURES[layer]) if name in REFUSED[layer]}
    assert defaults
    getattr(te, layer)(*SIZES[layer], **defaults, **({} if layer == "DotProductAttention" else {"device": device}))


@pytest.mark.parametrize("layer", ["LayerNormMLP", "MultiheadAttention", "TransformerLayer"])
def test_sizes_that_only_hint_and_set_parallel_mode_are_taken(layer, device):
    getattr(te, layer)(*SIZES[layer], device=device, seq_length=128, micro_batch_size=2, set_parallel_mode=True)


@pytest.mark.parametrize("layer", ["Linear", "LayerNormLinear", "LayerNormMLP"])
def test_get_rng_state_tracker_is_entered_around_the_initialisation(layer, device):
    entered = []

    class Tracker:
        def fork(self):

            entered.append(1)
            return contextlib.nullcontext()

    getattr(te, layer)(16, 16, device=device, get_rng_state_tracker=Tracker)
    assert entered
