"""Blocks of GPT-2, Llama, T5, GPT-J and Falcon as a user writes them, against the models' own formulas in plain PyTorch, float64.

The formulas know nothing of overdrive but the names of its parameters. Shapes: B sequences of S tokens, H heads of D channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

import overdrive.pytorch as te
from tests.numerics import RECIPES, assert_close, relative_error

pytestmark = [  # torch's own tracer does what torch warns of
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
]

HIDDEN, FFN, HEADS, GROUPS, DIM, TURNED = 64, 128, 4, 2, 16, 8
BATCH, SOURCE, TARGET = 2, 24, 16

Parameters = dict[str, torch.Tensor]


class Model(NamedTuple):
    """build(**options) -> the model; formula(parameters, *inputs) -> what it has to return; inputs: shapes of the latter."""

    build: Callable[..., torch.nn.Module]
    formula: Callable[..., torch.Tensor]
    inputs: tuple[tuple[int, ...], ...] = ((BATCH, TARGET, HIDDEN),)


# --- what the formulas share --------------------------------------------------------------------------------------------


def heads(x, dim=DIM):
    """[B, S, H * D] -> [B, H, S, D]."""
    return x.unflatten(-1, (-1, dim)).transpose(1, 2)


def softmax_attention(q, k, v, visible=None):
    """Q [B, H, S, D], K and V [B, G, T, D] -> [B, S, H * D]; visible: True where a query may look."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def causal(length):
    return torch.ones(length, length, dtype=torch.bool).tril()


def rms_norm(x, gain, eps):
    return gain * x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()


def rope(x, width, interleaved):
    """The first `width` channels of x [B, H, S, D] as complex numbers, multiplied by e^(i position 10000^(-2 pair / width))."""
    turning, rest = x[..., :width], x[..., width:]
    real, imaginary = (turning[..., ::2], turning[..., 1::2]) if interleaved else turning.tensor_split(2, -1)
    frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * frequency
    z = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
    turned = torch.stack((z.real, z.imag), -1).flatten(-2) if interleaved else torch.cat((z.real, z.imag), -1)
    return torch.cat((turned, rest), -1)


def gelu(x):
    return F.gelu(x, approximate="tanh")


class Turned(torch.nn.Module):
    """A block that is told the angles of its positions."""

    def __init__(self, layer, rotary):
        super().__init__()
        self.layer, self.rotary = layer, rotary

    def forward(self, x):
        return self.layer(x, rotary_pos_emb=self.rotary(x.shape[1]))


def turned_layer(percent=1.0, interleaved=False, device=None, **arguments):
    layer = te.TransformerLayer(HIDDEN, FFN, HEADS, rotary_pos_interleaved=interleaved, device=device, **arguments)
    return Turned(layer, te.RotaryPositionEmbedding(DIM, percent, interleaved=interleaved).to(device))


# --- GPT-2 --------------------------------------------------------------------------------------------------------------


def gpt2(**options):
    return te.TransformerLayer(HIDDEN, 4 * HIDDEN, HEADS, fuse_qkv_params=True, qkv_weight_interleaved=False, **options)


def gpt2_formula(p, x):
    attention, mlp = "self_attention.layernorm_qkv.", "layernorm_mlp."
    y = F.layer_norm(x, (HIDDEN,), p[attention + "layer_norm_weight"], p[attention + "layer_norm_bias"])
    q, k, v = F.linear(y, p[attention + "weight"], p[attention + "bias"]).split(HIDDEN, -1)
    y = softmax_attention(heads(q), heads(k), heads(v), causal(x.shape[1]))
    x = x + F.linear(y, p["self_attention.proj.weight"], p["self_attention.proj.bias"])
    y = F.layer_norm(x, (HIDDEN,), p[mlp + "layer_norm_weight"], p[mlp + "layer_norm_bias"])
    y = gelu(F.linear(y, p[mlp + "fc1_weight"], p[mlp + "fc1_bias"]))
    return x + F.linear(y, p[mlp + "fc2_weight"], p[mlp + "fc2_bias"])


# --- Llama --------------------------------------------------------------------------------------------------------------


def llama(**options):
    block = {"num_gqa_groups": GROUPS, "bias": False, "normalization": "RMSNorm", "activation": "swiglu"}
    return turned_layer(layernorm_epsilon=1e-6, **block, **options)


def llama_formula(p, x):
    attention, mlp = "layer.self_attention.layernorm_qkv.", "layer.layernorm_mlp."
    y = rms_norm(x, p[attention + "layer_norm_weight"], 1e-6)
    q, k, v = (heads(y @ p[f"{attention}{name}_weight"].T) for name in ("query", "key", "value"))
    y = softmax_attention(rope(q, DIM, False), rope(k, DIM, False), v, causal(x.shape[1]))
    x = x + y @ p["layer.self_attention.proj.weight"].T
    y = rms_norm(x, p[mlp + "layer_norm_weight"], 1e-6)
    gate, up = p[mlp + "fc1_weight"].split(FFN)
    return x + (F.silu(y @ gate.T) * (y @ up.T)) @ p[mlp + "fc2_weight"].T


