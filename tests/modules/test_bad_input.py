"""What the layers refuse, and that the message names the argument, what came and what to do."""

from __future__ import annotations

import re

import pytest
import torch

import overdrive.pytorch as te
from overdrive.recipe import DelayedScaling, Float8BlockScaling, Float8CurrentScaling, MXFP8BlockScaling, NVFP4BlockScaling
from tests.modules.layer_oracle import IN, build, features

LAYERS = ("Linear", "LayerNormLinear", "LayerNormMLP", "LayerNorm", "RMSNorm")
GEMMS = LAYERS[:3]
FUSED_NORMS = ("LayerNormLinear", "LayerNormMLP")
FEATURES = {"Linear": "in_features", "LayerNormLinear": "in_features", "LayerNormMLP": "hidden_size"}
layers = pytest.mark.parametrize("layer", LAYERS)


def make(layer, device, **arguments):
    if layer in GEMMS:
        return build(layer, device, **arguments)
    return getattr(te, layer)(IN, device=device, **arguments)


def refuses(error, *parts):
    """The error, with all the parts in its message, in any order."""
    return pytest.raises(error, match="(?s)" + "".join(f"(?=.*{re.escape(str(part))})" for part in parts))


# --- inputs -----------------------------------------------------------------------------------------------------------


@layers
@pytest.mark.parametrize("shape", [(4, IN + 1), (IN, 4), (), (4, 0)])
def test_a_wrong_last_dimension(shape, layer, device):
    expected = [f"{FEATURES[layer]}={IN}"] if layer in GEMMS else ["end in", [IN]]
    with refuses(ValueError, layer, "inp", *expected, list(shape)):
        make(layer, device)(torch.randn(shape, device=device))


@layers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_dtype_that_is_not_the_parameters(dtype, layer, device):
    with refuses(TypeError, layer, "inp", dtype, torch.float32, "params_dtype", "torch.autocast"):
        make(layer, device)(torch.zeros(4, IN, device=device, dtype=dtype))


@layers
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_a_dtype_that_is_no_floating_point_also_under_torchs_autocast(dtype, mixed, layer, device):
    module = make(layer, device)
    with torch.autocast(device, torch.bfloat16, enabled=mixed), refuses(TypeError, layer, "inp", "floating-point", dtype):
        module(torch.zeros(4, IN, device=device, dtype=dtype))


@layers
@pytest.mark.parametrize("mixed", [False, True])
def test_another_device(mixed, layer, device):
    module = make(layer, device)
    with torch.autocast(device, torch.bfloat16, enabled=mixed), refuses(ValueError, layer, "inp", "meta", device, ".to()"):
        module(torch.zeros(4, IN, device="meta"))


@layers
@pytest.mark.parametrize("inp", [None, [1.0] * IN, 3])
def test_what_is_no_tensor(inp, layer, device):
    with refuses(TypeError, layer, "inp", "tensor", type(inp).__name__):
        make(layer, device)(inp)


@layers
def test_the_name_of_a_layer_is_in_its_messages(layer, device):
    with refuses(ValueError, f"{layer} 'decoder.7.up'"):
        make(layer, device, name="decoder.7.up")(torch.zeros(4, 3, device=device))


def test_a_norm_over_several_dimensions_names_them(device):
    with refuses(ValueError, "LayerNorm", [4, IN], [IN]):
        te.LayerNorm((4, IN), device=device)(torch.zeros(IN, device=device))


@pytest.mark.parametrize("layer", ["Linear", "LayerNormLinear"])
def test_fp8_grad(layer, device):
    with refuses(NotImplementedError, layer, "fp8_grad", "leave it at False"):
        make(layer, device)(features(16, device=device), fp8_grad=True)


def test_fp8_output_of_a_fused_norm(device):
    with refuses(NotImplementedError, "LayerNormLinear", "fp8_output", "leave it at False"):
        make("LayerNormLinear", device)(features(16, device=device), fp8_output=True)


