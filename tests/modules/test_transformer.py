"""TransformerLayer: every norm placement against float64, dropout, checkpointing, torch.compile, state dict, bad inputs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from overdrive.modules.transformer import TransformerLayer
from overdrive.scaling.autocast import autocast
from tests.modules import attention_oracle as oracle
from tests.numerics import RECIPES, assert_close, relative_error

pytestmark = [  # torch's own tracer does what torch warns of
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
]

MODES = {
    "": {},
    "post": {"apply_residual_connection_post_layernorm": True},
    "output": {"output_layernorm": True},
    "parallel": {"parallel_attention_mlp": True},
}
HIDDEN, FFN, HEADS = 32, 48, 4


def build(device, dtype=torch.float32, hidden=HIDDEN, ffn=FFN, heads=HEADS, dropout=0.0, **arguments):
    """A layer whose parameters are all random, so that none can hide."""
    drops = {"hidden_dropout": dropout, "attention_dropout": dropout}
    layer = TransformerLayer(hidden, ffn, heads, params_dtype=dtype, device=device, **{**drops, **arguments})
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            gain = "norm_weight" in name or name == "layernorm.weight"
            parameter.normal_(1.0 if gain else 0.0, 0.2)
    return layer


def expected(layer, x, dout, mode="", activation="gelu", **attention):
    """float64: (out, dx, {name: gradient})."""
    p = {name: parameter.detach().cpu().double().requires_grad_() for name, parameter in layer.named_parameters()}
    x64 = x.detach().cpu().double().requires_grad_()
    out = oracle.layer(x64, p, mode=mode, activation=activation, **attention)
    out.backward(dout.cpu().double())
    return out.detach(), x64.grad, {name: parameter.grad for name, parameter in p.items()}


def run(layer, x, dout, **forward):
    """(out, dx, {name: gradient})."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    out = layer(x, **forward)
    out.backward(dout)
    return out.detach(), x.grad, {name: parameter.grad for name, parameter in layer.named_parameters()}


def compare(actual, want, dtype, depth):
    assert_close(actual[0], want[0], dtype, what="out", depth=depth)
    assert_close(actual[1], want[1], dtype, what="dx", depth=2 * depth)
    for name, gradient in want[2].items():
        if "key_bias" not in name:  # a constant added to all keys changes nothing, its gradient is rounding
            assert_close(actual[2][name], gradient, dtype, what=name, depth=2 * depth)


def assert_same(first, second):
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    for name, gradient in first[2].items():
        assert torch.equal(gradient, second[2][name]), name


def inputs(device, dtype=torch.float32, shape=(7, 3, HIDDEN)):
    return torch.randn(shape).to(device, dtype), torch.randn(shape).to(device, dtype)


