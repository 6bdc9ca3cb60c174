"""RotaryPositionEmbedding and apply_rotary_pos_emb against complex numbers, layers with them against plain PyTorch in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import overdrive.pytorch as te
from overdrive.functional.rotary import rotate
from overdrive.modules.qk_norm import L2Normalization
from tests.modules import attention_oracle as oracle
from tests.modules.test_bad_input import refuses
from tests.numerics import RECIPES, assert_close, assert_same_bits, relative_error
from tests.rotary_oracle import frequencies, place_table, turned

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# --- angles -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
def test_angles(interleaved, device):
    angles = te.RotaryPositionEmbedding(12, interleaved=interleaved, rotary_base=500)(7)
    assert angles.device.type == device
    assert_close(angles, frequencies(7, 12, 500, interleaved).double(), torch.float32)


def test_part_of_the_channels(device):
    assert torch.equal(te.RotaryPositionEmbedding(64, 0.25)(5), te.RotaryPositionEmbedding(16)(5))


def test_offset(device):
    embedding = te.RotaryPositionEmbedding(8)
    assert torch.equal(embedding(5, offset=3), embedding(8)[3:])


def test_interpolation(device):
    plain = te.RotaryPositionEmbedding(8)
    stretched = te.RotaryPositionEmbedding(8, seq_len_interpolation_factor=2, pretrained_max_position_embeddings=10)
    for length, divisor in ((5, 2), (20, 2), (21, 2.1), (40, 4)):  # beyond 2 * 10 the length decides
        assert_close(stretched(length, 1), plain(length, 1).cpu().double() / divisor, torch.float32)


def test_angles_stay_f32(device):
    embedding, expected = te.RotaryPositionEmbedding(8), te.RotaryPositionEmbedding(8)(9)
    assert_same_bits(embedding.to(torch.bfloat16)(9), expected)
    assert_same_bits(copy.deepcopy(embedding).half()(9), expected)
    with torch.autocast(device, torch.bfloat16):
        assert_same_bits(embedding(9), expected)
    assert_same_bits(embedding.to("meta").to_empty(device=device)(9), expected)


def test_checkpoints_with_and_without_inv_freq(device):
    state = {"inv_freq": torch.arange(4.0)}
    embedding = te.RotaryPositionEmbedding(8)
    embedding.load_state_dict({})
    assert_same_bits(embedding.inv_freq, te.RotaryPositionEmbedding(8).inv_freq)
    embedding.load_state_dict(state)
    assert_same_bits(embedding.cpu().inv_freq, state["inv_freq"])


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ({"dim": 0}, ValueError, ("dim", "at least 1", 0)),
        ({"dim": 7}, ValueError, ("dim=7", "even")),
        ({"dim": 10, "rotary_percent": 0.5}, ValueError, ("rotary_percent=0.5", 5, "even")),
        ({"dim": 10, "rotary_percent": 0.01}, ValueError, ("rotary_percent=0.01", "above 0")),
        ({"rotary_percent": 1.5}, ValueError, ("rotary_percent", "at most 1", 1.5)),
        ({"rotary_percent": 0}, ValueError, ("rotary_percent", "above 0", 0)),
        ({"rotary_base": -1.0}, ValueError, ("rotary_base", "above 0", -1.0)),
        ({"seq_len_interpolation_factor": 2}, ValueError, ("pretrained_max_position_embeddings=None", "give both")),
        ({"pretrained_max_position_embeddings": 2}, ValueError, ("seq_len_interpolation_factor=None", "give both")),
        (
            {"pretrained_max_position_embeddings": 8, "seq_len_interpolation_factor": 0},
            ValueError,
            ("seq_len_interpolation_factor", "above 0"),
        ),
        (
            {"pretrained_max_position_embeddings": 8.5, "seq_len_interpolation_factor": 2},
            TypeError,
            ("pretrained_max_position_embeddings", "int", 8.5),
        ),
    ],
)
def test_bad_angles(arguments, error, parts):
    with refuses(error, "RotaryPositionEmbedding", *parts):
        te.RotaryPositionEmbedding(**{"dim": 8, **arguments})


def test_bad_lengths():
    with refuses(ValueError, "max_seq_len", "at least 1", 0):
        te.RotaryPositionEmbedding(8)(0)
    with refuses(TypeError, "max_seq_len", "int", 2.0):
        te.RotaryPositionEmbedding(8)(2.0)


# --- apply_rotary_pos_emb -----------------------------------------------------------------------------------------------

SHAPES = {"sbhd": (7, 3, 4, 10), "bshd": (3, 7, 4, 10), "thd": (23, 4, 10)}
BOUNDS = [0, 5, 5, 20]  # of 23 tokens


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", SHAPES)
def test_forward_and_backward(layout, dtype, interleaved, started, device):
    t = torch.randn(SHAPES[layout]).to(device, dtype).requires_grad_()
    dout = torch.randn(t.shape).to(dtype)
    starts = torch.tensor([4, 0, 2]) if started else None
    bounds = BOUNDS if layout == "thd" else None
    freqs = frequencies(19, 6, interleaved=interleaved)
    out = te.apply_rotary_pos_emb(
        t,
        freqs.to(device),
        layout,
        None if starts is None else starts.to(device),
        interleaved,
        cu_seqlens=None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=device),
    )
    out.backward(dout.to(device))

    t64 = t.detach().cpu().double().requires_grad_()
    x64 = t64[:, None] if layout == "thd" else t64
    places = place_table(*x64.shape[:2], layout == "bshd", None if starts is None else starts.tolist(), bounds)
    want = turned(x64, freqs, places, interleaved).view(t.shape)
    want.backward(dout.double())
    assert out.dtype == dtype
    assert_close(out, want.detach(), dtype)
    assert_close(t.grad, t64.grad, dtype, what="dt")


def test_fused_says_nothing(device):
    t, freqs = torch.randn(5, 2, 3, 8, device=device), frequencies(5, 8).to(device)
    assert torch.equal(te.apply_rotary_pos_emb(t, freqs, fused=True), te.apply_rotary_pos_emb(t, freqs))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_gradcheck(batch_first, interleaved):
    query, key = (torch.randn(3, 3, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2))
    freqs, starts = torch.randn(9, 1, 1, 6), torch.tensor([1, 0, 6])
    torch.autograd.gradcheck(lambda q, k: rotate(q, k, freqs, interleaved, batch_first, starts), (query, key))


def test_query_and_key_are_one_node(device):
    query, key = (torch.randn(3, 2, heads, 8, device=device, requires_grad=True) for heads in (4, 2))
    freqs = frequencies(3, 8).to(device)
    out_q, out_k = rotate(query, key, freqs)
    assert out_q.grad_fn is out_k.grad_fn
    out_q.sum().backward()
    assert not key.grad.any()
    assert_close(query.grad, turned(torch.ones(3, 2, 4, 8), freqs.cpu(), place_table(3, 2, False), False, True), torch.float32)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("layout", SHAPES)
def test_compiles_to_one_graph(layout, device):
    def call(t, starts, bounds):
        return te.apply_rotary_pos_emb(t, embedding(20), layout, starts, cu_seqlens=bounds)

    embedding = te.RotaryPositionEmbedding(8)
    t = torch.randn(SHAPES[layout], device=device, requires_grad=True)
    starts = torch.tensor([1, 0, 2], device=device)
    bounds = torch.tensor(BOUNDS, dtype=torch.int32, device=device) if layout == "thd" else None
    torch.compiler.reset()
    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        t.grad = None
        out = function(t, starts, bounds)
        out.square().sum().backward()
        results.append((out.detach(), t.grad))
    assert_same_bits(results[1][0], results[0][0])
    assert_same_bits(results[1][1], results[0][1])


T, FREQS = torch.zeros(7, 3, 4, 10), torch.zeros(9, 1, 1, 6)
PACKED, I32 = {"t": T[:, 0], "tensor_format": "thd"}, {"dtype": torch.int32}


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ({"t": None}, TypeError, ("t must be a tensor", "NoneType")),
        ({"t": T[0]}, ValueError, ("t must be [s, b, h, d]", "'sbhd'", [3, 4, 10])),
        ({"t": T.long()}, TypeError, ("t, turned by freqs", "torch.bfloat16", "torch.int64")),
        ({"t": T.double()}, TypeError, ("t, turned by freqs", "torch.float64")),
        ({"t": T.to("meta")}, ValueError, ("freqs is on cpu", "t on meta", ".to()")),
        ({"tensor_format": "bhsd"}, ValueError, ("tensor_format", "'sbhd', 'bshd', 'thd'", "'bhsd'")),
        ({"freqs": None}, TypeError, ("freqs", "torch.float32", "NoneType")),
        ({"freqs": FREQS.bfloat16()}, TypeError, ("freqs", "torch.float32", "torch.bfloat16")),
        ({"freqs": FREQS[:6]}, ValueError, ("freqs has 6 positions", "sequence 7", "max_seq_len >= 7")),
        ({"freqs": FREQS.flatten(1)}, ValueError, ("freqs", "[positions, 1, 1, features]", [9, 6])),
        ({"freqs": FREQS[..., :5]}, ValueError, ("freqs turns 5", "10 features", "even")),
        ({"freqs": FREQS[..., :0]}, ValueError, ("freqs turns 0", "above 0")),
        ({"freqs": torch.zeros(9, 1, 1, 12)}, ValueError, ("freqs turns 12", "10 features", "no more")),
        ({"freqs": FREQS.clone().requires_grad_()}, NotImplementedError, ("freqs requires grad", "detach()")),
        ({"cp_size": 2}, NotImplementedError, ("cp_size=2",)),
        ({"cp_rank": 1}, NotImplementedError, ("cp_rank=1",)),
        (PACKED, ValueError, ("cu_seqlens", "missing", "'thd'")),
        ({"cu_seqlens": torch.tensor([0, 7], **I32)}, ValueError, ("cu_seqlens", "given", "'sbhd'")),
        ({**PACKED, "cu_seqlens": [0, 7]}, TypeError, ("cu_seqlens", "torch.int32", "list")),
        ({**PACKED, "cu_seqlens": torch.tensor([0, 7])}, TypeError, ("cu_seqlens", "torch.int32", "torch.int64")),
        ({**PACKED, "cu_seqlens": torch.zeros(2, 2, **I32)}, ValueError, ("cu_seqlens", "[sequences + 1]", [2, 2])),
        ({**PACKED, "cu_seqlens": torch.zeros(0, **I32)}, ValueError, ("cu_seqlens", "[sequences + 1]", [0])),
        ({**PACKED, "cu_seqlens": torch.zeros(2, device="meta", **I32)}, ValueError, ("cu_seqlens is on meta", "t on cpu")),
        ({**PACKED, "cu_seqlens": torch.tensor([0, 5, 4, 7], **I32)}, ValueError, ("cu_seqlens", "ascend", [0, 5, 4, 7])),
        ({**PACKED, "cu_seqlens": torch.tensor([1, 7], **I32)}, ValueError, ("cu_seqlens", "from 0", [1, 7])),
        ({**PACKED, "cu_seqlens": torch.tensor([0, 8], **I32)}, ValueError, ("cu_seqlens", "7 tokens", [0, 8])),
        (
            {**PACKED, "cu_seqlens": torch.tensor([0, 1, 7], **I32), "freqs": FREQS[:5]},
            ValueError,
            ("cu_seqlens", "0 to 5 in sequence 1", "freqs has 5"),
        ),
        ({"start_positions": torch.zeros(3)}, TypeError, ("start_positions", "torch.int32 or torch.int64", "torch.float32")),
        ({"start_positions": 0}, TypeError, ("start_positions", "int")),
        ({"start_positions": torch.zeros(2, **I32)}, ValueError, ("start_positions", "3 sequences", 2)),
        ({"start_positions": torch.zeros((), **I32)}, ValueError, ("start_positions", "[sequences]", [])),
        ({"start_positions": torch.zeros(3, device="meta", **I32)}, ValueError, ("start_positions is on meta", "t on cpu")),
        ({"start_positions": torch.tensor([2, 0, 3])}, ValueError, ("start_positions", "3 to 9 in sequence 2", "freqs has 9")),
        ({"start_positions": torch.tensor([2, -1, 0])}, ValueError, ("start_positions", "-1 to 5 in sequence 1")),
    ],
)
def test_bad_arguments(arguments, error, parts):
    with refuses(error, "apply_rotary_pos_emb", *parts):
        te.apply_rotary_pos_emb(**{"t": T, "freqs": FREQS, **arguments})


# --- norms of Q and K -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_l2_normalization(dtype, device):
    x = torch.randn(5, 3, 12).to(device, dtype).requires_grad_()
    dout = torch.randn(x.shape).to(dtype)
    out = L2Normalization(1e-3)(x)
    out.backward(dout.to(device))
    x64 = x.detach().cpu().double().requires_grad_()
    want = x64 / (x64.square().sum(-1, keepdim=True) + 1e-3).sqrt()
    want.backward(dout.double())
    assert_close(out, want.detach(), dtype)
    assert_close(x.grad, x64.grad, dtype, what="dx", depth=2)


HEADS, GROUPS, DIM, HIDDEN, FFN = 4, 2, 10, 36, 48


def build(device, dtype=torch.float32, **arguments):
    """A Llama layer, every parameter random."""
    llama = {"normalization": "RMSNorm", "activation": "swiglu", "bias": False, "num_gqa_groups": GROUPS, "kv_channels": DIM}
    layer = te.TransformerLayer(
        HIDDEN, FFN, HEADS, hidden_dropout=0, attention_dropout=0, params_dtype=dtype, device=device, **{**llama, **arguments}
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return layer


def head_norm(kind, x, p, name):
    """The norm of x [.., D], alone."""
    if kind is None:
        return x
    if kind == "L2Normalization":
        return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    return oracle.norm(x, p[f"self_attention.{name}.weight"], p.get(f"self_attention.{name}.bias"), 1e-6)


def llama(x, p, freqs, layout="sbhd", interleaved=False, kind=None, norm_first=False, fused=False):
    """A Llama block with p, a layer's parameters in float64; freqs: the angles for Q and for K."""
    p = {name.replace("layernorm_qkv.", "").replace("layernorm_mlp.", "mlp."): value for name, value in p.items()}
    normed = oracle.norm(x, p["self_attention.layer_norm_weight"], None)
    y = oracle.linear(normed, p, "self_attention.")
    q, k, v = oracle.qkv(y, HEADS, GROUPS, DIM, fused)
    places = place_table(*x.shape[:2], layout == "bshd")
    turn = [lambda t, angles=angles: turned(t, angles, places, interleaved) for angles in freqs]
    norm = [lambda t, name=name: head_norm(kind, t, p, name) for name in ("q_norm", "k_norm")]
    for step in (norm, turn) if norm_first else (turn, norm):
        q, k = step[0](q), step[1](k)
    q, k, v = (oracle.heads_first(t, layout) for t in (q, k, v))
    out = oracle.attend(q, k, v, oracle.hidden_by("causal", None, q.shape[2], q.shape[2]))
    x = x + oracle.heads_last(out, layout) @ p["self_attention.proj.weight"].t()
    normed = oracle.norm(x, p["mlp.layer_norm_weight"], None)
    return x + oracle.ACTIVATIONS["swiglu"](oracle.linear(normed, p, "mlp.fc1_")) @ p["mlp.fc2_weight"].t()


