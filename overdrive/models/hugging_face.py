"""Weights of Hugging Face's `LlamaForCausalLM` and `GPT2LMHeadModel`, to and from the models here; transformers is not needed.

Both sides compute the same: rotary positions turn features i and D / 2 + i together, gelu is the tanh approximation. How weights
are named, joined and laid out differs, as the tables `LLAMA` and `GPT2` say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from overdrive.models.config import ModelConfig
from overdrive.models.language import LanguageModel

HEAD = "lm_head.weight"
MOST_SHOWN = 8
"""Problems that one error names."""

LLAMA = {
    "embedding": ["model.embed_tokens.weight"],
    "layers.N.self_attention.layernorm_qkv.layer_norm_weight": ["model.layers.N.input_layernorm.weight"],
    "layers.N.self_attention.layernorm_qkv.weight": [
        "model.layers.N.self_attn.q_proj.weight",
        "model.layers.N.self_attn.k_proj.weight",
        "model.layers.N.self_attn.v_proj.weight",
    ],
    "layers.N.self_attention.proj.weight": ["model.layers.N.self_attn.o_proj.weight"],
    "layers.N.layernorm_mlp.layer_norm_weight": ["model.layers.N.post_attention_layernorm.weight"],
    "layers.N.layernorm_mlp.fc1_weight": ["model.layers.N.mlp.gate_proj.weight", "model.layers.N.mlp.up_proj.weight"],
    "layers.N.layernorm_mlp.fc2_weight": ["model.layers.N.mlp.down_proj.weight"],
    "norm.weight": ["model.norm.weight"],
    "head": [HEAD],
}
"""Each parameter of a Llama here, and the weights there whose rows are its rows, in this order. N is the layer, from 0."""

GPT2 = {
    "embedding": ["transformer.wte.weight"],
    "position": ["transformer.wpe.weight"],
    "layers.N.self_attention.layernorm_qkv.layer_norm_weight": ["transformer.h.N.ln_1.weight"],
    "layers.N.self_attention.layernorm_qkv.layer_norm_bias": ["transformer.h.N.ln_1.bias"],
    "layers.N.self_attention.layernorm_qkv.weight": ["transformer.h.N.attn.c_attn.weight^T"],
    "layers.N.self_attention.layernorm_qkv.bias": ["transformer.h.N.attn.c_attn.bias"],
    "layers.N.self_attention.proj.weight": ["transformer.h.N.attn.c_proj.weight^T"],
    "layers.N.self_attention.proj.bias": ["transformer.h.N.attn.c_proj.bias"],
    "layers.N.layernorm_mlp.layer_norm_weight": ["transformer.h.N.ln_2.weight"],
    "layers.N.layernorm_mlp.layer_norm_bias": ["transformer.h.N.ln_2.bias"],
    "layers.N.layernorm_mlp.fc1_weight": ["transformer.h.N.mlp.c_fc.weight^T"],
    "layers.N.layernorm_mlp.fc1_bias": ["transformer.h.N.mlp.c_fc.bias"],
    "layers.N.layernorm_mlp.fc2_weight": ["transformer.h.N.mlp.c_proj.weight^T"],
    "layers.N.layernorm_mlp.fc2_bias": ["transformer.h.N.mlp.c_proj.bias"],
    "norm.weight": ["transformer.ln_f.weight"],
    "norm.bias": ["transformer.ln_f.bias"],
    "head": [HEAD],
}
"""The same for a GPT-2; ^T marks a Conv1D's weight, kept as [in, out]."""

TABLES = {"llama": LLAMA, "gpt": GPT2}


def _only(config: Any, **allowed: tuple[Any, ...]) -> None:
    """NotImplementedError for a field of `config` with another value than the allowed ones, of which the first is its default."""
    for name, values in allowed.items():
        came = getattr(config, name, values[0])
        if came not in values:
            taken = " or ".join(map(repr, values))
            raise NotImplementedError(f"{name}={came!r} of a Hugging Face {config.model_type} is not implemented; it takes {taken}")


