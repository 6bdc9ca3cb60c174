"""LayerNormLinear: numbers of every norm, what it returns and in which order, the residual around it, parameters."""

from __future__ import annotations

import itertools

import pytest
import torch

import overdrive.pytorch as te
from tests.modules.layer_oracle import IN, OUT, TOKENS, assert_same_step, build, check, features, formula_of, step
from tests.numerics import RECIPES, assert_same_bits

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
recipes = pytest.mark.parametrize("recipe", RECIPES)


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
@recipes
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients(dtype, recipe, normalization, zero_centered, device):
    module = build("LayerNormLinear", device, dtype, normalization=normalization, zero_centered_gamma=zero_centered)
    check(module, features(*TOKENS, dtype=dtype, device=device), recipe)


@pytest.mark.parametrize(("bias", "return_bias", "return_norm"), [*itertools.product([True, False], repeat=3)])
@recipes
def test_what_is_returned_and_the_gradients_through_all_of_it(recipe, bias, return_bias, return_norm, device):
    module = build("LayerNormLinear", device, bias=bias, return_bias=return_bias, return_layernorm_output=return_norm)
    x = features(*TOKENS, device=device)
    if bias or not return_bias:
        result = check(module, x, recipe)
        sizes = [OUT] + [OUT] * return_bias + [IN] * return_norm
        assert [output.shape[-1] for output in result.outputs] == sizes
    outputs = module(x)
    assert isinstance(outputs, tuple) == (return_bias or return_norm)
    if return_bias:
        assert (outputs[1] is None) == (not bias)


EVERYTHING = {"return_bias": True, "return_layernorm_output": True}


@pytest.mark.parametrize("arguments", [{}, EVERYTHING, {"parameters_split": ("q", "k")}])
@recipes
def test_forward_with_residual_is_forward_and_its_input(recipe, arguments, device):
    module = build("LayerNormLinear", device, torch.bfloat16, **arguments)
    x = features(*TOKENS, dtype=torch.bfloat16, device=device)
    plain = formula_of(module)
    result = check(module, x, recipe, lambda x, p: (*plain(x, p), x), module.forward_with_residual)
    assert_same_bits(result.outputs[-1], x)


@recipes
def test_an_unused_output_adds_nothing_to_the_gradients(recipe, device):
    module = build("LayerNormLinear", device, return_layernorm_output=True)
    x = features(*TOKENS, device=device)

    def only_product(x):
        return module(x)[0]

    def only_norm(x):
        return module(x)[1]

    plain = formula_of(module)
    check(module, x, recipe, lambda x, p: plain(x, p)[:1], only_product)
    check(module, x, recipe, lambda x, p: plain(x, p)[1:], only_norm)


def test_eps_is_added_to_the_variance(device):
    check(build("LayerNormLinear", device, eps=0.7), features(*TOKENS, device=device))


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_parameters_of_the_norm(normalization, zero_centered, device):
    module = te.LayerNormLinear(IN, OUT, normalization=normalization, zero_centered_gamma=zero_centered, device=device)
    biased = normalization == "LayerNorm"
    assert sorted(module.state_dict()) == sorted(["layer_norm_weight", "weight", "bias"] + ["layer_norm_bias"] * biased)
    assert (module.layer_norm_weight == (0 if zero_centered else 1)).all()
    assert module.layer_norm_weight.shape == (IN,)
    assert module.layer_norm_weight.sequence_parallel is False
    assert not module.layer_norm_bias.any() if biased else module.layer_norm_bias is None
    assert module.weight.std().item() == pytest.approx(0.023, rel=0.15)
    assert not module.bias.any()


@recipes
def test_a_norm_kept_in_float32_beside_bf16_weights(recipe, device):
    module = build("LayerNormLinear", device, torch.bfloat16)
    for name in ("layer_norm_weight", "layer_norm_bias"):
        getattr(module, name).data = getattr(module, name).data.float()
    result = check(module, features(*TOKENS, dtype=torch.bfloat16, device=device), recipe)
    assert result.grads["layer_norm_weight"].dtype == torch.float32


@recipes
def test_equals_a_norm_and_a_linear_in_a_row(recipe, device):
    """Fusing saves memory traffic; in float32 it changes the result by rounding alone, and only in the gradients' sums."""
    fused = build("LayerNormLinear", device)
    layer_norm, linear = te.LayerNorm(IN, device=device), te.Linear(IN, OUT, device=device)
    names = {"weight": "weight", "bias": "bias"}
    linear.load_state_dict({name: getattr(fused, name) for name in names})
    layer_norm.load_state_dict({name: getattr(fused, f"layer_norm_{name}") for name in names})
    pair = torch.nn.Sequential(layer_norm, linear)
    x = features(*TOKENS, device=device)
    for _ in range(2):
        actual, expected = step(fused, x, recipe), step(pair, x, recipe)
    rename = {"input": "input", **{f"layer_norm_{n}": f"0.{n}" for n in names}, **{n: f"1.{n}" for n in names}}
    torch.testing.assert_close(actual.outputs, expected.outputs, rtol=1e-5, atol=1e-5)
    for mine, theirs in rename.items():
        torch.testing.assert_close(actual.grads[mine], expected.grads[theirs], rtol=1e-5, atol=1e-5)


def test_two_identical_steps_agree_bit_for_bit(device):
    module = build("LayerNormLinear", device, torch.bfloat16)
    x = features(*TOKENS, dtype=torch.bfloat16, device=device)
    assert_same_step(step(module, x, "current"), step(module, x, "current"))