@pytest.mark.parametrize(
    ("mode", "arguments", "dtype"),
    [
        ("", {}, torch.float32),
        ("", {"fuse_qkv_params": True, "num_gqa_groups": 2, "activation": "swiglu", "normalization": "RMSNorm"}, torch.float32),
        ("", {"fuse_qkv_params": True, "qkv_weight_interleaved": False}, torch.float16),
        ("", {"attn_input_format": "bshd", "self_attn_mask_type": "padding"}, torch.float32),
        ("", {"bias": False, "num_gqa_groups": 1, "self_attn_mask_type": "no_mask"}, torch.bfloat16),
        ("", {"zero_centered_gamma": True, "kv_channels": 6}, torch.float32),
        ("post", {}, torch.float32),
        ("post", {"normalization": "RMSNorm", "self_attn_mask_type": "arbitrary"}, torch.float32),
        ("output", {}, torch.float32),
        ("output", {"fuse_qkv_params": True, "normalization": "RMSNorm"}, torch.bfloat16),
        ("parallel", {}, torch.float32),
        ("parallel", {"attn_input_format": "bshd", "bias": False}, torch.bfloat16),
    ],
)
def test_against_float64(mode, arguments, dtype, device):
    layer = build(device, dtype, **MODES[mode], **arguments)
    layout, mask_type = arguments.get("attn_input_format", "sbhd"), arguments.get("self_attn_mask_type", "causal")
    x, dout = inputs(device, dtype, (7, 3, HIDDEN) if layout == "sbhd" else (3, 7, HIDDEN))
    mask = None
    if mask_type == "padding":
        mask = (torch.arange(7) >= torch.tensor([5, 7, 0])[:, None])[:, None, None]
    elif mask_type == "arbitrary":
        mask = torch.rand(3, 1, 7, 7) < 0.4
    actual = run(layer, x, dout, attention_mask=None if mask is None else mask.to(device))

    zero_centered = arguments.get("zero_centered_gamma", False)
    if zero_centered:
        with torch.no_grad():  # the oracle's gain is the weight itself: the gradients are the same
            for name, parameter in layer.named_parameters():
                if "layer_norm_weight" in name:
                    parameter.add_(1)
    want = expected(
        layer,
        x,
        dout,
        mode,
        arguments.get("activation", "gelu"),
        heads=HEADS,
        groups=arguments.get("num_gqa_groups", HEADS),
        dim=arguments.get("kv_channels", HIDDEN // HEADS),
        layout=layout,
        mask_type=mask_type,
        mask=mask,
        interleaved=arguments.get("fuse_qkv_params", False) and arguments.get("qkv_weight_interleaved", True),
    )
    compare(actual, want, dtype, depth=6)


@pytest.mark.parametrize(
    ("recipe", "mode"), [("delayed", ""), ("current", ""), ("block", "post"), ("delayed", "output"), ("current", "parallel")]
)
def test_fp8(recipe, mode, device):
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 GEMMs need compute capability 8.9")
    layer = build(device, torch.bfloat16, 128, 256, 4, **MODES[mode])
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(0.5 if parameter.dim() == 2 else 1)  # a layer that neither blows up nor shrinks what it gets
    x, dout = inputs(device, torch.bfloat16, (16, 2, 128))
    want = expected(layer, x, dout, mode, heads=4, groups=4, dim=32)
    for _ in range(2):  # delayed scaling knows the amaxes from the first on
        with autocast(recipe=RECIPES[recipe]):
            actual = run(layer, x, dout)
    assert 1e-3 < relative_error(actual[0], want[0]) < 0.15
    assert relative_error(actual[1], want[1]) < 0.25


def test_forward_hooks_fire_and_change_nothing(device):
    layer, (x, dout) = build(device), inputs(device)
    plain = run(layer, x, dout)
    fired = []
    for module in layer.modules():
        module.register_forward_hook(lambda module, *_: fired.append(type(module).__name__))
    hooked = run(layer, x, dout)
    assert fired == ["LayerNormLinear", "DotProductAttention", "Linear", "MultiheadAttention", "LayerNormMLP", "TransformerLayer"]
    assert relative_error(hooked[0], plain[0]) < 1e-6
    assert relative_error(hooked[1], plain[1]) < 1e-6


def test_frozen_parameters_get_no_gradient(device):
    layer, (x, dout) = build(device), inputs(device)
    want = run(layer, x, dout)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_("proj" in name)
    actual = run(layer, x, dout)
    assert_close(actual[1], want[1].cpu().double(), torch.float32)
    assert [name for name, gradient in actual[2].items() if gradient is not None] == [
        "self_attention.proj.weight",
        "self_attention.proj.bias",
    ]


@pytest.mark.parametrize("shape", [(0, 2, HIDDEN), (5, 0, HIDDEN), (1, 1, HIDDEN)])
def test_few_or_no_tokens(shape, device):
    out, dx, gradients = run(build(device, dropout=0.1), *inputs(device, shape=shape))
    assert out.shape == dx.shape == shape
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_strided_and_expanded_inputs(device):
    layer = build(device)
    x = torch.randn(3, 7, HIDDEN, device=device).transpose(0, 1)
    assert torch.equal(layer(x), layer(x.contiguous()))
    x = torch.randn(7, 1, HIDDEN, device=device).expand(7, 3, HIDDEN)
    assert torch.equal(layer(x), layer(x.contiguous()))


def test_torch_autocast(device):
    for mode in MODES.values():
        layer, (x, dout) = build(device, **mode), inputs(device)
        want = run(layer, x, dout)
        with torch.autocast(device, dtype=torch.bfloat16):
            out = layer(x)
        assert out.dtype == (torch.float32 if layer.output_layernorm and out.dtype == torch.float32 else torch.bfloat16)
        assert relative_error(out, want[0]) < 2e-2


# --- decoders -----------------------------------------------------------------------------------------------------------

DECODER_MODES = {mode: arguments for mode, arguments in MODES.items() if mode != "parallel"}


def decoder(device, dtype=torch.float32, **arguments):
    return build(device, dtype, layer_type="decoder", **arguments)


def encoded(device, dtype=torch.float32, shape=(5, 3, HIDDEN)):
    return torch.randn(shape).to(device, dtype).requires_grad_()


@pytest.mark.parametrize(
    ("mode", "arguments", "dtype"),
    [
        ("", {}, torch.float32),
        ("", {"fuse_qkv_params": True, "num_gqa_groups": 2, "activation": "swiglu", "normalization": "RMSNorm"}, torch.float32),
        ("", {"fuse_qkv_params": True, "qkv_weight_interleaved": False, "enc_dec_attn_mask_type": "causal"}, torch.float16),
        ("", {"attn_input_format": "bshd", "bias": False, "enc_dec_attn_mask_type": "padding"}, torch.float32),
        ("", {"num_gqa_groups": 1, "kv_channels": 6, "enc_dec_attn_mask_type": "arbitrary"}, torch.bfloat16),
        ("", {"enc_dec_attn_mask_type": "causal", "enc_dec_bottom_right_diagonal": True}, torch.float32),
        ("post", {}, torch.float32),
        ("post", {"normalization": "RMSNorm", "enc_dec_attn_mask_type": "padding"}, torch.bfloat16),
        ("output", {}, torch.float32),
        ("output", {"attn_input_format": "bshd", "fuse_qkv_params": True}, torch.bfloat16),
    ],
)
def test_decoder_against_float64(mode, arguments, dtype, device):
    layer = decoder(device, dtype, **MODES[mode], **arguments)
    layout, mask_type = arguments.get("attn_input_format", "sbhd"), arguments.get("enc_dec_attn_mask_type", "no_mask")
    shapes = ((7, 3, HIDDEN), (5, 3, HIDDEN)) if layout == "sbhd" else ((3, 7, HIDDEN), (3, 5, HIDDEN))
    (x, dout), encoder = inputs(device, dtype, shapes[0]), encoded(device, dtype, shapes[1])
    mask, given = None, None
    if mask_type == "padding":
        ends = ((7, torch.tensor([5, 7, 1])), (5, torch.tensor([3, 5, 2])))
        mask = tuple((torch.arange(n) >= end[:, None])[:, None, None] for n, end in ends)
        given = tuple(part.to(device) for part in mask)
    elif mask_type == "arbitrary":
        mask = torch.rand(3, 1, 7, 5) < 0.4
        given = mask.to(device)
    actual = run(layer, x, dout, encoder_output=encoder, enc_dec_attn_mask=given)

    encoder64 = encoder.detach().cpu().double().requires_grad_()
    bottom_right = "_bottom_right" if arguments.get("enc_dec_bottom_right_diagonal") else ""
    want = expected(
        layer,
        x,
        dout,
        mode,
        arguments.get("activation", "gelu"),
        encoder=encoder64,
        enc_dec_mask_type=mask_type + bottom_right,
        enc_dec_mask=mask,
        heads=HEADS,
        groups=arguments.get("num_gqa_groups", HEADS),
        dim=arguments.get("kv_channels", HIDDEN // HEADS),
        layout=layout,
        interleaved=arguments.get("fuse_qkv_params", False) and arguments.get("qkv_weight_interleaved", True),
    )
    compare(actual, want, dtype, depth=8)
    assert_close(encoder.grad, encoder64.grad, dtype, what="encoder_output", depth=16)


@pytest.mark.parametrize(("recipe", "mode"), [("delayed", ""), ("current", "post"), ("block", "output")])
def test_decoder_in_fp8(recipe, mode, device):
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 GEMMs need compute capability 8.9")
    layer = decoder(device, torch.bfloat16, hidden=128, ffn=256, **MODES[mode])
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(0.5 if parameter.dim() == 2 else 1)  # as in test_fp8
    (x, dout), encoder = inputs(device, torch.bfloat16, (16, 2, 128)), encoded(device, torch.bfloat16, (24, 2, 128))
    encoder64 = encoder.detach().cpu().double().requires_grad_()
    want = expected(layer, x, dout, mode, encoder=encoder64, heads=4, groups=4, dim=32)
    for _ in range(2):
        encoder.grad = None
        with autocast(recipe=RECIPES[recipe]):
            actual = run(layer, x, dout, encoder_output=encoder)
    assert 1e-3 < relative_error(actual[0], want[0]) < 0.15
    assert relative_error(actual[1], want[1]) < 0.25
    assert relative_error(encoder.grad, encoder64.grad) < 0.25


def test_decoder_masks_of_one_call(device):
    layer, (x, _), encoder = decoder(device), inputs(device), encoded(device)
    options = {"enc_dec_attn_mask_type": "causal", "enc_dec_bottom_right_diagonal": True, "self_attn_mask_type": "no_mask"}
    other = decoder(device, **options)
    other.load_state_dict(layer.state_dict())
    want = other(x, encoder_output=encoder)
    assert torch.equal(layer(x, encoder_output=encoder, enc_dec_window_size=(-1, 0), **options), want)
    assert not torch.equal(layer(x, encoder_output=encoder), want)
    hidden = torch.zeros(1, 1, 7, 5, dtype=torch.bool, device=device)
    hidden[..., 2:] = True
    masked = layer(x, encoder_output=encoder, enc_dec_attn_mask=hidden, enc_dec_attn_mask_type="arbitrary")
    assert relative_error(masked, layer(x, encoder_output=encoder[:2])) < 4e-6


def test_decoder_hooks_fire_and_change_nothing(device):
    layer, (x, dout), encoder = decoder(device), inputs(device), encoded(device)
    plain = run(layer, x, dout, encoder_output=encoder)
    fired = []
    for module in layer.modules():
        module.register_forward_hook(lambda module, *_: fired.append(type(module).__name__))
    hooked = run(layer, x, dout, encoder_output=encoder)
    attended = ["DotProductAttention", "Linear", "MultiheadAttention"]
    crossed = ["LayerNormLinear", "Linear", *attended]
    assert fired == ["LayerNormLinear", *attended, *crossed, "LayerNormMLP", "TransformerLayer"]
    assert relative_error(hooked[0], plain[0]) < 1e-6
    assert relative_error(hooked[1], plain[1]) < 1e-6


def test_decoder_with_everything_before_it_frozen(device):
    layer, (x, dout) = decoder(device), inputs(device)
    encoder = encoded(device)
    want = run(layer, x, dout, encoder_output=encoder)
    actual = run(layer, x, dout, encoder_output=encoder.detach())
    assert_same(actual, want)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_("key_value" in name)
    layer.zero_grad()
    layer(x, encoder_output=encoder).backward(dout)
    got = {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert sorted(got) == [f"inter_attention.key_value.{part}_{kind}" for part in ("key", "value") for kind in ("bias", "weight")]
    assert relative_error(got["inter_attention.key_value.value_weight"], want[2]["inter_attention.key_value.value_weight"]) < 1e-6


@pytest.mark.parametrize("mode", DECODER_MODES)
def test_decoder_drops_checkpoints_and_autocasts(mode, device):
    layer, (x, dout), encoder = decoder(device, dropout=0.3, drop_path_rate=0.2, **MODES[mode]), inputs(device), encoded(device)
    results = []
    for options in ({}, {"checkpoint_core_attention": True}, {}):
        torch.manual_seed(5)
        results.append(run(layer, x, dout, encoder_output=encoder, **options))
    for result in results[1:]:
        assert_same(result, results[0])
    assert not torch.equal(run(layer, x, dout, encoder_output=encoder)[0], results[0][0])
    still = decoder(device, **MODES[mode])
    still.load_state_dict(layer.eval().state_dict())
    want = layer(x, encoder_output=encoder)
    assert torch.equal(want, still(x, encoder_output=encoder))
    with torch.autocast(device, dtype=torch.bfloat16):
        assert relative_error(layer(x, encoder_output=encoder), want) < 2e-2


@pytest.mark.parametrize("mode", DECODER_MODES)
def test_decoder_compiles_to_one_graph_with_the_same_numbers(mode, device):
    layer, (x, dout), encoder = decoder(device, **MODES[mode]), inputs(device), encoded(device)
    want, dencoder = run(layer, x, dout, encoder_output=encoder), encoder.grad
    encoder.grad = None
    torch.compiler.reset()
    actual = run(torch.compile(layer, fullgraph=True, backend="aot_eager"), x, dout, encoder_output=encoder)
    assert relative_error(actual[0], want[0]) < 1e-6
    assert relative_error(actual[1], want[1]) < 1e-6
    assert relative_error(encoder.grad, dencoder) < 1e-6
    for name, gradient in actual[2].items():
        assert "key_bias" in name or relative_error(gradient, want[2][name.removeprefix("_orig_mod.")]) < 2e-6, name


def test_bad_inputs_of_decoders():
    layer, (x, _), encoder = decoder("cpu"), inputs("cpu"), encoded("cpu")
    with pytest.raises(ValueError, match="encoder_output must be a tensor, as cross attention attends to it; got nothing"):
        layer(x)
    with pytest.raises(ValueError, match=r"encoder_output must be .*batch=3, hidden_size=32\].*got shape \[5, 2, 32\]"):
        layer(x, encoder_output=encoder[:, :2])
    with pytest.raises(TypeError, match=r"encoder_output has dtype torch\.float64"):
        layer(x, encoder_output=encoder.double())
    with pytest.raises(ValueError, match="attn_mask_type must be one of"):
        layer(x, encoder_output=encoder, enc_dec_attn_mask_type="lower")
    with pytest.raises(ValueError, match="attention_mask must be a bool tensor"):
        layer(x, encoder_output=encoder, enc_dec_attn_mask_type="padding")
    mask = torch.zeros(3, 1, 1, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"attention_mask must be .*7 queries and 5 keys, got \[3, 1, 1, 5\]"):
        layer(x, encoder_output=encoder, enc_dec_attn_mask_type="padding", enc_dec_attn_mask=mask)
    for name, value in (("cu_seqlens_q", torch.zeros(2, dtype=torch.int32)), ("max_seqlen_kv", 5), ("pad_between_seqs", True)):
        with pytest.raises(NotImplementedError, match=f"{name}=.*decoders take it with attn_input_format='thd' only"):
            layer(x, encoder_output=encoder, **{name: value})


# --- dropout ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_dropout_only_in_training_and_by_the_seed(mode, device):
    layer, (x, dout) = build(device, dropout=0.4, drop_path_rate=0.2, **MODES[mode]), inputs(device)
    torch.manual_seed(5)
    first, second = run(layer, x, dout), run(layer, x, dout)
    torch.manual_seed(5)
    assert_same(run(layer, x, dout), first)
    assert not torch.equal(first[0], second[0])
    assert all(gradient is not None for gradient in first[2].values())
    layer.eval()
    still = build(device, **MODES[mode])
    still.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), still(x))


def test_hidden_dropout_keeps_the_expectation(device):
    layer = build(device, hidden_dropout=0.3)
    x, _ = inputs(device)
    wide = x.repeat(1, 700, 1)
    mean = layer(wide).unflatten(1, (700, 3)).mean(1)
    # the MLP is not linear in the dropped attention branch, so the mean is near the undropped output, no more
    assert relative_error(mean, layer.eval()(x)) < 0.15


def test_drop_path_drops_samples_not_tokens(device):
    for layout, batch_dim in (("sbhd", 1), ("bshd", 0)):
        layer = build(device, drop_path_rate=0.5, attn_input_format=layout)
        x = torch.randn((6, 40, HIDDEN) if layout == "sbhd" else (40, 6, HIDDEN), device=device)
        unchanged = (layer(x) == x).all(-1).movedim(batch_dim, 0)
        assert 1 <= int(unchanged.all(1).sum()) <= 25  # both branches dropped: a quarter of 40
        assert torch.equal(unchanged.all(1), unchanged.any(1))


# --- checkpointing, torch.compile ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_checkpointing_changes_no_bit(mode, reentrant, device):
    layer, (x, dout) = build(device, dropout=0.3, **MODES[mode]), inputs(device)
    torch.manual_seed(7)
    want = run(layer, x, dout)
    torch.manual_seed(7)
    assert_same(run(lambda_module(layer, reentrant), x, dout), want)


def lambda_module(layer, reentrant):
    """`layer` called through a checkpoint."""

    class Checkpointed(torch.nn.Module):
        def forward(self, x):
            return checkpoint(layer, x, use_reentrant=reentrant)

        def named_parameters(self, *args, **kwargs):
            return layer.named_parameters()

        def zero_grad(self, *args):
            layer.zero_grad()

    return Checkpointed()


def test_checkpointed_core_attention_changes_no_bit(device):
    layer, (x, dout) = build(device, dropout=0.3), inputs(device)
    torch.manual_seed(7)
    want = run(layer, x, dout)
    torch.manual_seed(7)
    assert_same(run(layer, x, dout, checkpoint_core_attention=True), want)


@pytest.mark.parametrize("mode", MODES)
def test_compiles_to_one_graph_with_the_same_numbers(mode, device):
    layer, (x, dout) = build(device, **MODES[mode]), inputs(device)
    want = run(layer, x, dout)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    actual = run(compiled, x, dout)
    assert relative_error(actual[0], want[0]) < 1e-6
    assert relative_error(actual[1], want[1]) < 1e-6
    for name, gradient in actual[2].items():
        assert "key_bias" in name or relative_error(gradient, want[2][name.removeprefix("_orig_mod.")]) < 2e-6, name


def test_compiles_in_training_with_dropout(device):
    x, dout = inputs(device)
    torch.compiler.reset()
    for dropout, forward in ((0.0, {}), (0.2, {}), (0.3, {"checkpoint_core_attention": True})):
        layer = build(device, dropout=dropout, drop_path_rate=0.1)
        out, dx, gradients = run(torch.compile(layer, fullgraph=True, backend="aot_eager"), x, dout, **forward)
        assert out.isfinite().all()
        assert dx.isfinite().all()
        assert all(gradient is not None for gradient in gradients.values())


# --- names --------------------------------------------------------------------------------------------------------------

QKV = ("query", "key", "value")
MLP_NAMES = [f"layernorm_mlp.{name}" for name in ("layer_norm_weight", "layer_norm_bias")] + [
    f"layernorm_mlp.{fc}_{kind}" for fc in ("fc1", "fc2") for kind in ("weight", "bias")
]
PROJ = ["self_attention.proj.weight", "self_attention.proj.bias"]
NORM_QKV = [f"self_attention.layernorm_qkv.layer_norm_{kind}" for kind in ("weight", "bias")]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({}, NORM_QKV + [f"self_attention.layernorm_qkv.{part}_{kind}" for part in QKV for kind in ("weight", "bias")]),
        ({"fuse_qkv_params": True}, [*NORM_QKV, "self_attention.layernorm_qkv.weight", "self_attention.layernorm_qkv.bias"]),
        (
            {"output_layernorm": True, "fuse_qkv_params": True},
            ["layernorm.weight", "layernorm.bias", "self_attention.qkv.weight", "self_attention.qkv.bias"],
        ),
    ],
)
def test_state_dict_names(arguments, names):
    assert sorted(build("cpu", **arguments).state_dict()) == sorted([*names, *PROJ, *MLP_NAMES])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mode", DECODER_MODES)