def read_config(config: Any, dropout: float = 0.0) -> ModelConfig:
    """The model that a `LlamaConfig` or `GPT2Config` describes. NotImplementedError naming what there is no equal of here.

    dropout: that of the new model; Hugging Face has several probabilities, which only matter in training and are not read.
    """
    kind = getattr(config, "model_type", None)
    if kind == "llama":
        channels = config.hidden_size // config.num_attention_heads
        _only(config, hidden_act=("silu",), attention_bias=(False,), mlp_bias=(False,), head_dim=(channels, None))
        # transformers 5 has rope_parameters, before it there were rope_theta and rope_scaling
        rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta, **(config.rope_scaling or {})}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise NotImplementedError(f"the rotary positions of a Hugging Face llama, {rope}, are scaled, which is not implemented")
        return ModelConfig(
            "llama",
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            groups=config.num_key_value_heads,
            ffn=config.intermediate_size,
            context=config.max_position_embeddings,
            dropout=dropout,
            tied=config.tie_word_embeddings,
            vocabulary=config.vocab_size,
            epsilon=config.rms_norm_eps,
            rotary_base=float(rope["rope_theta"]),
        )
    if kind == "gpt2":
        _only(
            config,
            activation_function=("gelu_new", "gelu_pytorch_tanh"),
            scale_attn_weights=(True,),
            scale_attn_by_inverse_layer_idx=(False,),
            add_cross_attention=(False,),
        )
        return ModelConfig(
            "gpt",
            layers=config.n_layer,
            hidden=config.n_embd,
            heads=config.n_head,
            ffn=config.n_inner,
            context=config.n_positions,
            dropout=dropout,
            tied=config.tie_word_embeddings,
            vocabulary=config.vocab_size,
            epsilon=config.layer_norm_epsilon,
        )
    raise NotImplementedError(f"model_type={kind!r} is not implemented; there are 'llama' and 'gpt2'")


def _views(model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """(name there, view of the parameter here that holds it) of every weight; writing into it is loading it."""
    config = model.config
    if config.kind == "gpt" and config.groups != config.heads:
        raise NotImplementedError(
            f"groups={config.groups} is not implemented for a gpt2, which has one for each of {config.heads} heads"
        )
    kv = config.hidden // config.heads * (config.groups or 0)
    rows = {2: [config.ffn, config.ffn], 3: [config.hidden, kv, kv]}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        number = name.split(".")[1] if name.startswith("layers.") else ""
        names = TABLES[config.kind][name.replace(f".{number}.", ".N.", 1)]
        for there, view in zip(names, parameter.detach().split(rows.get(len(names), [len(parameter)]))):
            yield there.removesuffix("^T").replace(".N.", f".{number}."), view.t() if there.endswith("^T") else view


def _problems(views: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Iterator[str]:
    for name, view in views.items():
        if name not in state:
            yield f"{name} {list(view.shape)} is missing"
        elif state[name].shape != view.shape:
            yield f"{name} is {list(state[name].shape)} and must be {list(view.shape)}"
        elif not state[name].is_floating_point():
            yield f"{name} is {state[name].dtype} and must be of floating point"
    for name in state:
        if name not in views:
            yield f"{name} {list(state[name].shape)} has no place in this model"


def load_weights(model: LanguageModel, state: Mapping[str, Tensor]) -> None:
    """Copy the state dict of a `LlamaForCausalLM` or `GPT2LMHeadModel` into `model`, whatever the dtypes and devices of the two.

    ValueError that names what is missing, too many or of another shape; then nothing has been copied. A tied head may be missing.
    """
    views = dict(_views(model))
    if model.config.tied and HEAD not in state:
        del views[HEAD]
    problems = list(_problems(views, state))
    (embedding,) = TABLES[model.config.kind]["embedding"]
    if not problems and model.config.tied and HEAD in state and not torch.equal(state[HEAD], state[embedding]):
        problems = [f"{HEAD} is not {embedding}, and this model has one weight for both; build it with tied=False"]
    if problems:
        shown = problems[:MOST_SHOWN] + ([f"and {len(problems) - MOST_SHOWN} more"] if len(problems) > MOST_SHOWN else [])
        raise ValueError(f"state does not fit this {model.config.kind}:\n  " + "\n  ".join(shown))
    for name, view in views.items():
        view.copy_(state[name])


def weights_of(model: LanguageModel) -> dict[str, Tensor]:
    """A copy of the parameters as `load_state_dict` of a `LlamaForCausalLM` or `GPT2LMHeadModel` wants them."""
    return {name: view.clone(memory_format=torch.contiguous_format) for name, view in _views(model)}