# --- GPT-J: attention and MLP side by side, biases, a part of each head turned, neighbours together ------------------------


def gptj(**options):
    return turned_layer(
        TURNED / DIM, True, parallel_attention_mlp=True, fuse_qkv_params=True, qkv_weight_interleaved=False, **options
    )


def gptj_formula(p, x):
    attention, mlp = "layer.self_attention.layernorm_qkv.", "layer.layernorm_mlp."
    y = F.layer_norm(x, (HIDDEN,), p[attention + "layer_norm_weight"], p[attention + "layer_norm_bias"])
    q, k, v = F.linear(y, p[attention + "weight"], p[attention + "bias"]).split(HIDDEN, -1)
    y = softmax_attention(rope(heads(q), TURNED, True), rope(heads(k), TURNED, True), heads(v), causal(x.shape[1]))
    attended = F.linear(y, p["layer.self_attention.proj.weight"], p["layer.self_attention.proj.bias"])
    y = F.layer_norm(x, (HIDDEN,), p[mlp + "layer_norm_weight"], p[mlp + "layer_norm_bias"])
    y = gelu(F.linear(y, p[mlp + "fc1_weight"], p[mlp + "fc1_bias"]))
    return x + attended + F.linear(y, p[mlp + "fc2_weight"], p[mlp + "fc2_bias"])


# --- Falcon: side by side, two norms, grouped queries whose weights lie group by group, no biases ---------------------------


def falcon(**options):
    return turned_layer(parallel_attention_mlp=True, num_gqa_groups=GROUPS, fuse_qkv_params=True, bias=False, **options)