def test_state_dict_names_of_decoders(mode, fused):
    names = set(decoder("cpu", fuse_qkv_params=fused, **MODES[mode]).state_dict())
    encoder = set(build("cpu", fuse_qkv_params=fused, **MODES[mode]).state_dict())
    projections = ["layernorm_query.", "key_value."]
    if not fused:
        projections = ["layernorm_query.query_", "key_value.key_", "key_value.value_"]
    inter = [f"inter_attention.{name}" for name in ("layernorm_query.layer_norm_", "proj.", *projections)]
    assert names == encoder | {f"{name}{kind}" for name in inter for kind in ("weight", "bias")}


def test_state_dict_without_bias_and_beta():
    names = sorted(build("cpu", bias=False, normalization="RMSNorm", fuse_qkv_params=True).state_dict())
    prefixes = ("self_attention.layernorm_qkv.", "layernorm_mlp.")
    kept = [f"{prefix}layer_norm_weight" for prefix in prefixes] + ["layernorm_mlp.fc1_weight", "layernorm_mlp.fc2_weight"]
    assert names == sorted([*kept, "self_attention.layernorm_qkv.weight", "self_attention.proj.weight"])


def test_fused_and_split_parameters_hold_the_same_layer(device):
    split = build(device)
    fused = build(device, fuse_qkv_params=True, qkv_weight_interleaved=False)
    state = {name: value for name, value in split.state_dict().items() if not any(f"{part}_" in name for part in QKV)}
    for kind in ("weight", "bias"):
        parts = [split.state_dict()[f"self_attention.layernorm_qkv.{part}_{kind}"] for part in QKV]
        state[f"self_attention.layernorm_qkv.{kind}"] = torch.cat(parts)
    fused.load_state_dict(state)
    x, _ = inputs(device)
    assert torch.equal(split(x), fused(x))