# --- construction -----------------------------------------------------------------------------------------------------

NORMS = LAYERS[3:]
LINEARS = LAYERS[:2]
GPT_OSS = {"activation": "clamped_swiglu"}
MARGINS = ("sm_margin", "int >= 0", "'forward', 'backward', 'inference'")
CASES = [  # layers, sizes, arguments, error, parts of its message
    (LINEARS, (0, 16), {}, ValueError, ("in_features", "at least 1", 0)),
    (LINEARS, (-16, 16), {}, ValueError, ("in_features", "at least 1", -16)),
    (LINEARS, (16.0, 16), {}, TypeError, ("in_features", "int", "float", 16.0)),
    (LINEARS, (16, 0), {}, ValueError, ("out_features", "at least 1", 0)),
    (LINEARS, (16, "16"), {}, TypeError, ("out_features", "int", "str", "'16'")),
    (("LayerNormMLP",), (0, 16), {}, ValueError, ("hidden_size", "at least 1", 0)),
    (("LayerNormMLP",), (True, 16), {}, TypeError, ("hidden_size", "int", "bool")),
    (("LayerNormMLP",), (16, 0), {}, ValueError, ("ffn_hidden_size", "at least 1", 0)),
    (("LayerNormMLP",), (16, None), {}, TypeError, ("ffn_hidden_size", "int", "NoneType")),
    (NORMS, (), {}, TypeError, ("normalized_shape", "last dimension")),
    (NORMS, (0,), {}, ValueError, ("normalized_shape", "at least 1", 0)),
    (NORMS, ((4, -3),), {}, ValueError, ("normalized_shape", "at least 1", -3)),
    (NORMS, (8.0,), {}, TypeError, ("normalized_shape", "int", "float", 8.0)),
    (NORMS, ((),), {}, ValueError, ("normalized_shape", "at least one dimension", ())),
    *(
        (layers, sizes, {"eps": eps}, ValueError, ("eps", "> 0", repr(eps)))
        for layers, sizes in ((FUSED_NORMS, (16, 16)), (NORMS, (16,)))
        for eps in (0, -1e-5, float("nan"), float("inf"), "1", None)
    ),
    *(
        (NORMS, (16,), {"sm_margin": margin}, ValueError, (*MARGINS, margin))
        for margin in (-1, 1.5, True, "8", None, {"forward": -1}, {"fwd": 8}, {"backward": 1.5})
    ),
    (FUSED_NORMS, (16, 16), {"normalization": "BatchNorm"}, ValueError, ("normalization", "'LayerNorm', 'RMSNorm'", "'BatchNorm'")),
    (LINEARS, (16, 16), {"parallel_mode": "diagonal"}, ValueError, ("parallel_mode", "'column', 'row'", "'diagonal'")),
    (("LayerNormLinear",), (16, 16), {"parallel_mode": "row"}, NotImplementedError, ("parallel_mode='row'", '"column" or None')),
    *(
        (("LayerNormMLP",), (16, 16), {"activation": name}, ValueError, ("activation", "'gelu'", "'clamped_swiglu'", repr(name)))
        for name in ("tanh", "GELU", None, 3)
    ),
    (
        ("LayerNormMLP",),
        (16, 16),
        {"activation_params": {"limit": 1.0}},
        ValueError,
        ("activation_params", "'clamped_swiglu' only", "'gelu'"),
    ),
    *(
        (("LayerNormMLP",), (16, 16), {**GPT_OSS, "activation_params": params}, error, ("activation_params", *parts))
        for params, error, parts in (
            ({"beta": 1.0}, ValueError, ("'limit', 'alpha'", "'beta'")),
            ({"limit": "7"}, TypeError, ("'limit'", "number", "'7'")),
            ({"alpha": True}, TypeError, ("'alpha'", "number", "True")),
            ({"alpha": float("nan")}, TypeError, ("'alpha'", "finite", "nan")),
            ({"limit": 0.0}, ValueError, ("'limit'", "above 0", 0.0)),
            ({"limit": -7}, ValueError, ("'limit'", "above 0", -7)),
            ([7.0], TypeError, ("dict", "limit", "alpha", [7.0])),
        )
    ),
    *(
        (LINEARS, (16, 16), {"parameters_split": split}, error, ("parameters_split", *parts))
        for split, error, parts in (
            (("q", "k", "v"), ValueError, ("3 names", "out_features=16", "dict of sizes")),
            (("q", "q"), ValueError, ("distinct", "out_features=16")),
            (("q", "q_"), ValueError, ("distinct", "out_features=16")),
            ((), ValueError, ("out_features=16", "()")),
            ({}, ValueError, ("out_features=16", "{}")),
            ({"q": 8, "k": 4}, ValueError, ("add up to out_features=16", "'k': 4")),
            ({"q": 16, "k": 0}, ValueError, ("'k'", "at least 1", 0)),
            ({"q": 24, "k": -8}, ValueError, ("'k'", "at least 1", -8)),
            ({"q": 8.0, "k": 8}, TypeError, ("'q'", "int", 8.0)),
            ("qk", TypeError, ("tuple of names", "dict", "'qk'")),
            (2, TypeError, ("tuple of names", "dict", 2)),
            ((8, 8), TypeError, ("tuple of names", "dict", (8, 8))),
        )
    ),
]