def check(layer, x, freqs, dtype, **block):
    """Outputs and gradients of the layer are the block's. freqs: what is given to the layer, one tensor or a pair."""
    dout = torch.randn(x.shape).to(dtype)
    x = x.detach().requires_grad_()
    out = layer(x, rotary_pos_emb=freqs)
    out.backward(dout.to(x.device))
    p = {name: parameter.detach().cpu().double().requires_grad_() for name, parameter in layer.named_parameters()}
    x64 = x.detach().cpu().double().requires_grad_()
    pair = [angles.cpu() for angles in (freqs if isinstance(freqs, tuple) else (freqs, freqs))]
    want = llama(x64, p, pair, **block)
    want.backward(dout.double())
    assert_close(out, want.detach(), dtype, what="out", depth=8)
    assert_close(x.grad, x64.grad, dtype, what="dx", depth=16)
    for name, parameter in layer.named_parameters():
        if (
            name.endswith("k_norm.bias") and not block["norm_first"]
        ):  # added to all keys it changes nothing: its gradient is rounding
            assert parameter.grad.norm() < 1e-4
            continue
        assert_close(parameter.grad, p[name].grad, dtype, what=name, depth=16)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["sbhd", "bshd"])
@pytest.mark.parametrize("fused", [False, True])
def test_llama_layer(fused, layout, dtype, interleaved, device):
    layer = build(device, dtype, attn_input_format=layout, fuse_qkv_params=fused, rotary_pos_interleaved=interleaved)
    freqs = frequencies(11, DIM, interleaved=interleaved).to(device)
    x = torch.randn((9, 3, HIDDEN) if layout == "sbhd" else (3, 9, HIDDEN)).to(device, dtype)
    check(layer, x, freqs, dtype, layout=layout, interleaved=interleaved, fused=fused)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm", "L2Normalization"])