def falcon_formula(p, x):
    attention, mlp = "layer.self_attention.layernorm_qkv.", "layer.layernorm_mlp."
    y = F.layer_norm(x, (HIDDEN,), p[attention + "layer_norm_weight"], p[attention + "layer_norm_bias"])
    by_group = p[attention + "weight"].view(GROUPS, HEADS // GROUPS + 2, DIM, HIDDEN)
    q, k, v = (rows.flatten(0, -2) for rows in (by_group[:, :-2], by_group[:, -2], by_group[:, -1]))
    q, k, v = (heads(y @ rows.T) for rows in (q, k, v))
    attended = softmax_attention(rope(q, DIM, False), rope(k, DIM, False), v, causal(x.shape[1]))
    y = F.layer_norm(x, (HIDDEN,), p[mlp + "layer_norm_weight"], p[mlp + "layer_norm_bias"])
    return x + attended @ p["layer.self_attention.proj.weight"].T + gelu(y @ p[mlp + "fc1_weight"].T) @ p[mlp + "fc2_weight"].T


# --- T5: an encoder and a decoder, of padded sequences; no biases, gated GELU, heads wider than hidden / heads ----------------

LENGTHS = {SOURCE: (24, 17), TARGET: (11, 16)}
T5_DIM = 32


def padding(length):
    """[B, 1, 1, length], True behind the end of a sequence."""
    return (torch.arange(length) >= torch.tensor(LENGTHS[length])[:, None])[:, None, None]


class T5(torch.nn.Module):
    def __init__(self, device=None, **options):
        super().__init__()
        block = {"bias": False, "normalization": "RMSNorm", "activation": "geglu", "kv_channels": T5_DIM, "layernorm_epsilon": 1e-6}
        sizes, options = (HIDDEN, FFN, HEADS), {**block, **options, "device": device}
        self.encoder = te.TransformerLayer(*sizes, self_attn_mask_type="padding", **options)
        masks = {"self_attn_mask_type": "padding_causal", "enc_dec_attn_mask_type": "padding"}
        self.decoder = te.TransformerLayer(*sizes, layer_type="decoder", **masks, **options)

    def forward(self, source, target):
        source_mask, target_mask = (padding(length).to(source.device) for length in (SOURCE, TARGET))
        memory = self.encoder(source, source_mask)
        return self.decoder(target, target_mask, encoder_output=memory, enc_dec_attn_mask=(target_mask, source_mask))


def t5_attention(p, x, memory, queries, keys, visible, padded):
    """x + attention; memory None: of x itself. A padded query attends to nothing."""
    y = rms_norm(x, p[queries + "layer_norm_weight"], 1e-6)
    memory = y if memory is None else memory
    q, k, v = y @ p[queries + "query_weight"].T, memory @ p[keys + "key_weight"].T, memory @ p[keys + "value_weight"].T
    out = softmax_attention(heads(q, T5_DIM), heads(k, T5_DIM), heads(v, T5_DIM), visible)
    return x + out.masked_fill(padded[:, 0].mT, 0.0) @ p[queries.rsplit(".", 2)[0] + ".proj.weight"].T


def t5_mlp(p, x, name):
    y = rms_norm(x, p[name + "layer_norm_weight"], 1e-6)
    gate, up = p[name + "fc1_weight"].split(FFN)
    return x + (gelu(y @ gate.T) * (y @ up.T)) @ p[name + "fc2_weight"].T


def t5_formula(p, source, target):
    source_pad, target_pad = padding(SOURCE), padding(TARGET)
    own = "encoder.self_attention.layernorm_qkv."
    memory = t5_mlp(p, t5_attention(p, source, None, own, own, ~source_pad, source_pad), "encoder.layernorm_mlp.")
    own = "decoder.self_attention.layernorm_qkv."
    x = t5_attention(p, target, None, own, own, ~target_pad & causal(TARGET), target_pad)
    names = ("decoder.inter_attention.layernorm_query.", "decoder.inter_attention.key_value.")
    x = t5_attention(p, x, memory, *names, ~source_pad, target_pad)
    return t5_mlp(p, x, "decoder.layernorm_mlp.")


MODELS = {
    "gpt2": Model(gpt2, gpt2_formula),
    "llama": Model(llama, llama_formula),
    "gptj": Model(gptj, gptj_formula),
    "falcon": Model(falcon, falcon_formula),
    "t5": Model(T5, t5_formula, ((BATCH, SOURCE, HIDDEN), (BATCH, TARGET, HIDDEN))),
}
LAYERS = {"t5": 2}
OPTIONS: dict[str, Any] = {"attn_input_format": "bshd", "hidden_dropout": 0.0, "attention_dropout": 0.0}


def build(name, device, dtype):
    """The model with no parameter trivial, inputs that require grad, and a gradient of its output."""
    model = MODELS[name].build(params_dtype=dtype, device=device, **OPTIONS)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            gain = "norm_weight" in parameter_name
            parameter.normal_(float(gain), parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.2)
    inputs = [torch.randn(shape).to(device, dtype).requires_grad_() for shape in MODELS[name].inputs]
    return model, inputs, torch.randn(MODELS[name].inputs[-1]).to(device, dtype)


def step(model, inputs, dout):
    """{"out", "input 0", .., parameter names: values and gradients}."""
    model.zero_grad()
    for x in inputs:
        x.grad = None
    out = model(*inputs)
    out.backward(dout)
    gradients = {f"input {i}": x.grad for i, x in enumerate(inputs)}
    return {"out": out.detach(), **gradients, **{name: parameter.grad for name, parameter in model.named_parameters()}}


def expected(name, model, inputs, dout):
    """The same of the formula, in float64."""
    p = {key: parameter.detach().cpu().double().requires_grad_() for key, parameter in model.named_parameters()}
    inputs = [x.detach().cpu().double().requires_grad_() for x in inputs]
    out = MODELS[name].formula(p, *inputs)
    out.backward(dout.cpu().double())
    gradients = {f"input {i}": x.grad for i, x in enumerate(inputs)}
    return {"out": out.detach(), **gradients, **{key: value.grad for key, value in p.items()}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_forward_and_gradients_are_the_formulas(name, dtype, device):
    model, inputs, dout = build(name, device, dtype)
    actual, want = step(model, inputs, dout), expected(name, model, inputs, dout)
    depth = 6 * LAYERS.get(name, 1)
    for key, value in want.items():
        assert_close(actual[key], value, dtype, what=key, depth=depth if key == "out" else 2 * depth)


@pytest.mark.parametrize("name", MODELS)
def test_fp8_is_close(name, device):
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 GEMMs need compute capability 8.9")
    model, inputs, dout = build(name, device, torch.bfloat16)
    want, actual = expected(name, model, inputs, dout), {}
    for _ in range(2):  # delayed scaling knows the amaxes from the first on
        with te.autocast(recipe=RECIPES["delayed"]):
            actual = step(model, inputs, dout)
    assert all(value.isfinite().all() for value in actual.values())
    assert 1e-3 < relative_error(actual["out"], want["out"]) < 0.15
    for key in want:
        if "input" in key:
            assert relative_error(actual[key], want[key]) < 0.25, key


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_compiles_to_one_graph_with_the_same_numbers(name, device):
    model, inputs, dout = build(name, device, torch.float32)
    want = step(model, inputs, dout)
    torch.compiler.reset()
    actual = step(torch.compile(model, fullgraph=True, backend="aot_eager"), inputs, dout)
    for key, value in actual.items():
        assert relative_error(value, want[key.removeprefix("_orig_mod.")]) < 1e-5, key
