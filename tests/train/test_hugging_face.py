"""Weights of Hugging Face's models: where each goes, that none is lost, and the same logits on both sides."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import overdrive.pytorch as te
from overdrive.models import ArgumentError, ModelConfig, build
from overdrive.models.hugging_face import load_weights, read_config, weights_of
from overdrive.recipe import DelayedScaling
from tests.numerics import assert_same_bits, relative_error

EXAMPLE = Path(__file__).parents[2] / "examples" / "from_hugging_face.py"
LLAMA_SHAPES = {
    "model.embed_tokens.weight": (50, 32),
    "model.layers.0.self_attn.q_proj.weight": (32, 32),
    "model.layers.0.self_attn.k_proj.weight": (16, 32),
    "model.layers.0.self_attn.v_proj.weight": (16, 32),
    "model.layers.0.self_attn.o_proj.weight": (32, 32),
    "model.layers.0.mlp.gate_proj.weight": (80, 32),
    "model.layers.0.mlp.up_proj.weight": (80, 32),
    "model.layers.0.mlp.down_proj.weight": (32, 80),
    "model.layers.0.input_layernorm.weight": (32,),
    "model.layers.0.post_attention_layernorm.weight": (32,),
    "model.norm.weight": (32,),
    "lm_head.weight": (50, 32),
}
GPT2_SHAPES = {
    "transformer.wte.weight": (50, 32),
    "transformer.wpe.weight": (24, 32),
    "transformer.h.0.ln_1.weight": (32,),
    "transformer.h.0.ln_1.bias": (32,),
    "transformer.h.0.attn.c_attn.weight": (32, 96),
    "transformer.h.0.attn.c_attn.bias": (96,),
    "transformer.h.0.attn.c_proj.weight": (32, 32),
    "transformer.h.0.attn.c_proj.bias": (32,),
    "transformer.h.0.ln_2.weight": (32,),
    "transformer.h.0.ln_2.bias": (32,),
    "transformer.h.0.mlp.c_fc.weight": (32, 80),
    "transformer.h.0.mlp.c_fc.bias": (80,),
    "transformer.h.0.mlp.c_proj.weight": (80, 32),
    "transformer.h.0.mlp.c_proj.bias": (32,),
    "transformer.ln_f.weight": (32,),
    "transformer.ln_f.bias": (32,),
    "lm_head.weight": (50, 32),
}
SHAPES = {"llama": LLAMA_SHAPES, "gpt": GPT2_SHAPES}
LAYERS = 12  # so that layer 1 and layer 11 must not be confused


def config(kind, **changes):
    values = {"layers": LAYERS, "hidden": 32, "heads": 4, "ffn": 80, "context": 24, "vocabulary": 50, "tied": False}
    return ModelConfig(kind, **values | {"groups": 2 if kind == "llama" else None} | changes)


def state_dict(kind, dtype=torch.float32):
    """Random weights of all layers under Hugging Face's names."""
    numbers = {name: range(LAYERS) if ".0." in name else (0,) for name in SHAPES[kind]}
    return {
        name.replace(".0.", f".{number}."): torch.randn(shape, dtype=dtype)
        for name, shape in SHAPES[kind].items()
        for number in numbers[name]
    }


def assert_same_state(actual, expected):
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        assert_same_bits(actual[name], weight, name)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_keeps_every_bit(device, kind, dtype):
    state = state_dict(kind, dtype)
    model = build(config(kind), device, dtype)
    load_weights(model, state)
    back = weights_of(model)
    assert_same_state(back, state)
    assert all(weight.is_contiguous() and weight.device.type == device for weight in back.values())
    before = back["lm_head.weight"].clone()
    with torch.no_grad():
        model.head.zero_()
    assert_same_bits(back["lm_head.weight"], before, "what came back is a copy")


def test_a_llamas_weights_are_joined_in_order(device):
    state, model = state_dict("llama"), build(config("llama"), device, torch.float32)
    load_weights(model, state)
    layer, theirs = model.layers[11], "model.layers.11."
    qkv, fc1 = layer.self_attention.layernorm_qkv.weight, layer.layernorm_mlp.fc1_weight
    assert_same_bits(qkv[:32], state[f"{theirs}self_attn.q_proj.weight"], "Q")
    assert_same_bits(qkv[32:48], state[f"{theirs}self_attn.k_proj.weight"], "K")
    assert_same_bits(qkv[48:], state[f"{theirs}self_attn.v_proj.weight"], "V")
    assert_same_bits(fc1[:80], state[f"{theirs}mlp.gate_proj.weight"], "gate")
    assert_same_bits(fc1[80:], state[f"{theirs}mlp.up_proj.weight"], "up")


