"""MultiheadAttention: values and gradients against float64, parameter layouts, returns, bad inputs."""

from __future__ import annotations

import pytest
import torch

import overdrive.pytorch as te
from overdrive.modules.multihead_attention import MultiheadAttention
from tests.modules import attention_oracle as oracle
from tests.numerics import RECIPES, TOLERANCES, assert_close, relative_error

HIDDEN, HEADS = 32, 4


def build(device, dtype=torch.float32, **arguments):
    """In training mode, without dropout, every parameter random."""
    module = MultiheadAttention(HIDDEN, HEADS, attention_dropout=0.0, params_dtype=dtype, device=device, **arguments)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return module


def doubles(module):
    return {name: p.detach().cpu().double().requires_grad_() for name, p in module.named_parameters()}


@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [
        ({"input_layernorm": True}, torch.float32),
        ({"input_layernorm": True, "fuse_qkv_params": True}, torch.bfloat16),
        ({"input_layernorm": True, "fuse_qkv_params": True, "qkv_weight_interleaved": False}, torch.float16),
        ({"num_gqa_groups": 2, "fuse_qkv_params": True}, torch.float32),
        ({"num_gqa_groups": 1, "fuse_qkv_params": True}, torch.float32),
        ({"num_gqa_groups": 2, "input_layernorm": True}, torch.float32),
        ({"num_gqa_groups": 1, "bias": False, "qkv_format": "bshd"}, torch.bfloat16),
        ({"kv_channels": 12, "attn_mask_type": "no_mask", "qkv_format": "bshd"}, torch.float32),
        ({"normalization": "RMSNorm", "input_layernorm": True, "attn_mask_type": "padding"}, torch.float32),
        ({"return_bias": True, "return_layernorm_output": True, "input_layernorm": True}, torch.float32),
    ],
)
def test_against_float64(arguments, dtype, device):
    module = build(device, dtype, **arguments)
    layout, mask_type = arguments.get("qkv_format", "sbhd"), arguments.get("attn_mask_type", "causal")
    x = torch.randn(7, 3, HIDDEN).to(device, dtype).requires_grad_()
    batch = x.shape[layout.index("b")]
    mask = (
        (torch.arange(x.shape[layout.index("s")]) >= torch.tensor([5, 7, 0])[:, None])[:, None, None]
        if mask_type == "padding"
        else None
    )
    out = module(x, None if mask is None else mask.to(device))
    dout = torch.randn(x.shape).to(dtype)

    p, x64 = doubles(module), x.detach().cpu().double().requires_grad_()
    interleaved = arguments.get("fuse_qkv_params", False) and arguments.get("qkv_weight_interleaved", True)
    shape = (HEADS, arguments.get("num_gqa_groups", HEADS), arguments.get("kv_channels", HIDDEN // HEADS))
    want, bias, normed = oracle.multihead(x64, p, *shape, layout, mask_type, mask, interleaved)
    assert batch == (3 if layout == "sbhd" else 7)
    if arguments.get("return_bias"):
        out, out_bias, norm_out = out
        assert torch.equal(out_bias, module.proj.bias)
        assert_close(norm_out, normed.detach(), dtype, what="norm output")
    else:
        want = want + bias
    assert_close(out, want.detach(), dtype, what="out", depth=4)
    out.backward(dout.to(device))
    want.backward(dout.double())
    assert_close(x.grad, x64.grad, dtype, what="dx", depth=8)
    for name, parameter in module.named_parameters():
        if "key_bias" in name:  # a constant added to all keys changes no probability: the gradient is zero but for rounding
            assert parameter.grad.double().norm() < 2e-2 * (1 if dtype != torch.float32 else 1e-2)
        elif parameter.grad is not None and p[name].grad is not None:
            assert_close(parameter.grad, p[name].grad, dtype, what=name, depth=8)


PADDING = tuple(
    (torch.arange(n) >= torch.tensor(lengths)[:, None])[:, None, None] for n, lengths in ((7, (5, 7, 2)), (5, (3, 1, 0)))
)


@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [
        ({}, torch.float32),
        ({"input_layernorm": True}, torch.bfloat16),
        ({"input_layernorm": True, "fuse_qkv_params": True, "attn_mask_type": "padding"}, torch.float32),
        ({"fuse_qkv_params": True, "qkv_weight_interleaved": False, "attn_mask_type": "causal"}, torch.float16),
        ({"fuse_qkv_params": True, "num_gqa_groups": 2, "attn_mask_type": "causal_bottom_right"}, torch.float32),
        ({"num_gqa_groups": 2, "bias": False, "qkv_format": "bshd", "attn_mask_type": "arbitrary"}, torch.float32),
        ({"fuse_qkv_params": True, "num_gqa_groups": 1, "qkv_format": "bshd", "attn_mask_type": "padding"}, torch.bfloat16),
        ({"kv_channels": 12, "normalization": "RMSNorm", "input_layernorm": True, "qkv_format": "bshd"}, torch.float32),
        ({"return_bias": True, "return_layernorm_output": True, "input_layernorm": True}, torch.float32),
    ],
)
def test_cross_attention_against_float64(arguments, dtype, device):
    mask_type = arguments.get("attn_mask_type", "no_mask")
    module = build(device, dtype, attention_type="cross", **{**arguments, "attn_mask_type": mask_type})
    layout = arguments.get("qkv_format", "sbhd")
    mask = {"padding": PADDING, "arbitrary": torch.rand(3, 1, 7, 5) < 0.4}.get(mask_type)
    shapes = ((7, 3, HIDDEN), (5, 3, HIDDEN)) if layout == "sbhd" else ((3, 7, HIDDEN), (3, 5, HIDDEN))
    x, encoder = (torch.randn(shape).to(device, dtype).requires_grad_() for shape in shapes)
    given = tuple(m.to(device) for m in mask) if isinstance(mask, tuple) else None if mask is None else mask.to(device)
    out = module(x, given, encoder)

    p = doubles(module)
    x64, encoder64 = (t.detach().cpu().double().requires_grad_() for t in (x, encoder))
    interleaved = arguments.get("fuse_qkv_params", False) and arguments.get("qkv_weight_interleaved", True)
    sizes = (HEADS, arguments.get("num_gqa_groups", HEADS), arguments.get("kv_channels", HIDDEN // HEADS))
    want, bias, normed = oracle.cross(x64, encoder64, p, *sizes, layout, mask_type, mask, interleaved)
    if arguments.get("return_bias"):
        out, out_bias, norm_out = out
        assert torch.equal(out_bias, module.proj.bias)
        assert_close(norm_out, normed.detach(), dtype, what="norm output")
    else:
        want = want + bias
    assert_close(out, want.detach(), dtype, what="out", depth=4)
    dout = torch.randn(x.shape).to(dtype)
    out.backward(dout.to(device))
    want.backward(dout.double())
    for name, grad, expected in (("x", x.grad, x64.grad), ("encoder_output", encoder.grad, encoder64.grad)):
        assert_close(grad, expected, dtype, what=name, depth=8)
    for name, parameter in module.named_parameters():
        if "key_bias" in name:  # as above
            assert parameter.grad.norm() < 4 * TOLERANCES[dtype, "plain"] * module.key_value.key_weight.grad.norm()
        elif p[name].grad is not None:
            assert_close(parameter.grad, p[name].grad, dtype, what=name, depth=8)


@pytest.mark.parametrize("before", [False, True])
def test_cross_attention_norms_and_turns_query_and_key(before, device):
    """Against the same module without norm and angles, between whose projections and attention they are applied here."""
    angles = [te.RotaryPositionEmbedding(HIDDEN // HEADS).to(device)(length) for length in (7, 5)]
    module = build(device, attention_type="cross", qk_norm_type="RMSNorm", qk_norm_before_rope=before, attn_mask_type="no_mask")
    x, encoder = torch.randn(7, 2, HIDDEN, device=device), torch.randn(5, 2, HIDDEN, device=device)
    query = module.query_layer(x).unflatten(-1, (HEADS, -1))
    key, value = module.key_value(encoder).unflatten(-1, (2, HEADS, -1)).unbind(2)
    prepared = []
    for tensor, norm, freqs in ((query, module.q_norm, angles[0]), (key, module.k_norm, angles[1])):
        normed = norm(tensor) if before else tensor
        turned = te.apply_rotary_pos_emb(normed, freqs)
        prepared.append(turned if before else norm(turned))
    want = module.proj(module.core_attention(*prepared, value))
    assert torch.equal(module(x, encoder_output=encoder, rotary_pos_emb=tuple(angles)), want)


@pytest.mark.parametrize("recipe", ["delayed", "current", "block"])
def test_cross_attention_in_fp8(recipe, device):
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 GEMMs need compute capability 8.9")
    options = {"attention_type": "cross", "input_layernorm": True, "attn_mask_type": "no_mask", "attention_dropout": 0.0}
    module = MultiheadAttention(64, HEADS, params_dtype=torch.bfloat16, device=device, init_method=wide, **options)
    x, encoder = (torch.randn(n, 2, 64).to(device, torch.bfloat16).requires_grad_() for n in (16, 24))
    for _ in range(2):  # delayed scaling knows the amaxes from the first on
        x.grad = encoder.grad = None
        with te.autocast(recipe=RECIPES[recipe]):
            out = module(x, encoder_output=encoder)
        dout = torch.randn(out.shape).to(out)
        out.backward(dout)
    p = doubles(module)
    x64, encoder64 = (t.detach().cpu().double().requires_grad_() for t in (x, encoder))
    want, bias, _ = oracle.cross(x64, encoder64, p, HEADS, HEADS, 16)
    (want + bias).backward(dout.cpu().double())
    assert 1e-3 < relative_error(out, want + bias) < 0.15
    assert relative_error(x.grad, x64.grad) < 0.25
    assert relative_error(encoder.grad, encoder64.grad) < 0.25


def wide(weight):
    torch.nn.init.normal_(weight, std=0.125)


def test_cross_attention_keeps_quantized_weights_between_microbatches(device):
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 GEMMs need compute capability 8.9")
    options = {"attention_type": "cross", "input_layernorm": True, "attn_mask_type": "no_mask", "attention_dropout": 0.0}
    module = MultiheadAttention(64, HEADS, params_dtype=torch.bfloat16, device=device, init_method=wide, **options)
    x, encoder = (torch.randn(16, 2, 64).to(device, torch.bfloat16) for _ in range(2))

    def call(first):
        with te.autocast(recipe=RECIPES["current"]):
            return module(x, encoder_output=encoder, is_first_microbatch=first)

    want = call(None)
    assert torch.equal(call(True), want)
    with torch.no_grad():
        for projection in (module.layernorm_query.query_weight, module.key_value.key_weight, module.proj.weight):
            projection.mul_(2)
    assert torch.equal(call(False), want)
    assert not torch.equal(call(None), want)


def test_cross_attention_adds_weight_gradients_to_main_grad(device):
    plain = build(device, attention_type="cross", attn_mask_type="no_mask")
    fused = build(device, attention_type="cross", attn_mask_type="no_mask", fuse_wgrad_accumulation=True)
    fused.load_state_dict(plain.state_dict())
    x, encoder = torch.randn(7, 2, HIDDEN, device=device), torch.randn(5, 2, HIDDEN, device=device)
    for parameter in fused.parameters():
        parameter.main_grad = torch.ones_like(parameter)
    for module in (plain, fused):
        module(x, encoder_output=encoder).square().sum().backward()
    for name, parameter in fused.named_parameters():
        if "weight" in name:
            assert_close(parameter.main_grad - 1, plain.get_parameter(name).grad.cpu().double(), torch.float32, what=name, depth=4)


def test_whole_weights_can_be_shared_with_cross_attention(device):
    split = build(device, attention_type="cross", attn_mask_type="no_mask")
    whole = build(device, attention_type="cross", attn_mask_type="no_mask", fuse_qkv_params=True)
    for name in ("query_layer", "key_value", "proj"):
        source, target = whole.get_submodule(name), split.get_submodule(name)
        target.weight, target.bias = source.weight, source.bias
    x, encoder = torch.randn(7, 2, HIDDEN, device=device), torch.randn(5, 2, HIDDEN, device=device)
    assert torch.equal(split(x, encoder_output=encoder), whole(x, encoder_output=encoder))
    assert split.key_value.weight is whole.key_value.weight


def test_cross_attention_to_nothing_gives_the_bias(device):
    module = build(device, attention_type="cross", attn_mask_type="no_mask")
    out = module(torch.randn(7, 2, HIDDEN, device=device), encoder_output=torch.zeros(0, 2, HIDDEN, device=device))
    assert torch.equal(out, module.proj.bias.expand(7, 2, HIDDEN))


def test_parameter_names():
    def names(**arguments):
        return sorted(name for name, _ in build("cpu", **arguments).named_parameters())

    assert names(fuse_qkv_params=True, bias=False) == ["proj.weight", "qkv.weight"]
    assert names(input_layernorm=True) == sorted(
        [f"layernorm_qkv.{part}" for part in ("layer_norm_weight", "layer_norm_bias")]
        + [f"layernorm_qkv.{part}_{kind}" for part in ("query", "key", "value") for kind in ("weight", "bias")]
        + ["proj.weight", "proj.bias"]
    )
    parts = [f"{part}_{kind}" for part in ("key", "value") for kind in ("weight", "bias")]
    split = [f"key_value.{part}" for part in parts] + ["proj.weight", "proj.bias"]
    assert names(attention_type="cross") == sorted([*split, "query_layer.query_weight", "query_layer.query_bias"])
    whole = ["key_value.bias", "key_value.weight", "layernorm_query.bias", "layernorm_query.layer_norm_bias"]
    whole += ["layernorm_query.layer_norm_weight", "layernorm_query.weight", "proj.bias", "proj.weight"]
    assert names(attention_type="cross", input_layernorm=True, fuse_qkv_params=True) == whole
    assert build("cpu", attention_type="cross", num_gqa_groups=2, fuse_qkv_params=True).key_value.weight.shape == (32, 32)
    module = build("cpu", num_gqa_groups=2)
    assert [tuple(getattr(module.qkv, f"{part}_weight").shape) for part in ("query", "key", "value")] == [
        (32, 32),
        (16, 32),
        (16, 32),
    ]
    assert build("cpu", num_gqa_groups=2, fuse_qkv_params=True).qkv.weight.shape == (64, 32)


def test_returns():
    x = torch.randn(5, 2, HIDDEN)
    assert isinstance(build("cpu")(x), torch.Tensor)
    assert len(build("cpu", return_bias=True)(x)) == 2
    assert len(build("cpu", return_bias=True, input_layernorm=True, return_layernorm_output=True)(x)) == 3
    assert len(build("cpu", input_layernorm=True, return_layernorm_output=True)(x)) == 2
    out, bias = build("cpu", return_bias=True, bias=False)(x)
    assert out.shape == x.shape
    assert bias is None


def test_qkv_views_are_not_copied(device):
    module = build(device, input_layernorm=True)
    seen = []
    module.core_attention.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[:3]))
    module(torch.randn(5, 2, HIDDEN, device=device))
    assert len({x.untyped_storage().data_ptr() for x in seen}) == 1


def test_per_call_mask_type(device):
    x = torch.randn(5, 2, HIDDEN, device=device)
    causal = build(device)
    full = build(device, attn_mask_type="no_mask")
    full.load_state_dict(causal.state_dict())
    assert torch.equal(causal(x, attn_mask_type="no_mask"), full(x))
    assert not torch.equal(causal(x), full(x))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"hidden_size": 33}, ValueError, "hidden_size=33 must be a multiple of num_attention_heads=4"),
        ({"num_gqa_groups": 3}, ValueError, "num_attention_heads=4 must be a multiple of num_gqa_groups=3"),
        ({"normalization": "BatchNorm"}, ValueError, "normalization must be one of 'LayerNorm', 'RMSNorm'; got 'BatchNorm'"),
        ({"attn_mask_type": "diagonal"}, ValueError, "attn_mask_type must be one of"),
        ({"qkv_format": "hdsb"}, ValueError, "qkv_format must be one of"),
        ({"attention_type": "other"}, ValueError, "attention_type must be one of 'self', 'cross'; got 'other'"),
        ({"qk_norm_type": "L1Normalization"}, ValueError, "qk_norm_type must be one of"),
        ({"layer_number": 0}, ValueError, "layer_number must be at least 1"),
        ({"tp_size": 4}, NotImplementedError, "tp_size=4"),
        ({"ub_bulk_wgrad": True}, NotImplementedError, "ub_bulk_wgrad"),
        ({"attention_dropout": 2}, ValueError, "attention_dropout must be a probability"),
    ],
)
def test_bad_constructor_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        MultiheadAttention(**{"hidden_size": HIDDEN, "num_attention_heads": HEADS, "device": "cpu", **arguments})