@pytest.mark.parametrize("layout", ["sbhd", "bshd"])
def test_norms_of_query_and_key(layout, kind, norm_first, device):
    layer = build(device, qk_norm_type=kind, qk_norm_before_rope=norm_first, attn_input_format=layout)
    x = torch.randn((9, 3, HIDDEN) if layout == "sbhd" else (3, 9, HIDDEN)).to(device)
    check(layer, x, frequencies(9, 6).to(device), torch.float32, layout=layout, kind=kind, norm_first=norm_first)


def test_angles_of_query_and_key_may_differ(device):
    x, freqs = torch.randn(9, 3, HIDDEN, device=device), tuple(frequencies(9, size).to(device) for size in (6, 10))
    check(build(device), x, freqs, torch.float32)
    layer = build(device)
    assert torch.equal(layer(x, rotary_pos_emb=(freqs[0], freqs[0])), layer(x, rotary_pos_emb=freqs[0]))


@pytest.mark.parametrize("recipe", ["delayed", "current", "block"])
def test_under_fp8(recipe, device):
    drops = {"hidden_dropout": 0, "attention_dropout": 0}
    layer = te.TransformerLayer(64, 128, 4, qk_norm_type="RMSNorm", params_dtype=torch.bfloat16, device=device, **drops)
    x, freqs = torch.randn(16, 2, 64).to(device, torch.bfloat16), frequencies(16, 16).to(device)
    want = layer(x, rotary_pos_emb=freqs)
    for _ in range(2):  # delayed scaling knows the amaxes from the first on
        with te.autocast(recipe=RECIPES[recipe]):
            out = layer(x, rotary_pos_emb=freqs)
        out.float().square().sum().backward()
    assert 1e-4 < relative_error(out, want) < 0.15


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("norm_first", [False, True])
def test_a_layer_compiles_to_one_graph(norm_first, device):
    layer = build(device, qk_norm_type="RMSNorm", qk_norm_before_rope=norm_first)
    x, freqs = torch.randn(9, 3, HIDDEN, device=device), frequencies(9, DIM).to(device)
    torch.compiler.reset()
    results = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        out = call(x, rotary_pos_emb=freqs)
        out.square().sum().backward()
        results.append([out.detach(), *(parameter.grad for parameter in layer.parameters())])
    for actual, expected in zip(*results):
        assert relative_error(actual, expected) < 2e-6