@pytest.mark.parametrize(
    ("layer", "sizes", "arguments", "error", "parts"), [(layer, *case) for names, *case in CASES for layer in names]
)
def test_construction(layer, sizes, arguments, error, parts, device):
    with refuses(error, f"{layer}: ", *parts):
        getattr(te, layer)(*sizes, device=device, **arguments)


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", [te.autocast, te.fp8_autocast])
@pytest.mark.parametrize("recipe", ["delayed", DelayedScaling, 3, {"margin": 0}])
def test_a_recipe_that_is_none(recipe, entry, device):
    name = "recipe" if entry is te.autocast else "fp8_recipe"
    with refuses(TypeError, "recipe", "DelayedScaling()", type(recipe).__name__), entry(**{name: recipe}):
        pass


@pytest.mark.parametrize("recipe", [MXFP8BlockScaling(), NVFP4BlockScaling()])
def test_recipes_that_are_not_built_refuse_when_used_and_only_then(recipe, device):
    with te.autocast(enabled=False, recipe=recipe):
        build("Linear", device)(features(16, device=device))
    remedy = "DelayedScaling, Float8CurrentScaling or Float8BlockScaling"
    with refuses(NotImplementedError, type(recipe).__name__, "not built", remedy), te.autocast(recipe=recipe):
        pass


@pytest.mark.parametrize("name", ["fp8_dpa", "fp8_mha"])
@pytest.mark.parametrize("kind", [DelayedScaling, Float8CurrentScaling, Float8BlockScaling])
def test_fp8_attention(kind, name, device):
    with refuses(NotImplementedError, kind.__name__, f"{name}=True", f"use {name}=False"), te.autocast(recipe=kind(**{name: True})):
        pass


def test_a_refused_recipe_leaves_no_autocast_behind(device):
    linear, x = build("Linear", device), features(16, device=device)
    expected = linear(x)
    with pytest.raises(TypeError), te.autocast(recipe="delayed"):
        pass
    assert torch.equal(linear(x), expected)


@pytest.mark.parametrize("build", [lambda: te.Linear(16, 16, bias=False), lambda: te.LayerNormLinear(16, 16, bias=False)])
def test_a_bias_given_to_a_layer_without_one_is_refused(build):
    layer = build()
    with pytest.raises(ValueError, match=r"\.bias was assigned, but the layer adds none; build it with bias=True"):
        layer.bias = torch.nn.Parameter(torch.zeros(16))