def test_a_gpt2s_weights_are_transposed_and_its_embeddings_are_not(device):
    state, model = state_dict("gpt"), build(config("gpt"), device, torch.float32)
    load_weights(model, state)
    layer, theirs = model.layers[1], "transformer.h.1."
    assert_same_bits(layer.self_attention.proj.weight, state[f"{theirs}attn.c_proj.weight"].t(), "proj")
    assert_same_bits(layer.layernorm_mlp.fc1_weight, state[f"{theirs}mlp.c_fc.weight"].t(), "fc1")
    assert_same_bits(model.embedding, state["transformer.wte.weight"], "embedding")


@pytest.mark.parametrize("kind", SHAPES)
def test_a_tied_head_is_the_embedding(device, kind):
    state = state_dict(kind)
    embedding = next(name for name in state if name.endswith(("embed_tokens.weight", "wte.weight")))
    model = build(config(kind, tied=True), device, torch.float32)
    with pytest.raises(ValueError, match=r"lm_head.weight is not .*; build it with tied=False"):
        load_weights(model, state)
    del state["lm_head.weight"]  # files leave a tied head out
    load_weights(model, state)
    tied = {**state, "lm_head.weight": state[embedding]}
    assert_same_state(weights_of(model), tied)
    load_weights(model, tied)
    with pytest.raises(ValueError, match=r"lm_head.weight \[50, 32\] is missing"):
        load_weights(build(config(kind), device, torch.float32), state)


def test_what_does_not_fit_is_named_and_nothing_is_loaded(device):
    model = build(config("llama"), device, torch.float32)
    before = weights_of(model)
    state = state_dict("llama")
    state["model.layers.3.mlp.up_proj.weight"] = torch.zeros(80, 31)
    del state["model.layers.4.self_attn.k_proj.weight"]
    state["model.layers.5.self_attn.q_proj.bias"] = torch.zeros(32)
    state["model.norm.weight"] = torch.zeros(32, dtype=torch.int8)
    with pytest.raises(ValueError, match="state does not fit this llama") as caught:
        load_weights(model, state)
    assert set(str(caught.value).splitlines()[1:]) == {
        "  model.layers.4.self_attn.k_proj.weight [16, 32] is missing",
        "  model.layers.3.mlp.up_proj.weight is [80, 31] and must be [80, 32]",
        "  model.norm.weight is torch.int8 and must be of floating point",
        "  model.layers.5.self_attn.q_proj.bias [32] has no place in this model",
    }
    assert_same_state(weights_of(model), before)


def test_a_conv1d_of_the_other_layout_names_itself(device):
    state = state_dict("gpt")
    name = "transformer.h.2.mlp.c_fc.weight"
    state[name] = state[name].t()
    with pytest.raises(ValueError, match=rf"{name} is \[80, 32\] and must be \[32, 80\]"):
        load_weights(build(config("gpt"), device, torch.float32), state)


def test_a_whole_other_model_gives_a_short_error(device):
    with pytest.raises(ValueError, match=r"and \d\d+ more$") as caught:
        load_weights(build(config("llama"), device), state_dict("gpt"))
    assert len(str(caught.value).splitlines()) == 10


def test_a_gpt_with_groups_has_no_equal_there(device):
    with pytest.raises(NotImplementedError, match="groups=2 is not implemented for a gpt2, which has one for each of 4 heads"):
        weights_of(build(config("gpt", groups=2), device))


def llama_config(**changes):
    """What of a LlamaConfig is read, as transformers 4 has it."""
    values = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
    values |= {"num_key_value_heads": 2, "max_position_embeddings": 24, "vocab_size": 50, "rms_norm_eps": 1e-6, "rope_theta": 5e5}
    return SimpleNamespace(**values | {"rope_scaling": None, "tie_word_embeddings": False, "hidden_act": "silu"} | changes)


def gpt2_config(**changes):
    """What of a GPT2Config is read."""
    values = {"model_type": "gpt2", "n_embd": 32, "n_inner": None, "n_layer": 3, "n_head": 4, "n_positions": 24, "vocab_size": 50}
    return SimpleNamespace(**values | {"layer_norm_epsilon": 1e-3, "tie_word_embeddings": True} | changes)


def test_configs_are_read():
    sizes = {"layers": 3, "hidden": 32, "heads": 4, "context": 24, "vocabulary": 50}
    llama = ModelConfig("llama", groups=2, ffn=80, tied=False, epsilon=1e-6, rotary_base=5e5, **sizes)
    assert read_config(llama_config()) == llama
    newer = llama_config(rope_parameters={"rope_type": "default", "rope_theta": 5e5}, rope_theta=None)
    assert read_config(newer) == llama
    assert read_config(gpt2_config(), dropout=0.1) == ModelConfig("gpt", tied=True, epsilon=1e-3, dropout=0.1, **sizes)