def test_bad_inputs():
    module, x = build("cpu"), torch.randn(5, 2, HIDDEN)
    with pytest.raises(ValueError, match=r"hidden_states must be \[s, b, hidden_size=32\], got shape \[5, 32\]"):
        module(x[:, 0])
    with pytest.raises(ValueError, match="in_features=32"):
        module(x[..., :16])
    with pytest.raises(TypeError, match=r"torch\.float64"):
        module(x.double())
    with pytest.raises(ValueError, match="rotary_pos_emb must be"):
        module(x, rotary_pos_emb=torch.zeros(1))
    with pytest.raises(ValueError, match=r"encoder_output is for cross attention.*attention_type='cross'"):
        module(x, encoder_output=x)


@pytest.mark.parametrize(
    ("encoder", "error", "message"),
    [
        (None, ValueError, "encoder_output must be a tensor, as cross attention attends to it; got nothing"),
        ([1.0], TypeError, "encoder_output must be a tensor.*got list"),
        (torch.zeros(4, HIDDEN), ValueError, r"encoder_output must be \[any length, batch=2, hidden_size=32\].*shape \[4, 32\]"),
        (torch.zeros(4, 3, HIDDEN), ValueError, r"encoder_output must be .*batch=2.*got shape \[4, 3, 32\]"),
        (torch.zeros(4, 2, 31), ValueError, r"encoder_output must be .*hidden_size=32.*got shape \[4, 2, 31\]"),
        (torch.zeros(4, 2, HIDDEN).half(), TypeError, r"encoder_output has dtype torch\.float16, hidden_states torch\.float32"),
        (torch.zeros(4, 2, HIDDEN, device="meta"), ValueError, "encoder_output is on meta, hidden_states on cpu"),
    ],
)
def test_bad_encoder_output(encoder, error, message):
    module = build("cpu", attention_type="cross", attn_mask_type="no_mask", name="inter")
    with pytest.raises(error, match=f"MultiheadAttention 'inter': {message}"):
        module(torch.zeros(5, 2, HIDDEN), encoder_output=encoder)


def test_bad_masks_of_cross_attention():
    module = build("cpu", attention_type="cross", attn_mask_type="padding")
    x, encoder = torch.zeros(7, 3, HIDDEN), torch.zeros(5, 3, HIDDEN)
    with pytest.raises(ValueError, match="attention_mask must be a bool tensor"):
        module(x, None, encoder)
    with pytest.raises(ValueError, match=r"attention_mask must be .* 7 queries and 5 keys, got \[3, 1, 1, 7\]"):
        module(x, PADDING[0], encoder)
    with pytest.raises(ValueError, match=r"attention_mask must be .* 7 queries and 5 keys, got \[3, 1, 1, 5\]"):
        module(x, (PADDING[1], PADDING[0]), encoder)
    with pytest.raises(TypeError, match="attention_mask must be bool"):
        module(x, tuple(mask.float() for mask in PADDING), encoder)
    with pytest.raises(ValueError, match="attention_mask must be a bool tensor"):
        module(x, PADDING, encoder, "arbitrary")
