"""LayerNormMLP: every activation and norm, what it returns, checkpoint, the residual around it and the one before it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import overdrive.pytorch as te
from overdrive.functional.residual import bias_dropout_add
from overdrive.modules.multihead_attention import with_residual
from tests.modules.layer_oracle import (
    ACTIVATIONS,
    FFN,
    IN,
    TOKENS,
    assert_same_step,
    build,
    check,
    clamped_swiglu,
    features,
    formula_of,
    step,
    tuple_of,
)
from tests.numerics import RECIPES, assert_close, assert_same_bits

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
recipes = pytest.mark.parametrize("recipe", RECIPES)
GATED = {"geglu", "qgeglu", "reglu", "sreglu", "swiglu", "glu", "clamped_swiglu"}
KINKED = {"relu", "reglu"}


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@recipes
def test_every_activation(recipe, activation, device):
    module = build("LayerNormMLP", device, torch.bfloat16, activation=activation)
    check(module, features(*TOKENS, dtype=torch.bfloat16, device=device), recipe, kinks=activation in KINKED)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_in_float32(activation, device):
    check(build("LayerNormMLP", device, activation=activation), features(*TOKENS, device=device))


@pytest.mark.parametrize("params", [{"limit": 2.5}, {"alpha": 0.5}, {"limit": 2, "alpha": 3}])
@recipes
def test_activation_params(recipe, params, device):
    module = build("LayerNormMLP", device, activation="clamped_swiglu", activation_params=params)
    x = features(*TOKENS, device=device)
    formula = formula_of(module, clamped_swiglu(**params))
    check(module, x, recipe, formula, kinks=recipe != "plain")
    with pytest.raises(AssertionError, match="relative error"):
        check(module, x, recipe)  # the defaults would be seen


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
@recipes
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_and_dtypes(dtype, recipe, normalization, zero_centered, device):
    module = build("LayerNormMLP", device, dtype, normalization=normalization, zero_centered_gamma=zero_centered)
    check(module, features(*TOKENS, dtype=dtype, device=device), recipe)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize(("bias", "return_bias", "return_norm"), [*itertools.product([True, False], repeat=3)])
@recipes
def test_what_is_returned_and_the_gradients_through_all_of_it(recipe, bias, return_bias, return_norm, checkpoint, device):
    arguments = {"bias": bias, "return_bias": return_bias, "return_layernorm_output": return_norm, "checkpoint": checkpoint}
    module = build("LayerNormMLP", device, activation="swiglu", **arguments)
    x = features(*TOKENS, device=device)
    if bias or not return_bias:
        result = check(module, x, recipe)
        assert [tuple(output.shape) for output in result.outputs] == [x.shape] + [(IN,)] * return_bias + [x.shape] * return_norm
    outputs = module(x)
    assert isinstance(outputs, tuple) == (return_bias or return_norm)
    if return_bias:
        assert (outputs[1] is None) == (not bias)


# --- checkpoint -------------------------------------------------------------------------------------------------------


METHODS = ("forward", "forward_with_residual", "forward_fused_residual", "forward_between_residuals")


@pytest.mark.parametrize("method", METHODS)
@recipes
def test_checkpoint_changes_no_bit_and_keeps_only_its_inputs(recipe, method, device):
    arguments = {"return_bias": True, "return_layernorm_output": True, "activation": "geglu"}
    modules = [build("LayerNormMLP", device, torch.bfloat16, checkpoint=c, **arguments) for c in (False, True)]
    modules[1].load_state_dict(modules[0].state_dict())
    x = features(*TOKENS, dtype=torch.bfloat16, device=device)
    residual = features(*TOKENS, dtype=torch.bfloat16, device=device)
    bias = features(dtype=torch.bfloat16, device=device)
    more = {"forward_fused_residual": (bias, residual, 0.3), "forward_between_residuals": (residual, 0.3)}.get(method, ())
    kept = []
    for _ in range(3):  # delayed scaling: the amaxes that one step records are the next one's scales
        steps, sizes = [], []
        for module in modules:
            bias.grad = residual.grad = None
            parameters = {p.untyped_storage().data_ptr() for p in (*module.parameters(), x, bias, residual)}
            saved = []

            def pack(t, saved=saved, parameters=parameters):
                saved.append(0 if t.untyped_storage().data_ptr() in parameters else t.numel())
                return t

            def call(x, module=module, pack=pack):
                torch.manual_seed(5)
                with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                    return getattr(module, method)(x, *more)

            result = step(module, x, recipe, call)
            steps.append(result._replace(grads={**result.grads, "bias": bias.grad, "residual": residual.grad}))
            sizes.append(sum(saved))
        assert_same_step(steps[1], steps[0])
        kept = sizes
    assert kept[1] < 16 < kept[0]


def test_checkpoint_recomputes_under_torchs_autocast(device):
    module = build("LayerNormMLP", device, checkpoint=True)
    with torch.autocast(device, torch.bfloat16):
        check(module, features(*TOKENS, device=device), dtype=torch.bfloat16)


# --- residuals --------------------------------------------------------------------------------------------------------

OPTIONS = ({}, {"return_bias": True}, {"return_bias": True, "return_layernorm_output": True}, {"normalization": "RMSNorm"})


@pytest.mark.parametrize("options", OPTIONS)
@recipes
def test_forward_with_residual_is_forward_and_its_input(recipe, options, device):
    module = build("LayerNormMLP", device, torch.bfloat16, **options)
    x = features(*TOKENS, dtype=torch.bfloat16, device=device)
    plain = formula_of(module)
    result = check(module, x, recipe, lambda x, p: (*plain(x, p), x), module.forward_with_residual)
    assert_same_bits(result.outputs[-1], x)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("options", OPTIONS)
@recipes
def test_forward_fused_residual_is_dropout_add_and_forward(recipe, options, p, biased, device):
    """The mask that the returned residual shows is the one that the gradients of x and bias saw."""
    module = build("LayerNormMLP", device, **options)
    x, residual = features(*TOKENS, device=device), features(*TOKENS, device=device)
    bias = features(device=device) if biased else None
    extra = {"residual": residual} | ({"bias": bias} if biased else {})
    for tensor in extra.values():
        tensor.grad = None
    factor = None

    def call(x):
        nonlocal factor
        for tensor in extra.values():
            tensor.grad = None
        outputs = module.forward_fused_residual(x, bias, residual, p)
        dropped = (outputs[-1] == residual).cpu()
        assert dropped.double().mean().item() == pytest.approx(p, abs=0.06)
        factor = torch.where(dropped, 0.0, 1 / (1 - p)).double()
        return outputs

    others = {name: tensor.detach().cpu().double().requires_grad_() for name, tensor in extra.items()}
    plain = formula_of(module)

    def formula(x, parameters):
        added = x + others["bias"] if biased else x
        hidden = others["residual"] + factor * added
        return (*plain(hidden, parameters), hidden)

    check(module, x, recipe, formula, call)
    for name, tensor in extra.items():
        assert_close(tensor.grad, others[name].grad, torch.float32, recipe, f"gradient of {name}", 5)


@pytest.mark.parametrize("options", OPTIONS)
@recipes
def test_forward_between_residuals_is_both_sums(recipe, options, device):
    module = build("LayerNormMLP", device, torch.bfloat16, **options)
    x, residual = (features(*TOKENS, dtype=torch.bfloat16, device=device) for _ in range(2))
    other = residual.detach().cpu().double().requires_grad_()
    plain = formula_of(module)

    def formula(x, parameters):
        hidden = other + x
        out, *rest = plain(hidden, parameters)
        return (hidden + out, *rest)

    def call(x):
        residual.grad = None
        return module.forward_between_residuals(x, residual)

    result = check(module, x, recipe, formula, call)
    assert_close(residual.grad, other.grad, torch.bfloat16, recipe, "gradient of residual", 5)
    apart, hidden = module.forward_fused_residual(x, None, residual, 0.0)
    assert len(tuple_of(apart)) == len(result.outputs)
    assert hidden.shape == x.shape


@pytest.mark.parametrize("p", [0.0, 0.4])
@recipes
def test_forward_between_residuals_gives_the_bits_of_the_sums_apart(recipe, p, device):
    """Below the size from which a kernel rounds once; the gradient of fc2's bias is rounded once where something drops."""
    modules = [build("LayerNormMLP", device, torch.bfloat16) for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())
    x, residual = (features(*TOKENS, dtype=torch.bfloat16, device=device) for _ in range(2))

    def apart(x):
        out, hidden = modules[1].forward_fused_residual(x, None, residual, p)
        return bias_dropout_add(out, None, hidden, p)

    steps = []
    for module, call in ((modules[0], lambda x: modules[0].forward_between_residuals(x, residual, p)), (modules[1], apart)):
        torch.manual_seed(4)
        for _ in range(2):
            residual.grad = None
            result = step(module, x, recipe, call)
        steps.append(result._replace(grads={**result.grads, "residual": residual.grad}))
    if p:
        biases = [result.grads.pop("fc2_bias") for result in steps]
        assert_close(biases[0], biases[1].cpu().double(), torch.bfloat16, what="gradient of fc2_bias")
    assert_same_step(*steps)


