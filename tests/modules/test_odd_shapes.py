"""Any leading dimensions, no tokens, one token, counts that FP8 GEMMs do not take, strides of every kind: all just work."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import overdrive.pytorch as te
from tests.modules.layer_oracle import FFN, IN, OUT, TOKENS, build, check, features, formula_of, fp8, gradients_like, norm, step
from tests.numerics import LAYOUTS, RECIPES, layout, relative_error

LAYERS = ("Linear", "LayerNormLinear", "LayerNormMLP")
layers = pytest.mark.parametrize("layer", LAYERS)
recipes = pytest.mark.parametrize("recipe", RECIPES)
LEADS = ((), (1,), (7,), (1, 1, 1, 5), (2, 3, 4), (0,), (2, 0), (0, 3))


class said:
    """Collects the warnings of a block; any other than ours is raised."""

    def __enter__(self):
        self._recorder = warnings.catch_warnings(record=True)
        self._caught = self._recorder.__enter__()
        warnings.simplefilter("always")
        return self

    def __exit__(self, *exception):
        self._recorder.__exit__(*exception)
        self.texts = [str(warning.message) for warning in self._caught]
        assert all("FP8 GEMMs need" in text for text in self.texts), self.texts
        assert all(warning.category is UserWarning for warning in self._caught)


@pytest.mark.parametrize("lead", LEADS)
@layers
@recipes
def test_any_leading_dimensions(recipe, layer, lead, device):
    module = build(layer, device)
    x = features(*lead, device=device)
    with said() as warned:
        result = check(module, x, recipe)
    assert result.outputs[0].shape == (*lead, IN if layer == "LayerNormMLP" else OUT)
    tokens = x.numel() // IN
    assert len(warned.texts) == (recipe != "plain" and tokens % 16 != 0)
    if tokens == 0:
        assert not any(grad.any() for grad in result.grads.values())


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_any_leading_dimensions_of_the_norms(kind, lead, device):
    module = getattr(te, kind)(IN, device=device)
    check(module, features(*lead, device=device),
          formula=lambda x, p: (norm(x, p["weight"], p.get("bias"), kind == "RMSNorm"),))  # fmt: skip


@layers
@pytest.mark.parametrize("recipe", ["delayed", "current", "block"])
def test_a_call_without_tokens_leaves_the_scales_sound(recipe, layer, device):
    module = build(layer, device)
    x, nothing = features(*TOKENS, device=device), features(0, device=device)
    step(module, nothing, recipe)
    check(module, x, recipe)
    step(module, nothing, recipe)
    check(module, x, recipe)


@layers
@pytest.mark.parametrize("recipe", ["delayed", "current", "block"])
def test_padding_is_said_once_with_the_layer_the_count_and_the_remedy(recipe, layer, device):
    module = build(layer, device, name="encoder.3")
    with said() as warned:
        for tokens in (21, 16, 5, 21):
            check(module, features(tokens, device=device), recipe)
    assert len(warned.texts) == 1
    for part in (f"{layer} 'encoder.3'", "divisible by 16", "got 21", "padded to 32", "Use a batch x sequence divisible by 16"):
        assert part in warned.texts[0]


@pytest.mark.parametrize("sizes", [(50, 32), (48, 33), (17, 15), (7, 130)])
@layers
@recipes
def test_features_that_fp8_does_not_take_run_in_high_precision_and_say_so_once(recipe, layer, sizes, device):
    module = getattr(te, layer)(*sizes, device=device)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_((torch.randn(parameter.shape) * 0.2).to(parameter))
    inputs = [(torch.randn(*lead, sizes[0]) + 0.5).to(device).requires_grad_() for lead in ((16,), (3, 5))]
    if layer != "Linear" and sizes[0] < 50:
        inputs = [x.detach() for x in inputs]  # over few features dx is what rounding leaves of a difference
    with said() as warned:
        for x in inputs:
            with fp8(recipe):
                check(module, x, formula=formula_of(module))
    assert len(warned.texts) == (recipe != "plain")
    for text in warned.texts:
        for part in (layer, f"{sizes[0]} x {sizes[1]}", "divisible by 16", "high precision", "Round its sizes up"):
            assert part in text


@layers
def test_one_feature(layer, device):
    module = getattr(te, layer)(1, 1, device=device)
    x = torch.randn(5, 1).to(device)
    p64 = {name: p.detach().cpu().double() for name, p in module.named_parameters()}
    assert relative_error(module(x), formula_of(module)(x.cpu().double(), p64)[0]) < 1e-5


def test_each_layer_warns_for_itself(device):
    first, second = te.Linear(IN, 33, device=device), te.Linear(33, OUT, device=device)
    with said() as warned, fp8("current"):
        for _ in range(2):
            second(first(features(16, device=device)))
    assert [f"{IN} x 33" in text for text in warned.texts] == [True, False]
    assert [f"33 x {OUT}" in text for text in warned.texts] == [False, True]


@pytest.mark.parametrize("kind", LAYOUTS)
@layers
@recipes
def test_inputs_of_any_strides(recipe, layer, kind, device):
    x = layout(features(32, device=device).detach(), kind).requires_grad_()
    check(build(layer, device), x, recipe)


@pytest.mark.parametrize("kind", LAYOUTS)
@layers
@recipes
def test_gradients_of_any_strides(recipe, layer, kind, device):
    module = build(layer, device)
    x = features(32, device=device)
    with fp8(recipe):
        output = module(x)
    grad = layout(gradients_like((output,))[0], kind)
    assert grad.shape == output.shape
    leaves = [x, *module.parameters()]
    strided, contiguous = (torch.autograd.grad(output, leaves, dy, retain_graph=True) for dy in (grad, grad.contiguous()))
    for name, a, b in zip(("input", *dict(module.named_parameters())), strided, contiguous):
        assert relative_error(a, b) < 1e-6, name  # sums may take another order


@layers
@recipes
def test_the_gradient_of_a_sum_and_an_expanded_input(recipe, layer, device):
    """y.sum() sends a gradient of stride 0; the expanded input's base collects the gradients of all its copies."""
    module = build(layer, device)
    base = features(1, device=device)
    with fp8(recipe):
        output = module(base.expand(32, IN))
    output.sum().backward()
    base64 = base.detach().cpu().double().requires_grad_()
    p64 = {name: p.detach().cpu().double().requires_grad_() for name, p in module.named_parameters()}
    formula_of(module)(base64.expand(32, IN), p64)[0].sum().backward()
    tolerance = 1e-5 if recipe == "plain" else 0.5  # one row rounds one way in all its copies
    assert relative_error(base.grad, base64.grad) < tolerance
    last = list(p64)[-1]
    assert relative_error(dict(module.named_parameters())[last].grad, p64[last].grad) < 1e-2