# --- bad inputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_attention_heads": 5}, ValueError, "hidden_size=32 must be a multiple of num_attention_heads=5"),
        ({"num_gqa_groups": 3}, ValueError, "num_gqa_groups=3"),
        ({"layer_type": "decoder", "parallel_attention_mlp": True}, ValueError, "parallel_attention_mlp .*layer_type='encoder'"),
        ({"layer_type": "decoder", "enc_dec_attn_mask_type": "full"}, ValueError, "enc_dec_attn_mask_type must be one of"),
        ({"layer_type": "both"}, ValueError, "layer_type must be one of 'encoder', 'decoder'; got 'both'"),
        ({"normalization": "none"}, ValueError, "normalization must be one of"),
        ({"activation": "gellu"}, ValueError, "activation must be one of"),
        ({"self_attn_mask_type": "lower"}, ValueError, "self_attn_mask_type must be one of"),
        ({"attn_input_format": "bhsd"}, ValueError, "attn_input_format must be one of 'sbhd', 'bshd'"),
        ({"hidden_dropout": 1.0}, ValueError, "hidden_dropout must be a probability"),
        ({"attention_dropout": "0.1"}, ValueError, "attention_dropout must be a probability"),
        ({"drop_path_rate": -1}, ValueError, "drop_path_rate must be a probability"),
        ({"parallel_attention_mlp": True, "output_layernorm": True}, ValueError, "parallel_attention_mlp"),
        ({"ub_tp_comm_overlap": True}, NotImplementedError, "ub_tp_comm_overlap"),
        ({"tp_group": object()}, NotImplementedError, "tp_group"),
        ({"qk_norm_type": "rms"}, ValueError, "qk_norm_type must be one of"),
        ({"layernorm_epsilon": 0.0}, ValueError, "eps must be"),
    ],
)
def test_bad_constructor_arguments(arguments, error, message):
    sizes = {"hidden_size": HIDDEN, "ffn_hidden_size": FFN, "num_attention_heads": HEADS, "device": "cpu"}
    with pytest.raises(error, match=message):
        TransformerLayer(**{**sizes, **arguments})