@pytest.mark.parametrize(
    ("came", "words"),
    [
        (llama_config(model_type="mistral"), "model_type='mistral' is not implemented; there are 'llama' and 'gpt2'"),
        (llama_config(hidden_act="gelu"), "hidden_act='gelu' of a Hugging Face llama is not implemented; it takes 'silu'"),
        (llama_config(attention_bias=True), "attention_bias=True"),
        (llama_config(mlp_bias=True), "mlp_bias=True"),
        (llama_config(head_dim=16), "head_dim=16 .* it takes 8"),
        (llama_config(rope_scaling={"type": "linear", "factor": 2.0}), "'type': 'linear'.*are scaled"),
        (llama_config(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5}), "'rope_type': 'llama3'.*are scaled"),
        (gpt2_config(activation_function="gelu"), "activation_function='gelu' .* it takes 'gelu_new' or 'gelu_pytorch_tanh'"),
        (gpt2_config(scale_attn_weights=False), "scale_attn_weights=False"),
        (gpt2_config(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
        (gpt2_config(add_cross_attention=True), "add_cross_attention=True"),
    ],
)
def test_what_there_is_no_equal_of_is_refused(came, words):
    with pytest.raises(NotImplementedError, match=words):
        read_config(came)


def their_model(kind, device, dtype=torch.float32, **changes):
    """A model of transformers whose every parameter is random and matters: no norm is one, no bias zero, no attention flat."""
    transformers = pytest.importorskip("transformers", minversion="4.56")
    if kind == "llama":
        sizes = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 48, "rope_theta": 1000.0}
        made = transformers.LlamaConfig(**sizes | {"vocab_size": 100} | changes)
    else:
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 48, "layer_norm_epsilon": 1e-3, "n_inner": 112}
        made = transformers.GPT2Config(**sizes | {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2} | changes)
    model = transformers.AutoModelForCausalLM.from_config(made, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            else:
                parameter.normal_(0, 0.15)
    return model.to(device).eval()


def tokens(device):
    return torch.randint(100, (2, 40)).to(device)


CASES = {
    "llama": ("llama", {}),
    "llama, every head with its own keys": ("llama", {"num_key_value_heads": 4}),
    "llama, one head of keys": ("llama", {"num_key_value_heads": 1}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, large epsilon": ("llama", {"rms_norm_eps": 1e-2}),
    "gpt2": ("gpt2", {}),
    "gpt2, untied": ("gpt2", {"tie_word_embeddings": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_theirs_both_ways(device, case):
    kind, changes = CASES[case]
    theirs, x = their_model(kind, device, **changes), tokens(device)
    ours = build(read_config(theirs.config), device, torch.float32).eval()
    with torch.no_grad():
        load_weights(ours, theirs.state_dict())
        expected = theirs(x).logits
        torch.testing.assert_close(ours(x), expected, atol=1e-4 * expected.std().item(), rtol=1e-4)
        back = their_model(kind, device, **changes)
        assert relative_error(back(x).logits, expected) > 0.5, "other weights, other logits"
        back.load_state_dict(weights_of(ours))
        assert_same_bits(back(x).logits, expected)
    assert_same_state(weights_of(ours), dict(theirs.state_dict()))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_bf16_is_as_near_to_float32_as_theirs(device, kind):
    theirs, x = their_model(kind, device, torch.bfloat16), tokens(device)
    ours = build(read_config(theirs.config), device).eval()
    exact = their_model(kind, device)
    exact.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        load_weights(ours, theirs.state_dict())
        expected = exact(x).logits
        assert relative_error(ours(x), expected) < 1.5 * relative_error(theirs(x).logits, expected) < 0.05


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fp8_is_near(device, kind):
    theirs, x = their_model(kind, device), tokens(device)
    ours = build(read_config(theirs.config), device).eval()
    load_weights(ours, theirs.state_dict())
    for _ in range(2):  # the second step has scales of the first
        with te.autocast(recipe=DelayedScaling()):
            logits = ours(x)
    with torch.no_grad():
        assert 0.01 < relative_error(logits, theirs(x).logits) < 0.3, "0.1 to 0.2; what is mapped wrongly gives over 0.6"


def test_the_example_runs(capsys):
    pytest.importorskip("transformers", minversion="4.56")
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    for line in lines:
        error = float(line.split()[-1])
        assert error < (1e-4 if "float32" in line else 0.02 if "bfloat16" in line else 0.2), line


@pytest.mark.parametrize(
    ("changes", "argument", "words"),
    [
        ({"vocabulary": 0}, "vocabulary", "0 came; it takes a whole number of at least 1"),
        ({"epsilon": 0.0}, "epsilon", "0.0 came; it takes a number above 0"),
        ({"rotary_base": float("nan")}, "rotary_base", "nan came; it takes a number above 0"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, argument, words):
    with pytest.raises(ArgumentError, match=words) as caught:
        config("llama", **changes)
    assert caught.value.argument == argument