def test_state_dict_names():
    def extra(kind):
        return sorted(set(build("cpu", qk_norm_type=kind).state_dict()) - set(build("cpu").state_dict()))

    assert extra("L2Normalization") == []
    assert extra("RMSNorm") == [f"self_attention.{norm}.weight" for norm in ("k_norm", "q_norm")]
    assert extra("LayerNorm") == [f"self_attention.{norm}.{part}" for norm in ("k_norm", "q_norm") for part in ("bias", "weight")]


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ({"qk_norm_type": "BatchNorm"}, ValueError, ("qk_norm_type", "'L2Normalization', 'RMSNorm', 'LayerNorm'", "'BatchNorm'")),
        ({"qk_norm_type": "RMSNorm", "qk_norm_eps": 0.0}, ValueError, ("qk_norm_eps", "> 0", 0.0)),
    ],
)
def test_bad_norms(arguments, error, parts):
    with refuses(error, "MultiheadAttention", *parts):
        te.MultiheadAttention(32, 4, device="cpu", **arguments)


@pytest.mark.parametrize(
    ("freqs", "error", "parts"),
    [
        (FREQS[:4], ValueError, ("rotary_pos_emb has 4 positions", "sequence 5", "max_seq_len >= 5")),
        (FREQS.half(), TypeError, ("rotary_pos_emb", "torch.float32", "torch.float16")),
        (torch.zeros(5, 1, 1, 10), ValueError, ("rotary_pos_emb turns 10", "8 features")),
        (FREQS.to("meta"), ValueError, ("rotary_pos_emb is on meta", "hidden_states on cpu")),
        ((FREQS, FREQS, FREQS), ValueError, ("rotary_pos_emb", "two, for Q and for K", 3)),
        ((FREQS, FREQS[:4]), ValueError, ("rotary_pos_emb has 4 positions",)),
        (nn.Identity(), TypeError, ("rotary_pos_emb", "Identity")),
    ],
)
@pytest.mark.parametrize("layout", ["sbhd", "bshd"])
def test_bad_angles_for_a_layer(layout, freqs, error, parts):
    module = te.MultiheadAttention(32, 4, device="cpu", qkv_format=layout)
    with refuses(error, "MultiheadAttention", *parts):
        module(torch.zeros((5, 2, 32) if layout == "sbhd" else (2, 5, 32)), rotary_pos_emb=freqs)