def test_bad_inputs():
    layer, (x, _) = build("cpu"), inputs("cpu")
    with pytest.raises(ValueError, match="hidden_states must be"):
        layer(x[0])
    with pytest.raises(ValueError, match="in_features=32"):
        layer(x[..., :31])
    with pytest.raises(TypeError, match=r"torch\.float16"):
        layer(x.half())
    with pytest.raises(ValueError, match="attn_mask_type must be one of"):
        layer(x, self_attn_mask_type="nothing")
    with pytest.raises(ValueError, match="attention_mask must be a bool tensor"):
        layer(x, self_attn_mask_type="padding")
    with pytest.raises(TypeError, match="attention_mask must be bool"):
        layer(x, torch.zeros(3, 1, 1, 7), "padding")
    with pytest.raises(ValueError, match=r"encoder_output is for cross attention.*layer_type='decoder'"):
        layer(x, encoder_output=x)
    for name, value in (("enc_dec_attn_mask_type", "no_mask"), ("enc_dec_window_size", (-1, -1)), ("enc_dec_attn_mask", x)):
        with pytest.raises(ValueError, match=f"{name} is for cross attention"):
            layer(x, **{name: value})
    with pytest.raises(ValueError, match="rotary_pos_emb must be"):
        layer(x, rotary_pos_emb=x)