def test_dropout_around_it_is_off_in_evaluation(device):
    module = build("LayerNormMLP", device)
    x, residual = features(*TOKENS, device=device), features(*TOKENS, device=device)
    first, second = (module.forward_between_residuals(x, residual, 0.5) for _ in range(2))
    assert not torch.equal(first, second)
    module.eval()
    plain = module.forward_between_residuals(x, residual, 0.0)
    assert_same_bits(module.forward_between_residuals(x, residual, 0.5), plain)


def test_dropout_before_the_norm_is_off_in_evaluation_and_new_each_time_in_training(device):
    module = build("LayerNormMLP", device)
    x, residual = features(*TOKENS, device=device), features(*TOKENS, device=device)

    def hidden():
        return module.forward_fused_residual(x, None, residual, 0.5)[1]

    assert not torch.equal(hidden(), hidden())
    module.eval()
    torch.testing.assert_close(hidden(), residual + x)


@pytest.mark.parametrize("frozen", [{"x"}, {"residual"}, {"bias"}, {"x", "residual"}, {"x", "residual", "bias", "parameters"}])
def test_fused_residual_with_frozen_inputs(frozen, device):
    module = build("LayerNormMLP", device)
    inputs = {"x": features(*TOKENS, device=device), "bias": features(device=device), "residual": features(*TOKENS, device=device)}

    def run(frozen):
        module.requires_grad_("parameters" not in frozen)
        for name, tensor in inputs.items():
            tensor.requires_grad_(name not in frozen)
            tensor.grad = None
        torch.manual_seed(3)
        outputs = tuple_of(module.forward_fused_residual(*inputs.values(), 0.2))
        if outputs[0].requires_grad:
            torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
        return {name: tensor.grad for name, tensor in inputs.items()}

    expected = run(set())
    for name, grad in run(frozen).items():
        if name in frozen:
            assert grad is None
        else:
            assert_same_bits(grad, expected[name], name)