@pytest.mark.parametrize("layer", ["Linear", "LayerNormLinear"])
def test_a_transposed_view_of_a_batch(layer, device):
    """[batch, sequence] seen as [sequence, batch], as attention's formats do."""
    x = features(3, 16, device=device).detach().transpose(0, 1).requires_grad_()
    for recipe in RECIPES:
        check(build(layer, device), x, recipe)


@given(
    layer=st.sampled_from(LAYERS),
    recipe=st.sampled_from([*RECIPES]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    tokens=st.integers(2, 70),
    blocks=st.tuples(st.integers(2, 18), st.integers(2, 18)),
    kind=st.sampled_from(LAYOUTS),
    biased=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_anything(layer, recipe, dtype, tokens, blocks, kind, biased, seed, device):
    torch.manual_seed(seed)
    sizes = [16 * count for count in blocks]
    module = getattr(te, layer)(*sizes, bias=biased, device=device, params_dtype=dtype)
    x = layout(features(tokens, size=sizes[0], dtype=dtype, device=device).detach(), kind).requires_grad_()
    with said():
        check(module, x, recipe)


def test_the_mlp_hides_no_size(device):
    """hidden and ffn are told apart: swapping them changes every shape."""
    module = te.LayerNormMLP(IN, FFN, activation="glu", device=device)
    assert module(features(3, device=device)).shape == (3, IN)
    assert (module.fc1_weight.shape, module.fc2_weight.shape) == ((2 * FFN, IN), (IN, FFN))