@recipes
def test_hooks_are_called_where_a_layer_above_fuses_the_residual(recipe, device):
    module = build("LayerNormMLP", device)
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    x = features(*TOKENS, device=device)
    check(module, x, recipe, lambda x, p: (*formula_of(module)(x, p), x), lambda x: with_residual(module, x))
    assert len(calls) == (2 if recipe == "delayed" else 1)


# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_names_and_shapes(activation, device):
    module = te.LayerNormMLP(IN, FFN, activation=activation, device=device, params_dtype=torch.bfloat16)
    rows = 2 * FFN if activation in GATED else FFN
    shapes = {
        "layer_norm_weight": (IN,),
        "layer_norm_bias": (IN,),
        "fc1_weight": (rows, IN),
        "fc1_bias": (rows,),
        "fc2_weight": (IN, FFN),
        "fc2_bias": (IN,),
    }
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == shapes
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


def test_without_bias_the_attributes_stay_readable(device):
    module = te.LayerNormMLP(IN, FFN, bias=False, normalization="RMSNorm", device=device)
    assert sorted(module.state_dict()) == ["fc1_weight", "fc2_weight", "layer_norm_weight"]
    assert module.fc1_bias.numel() == module.fc2_bias.numel() == 0


@pytest.mark.parametrize("zero_centered", [False, True])
def test_initialisation(zero_centered, device):
    module = te.LayerNormMLP(256, 512, zero_centered_gamma=zero_centered, device=device)
    for name in ("fc1", "fc2"):
        weight = getattr(module, f"{name}_weight")
        assert weight.std().item() == pytest.approx(0.023, rel=0.02)
        assert not getattr(module, f"{name}_bias").any()
        assert (weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride) == (True, int(name == "fc2"), 1)
    assert (module.layer_norm_weight == (0 if zero_centered else 1)).all()
    assert not module.layer_norm_bias.any()


@pytest.mark.parametrize(("one", "two", "expected"), [(1, 2, (1, 2)), (None, 2, (None, 2)), (1, None, (1, None))])
def test_init_methods_serve_fc1_and_the_output_layer(one, two, expected, device):
    methods = [None if value is None else lambda w, v=value: nn.init.constant_(w, v) for value in (one, two)]
    module = te.LayerNormMLP(IN, FFN, init_method=methods[0], output_layer_init_method=methods[1], device=device)
    for weight, value in zip((module.fc1_weight, module.fc2_weight), expected):
        if value is None:
            assert weight.std().item() == pytest.approx(0.023, rel=0.15)
        else:
            assert (weight == value).all()


def test_weights_given_to_it_are_shared(device):
    module, other = build("LayerNormMLP", device), build("LayerNormMLP", device)
    for name in ("fc1_weight", "fc2_weight", "layer_norm_weight"):
        setattr(module, name, getattr(other, name))
    x = features(*TOKENS, device=device)
    check(module, x)
    assert module.fc1_weight.grad is other.fc1_weight.grad
