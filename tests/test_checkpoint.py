"""Activation checkpointing: the bits of keeping everything, in gradients and in scaling state, wherever the autocast stands."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, create_selective_checkpoint_contexts

import overdrive.pytorch as te
from overdrive.scaling.autocast import OFF, STATE
from tests.steps import RECIPES, assert_same, batch, fp8, stack, states, train

CHECKPOINTS = {
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "not_reentrant": functools.partial(checkpoint, use_reentrant=False),
    "te_reentrant": te.checkpoint,
    "te_not_reentrant": functools.partial(te.checkpoint, use_reentrant=False),
}
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # a reentrant checkpoint in another
METHODS = list(CHECKPOINTS)[:2]
LAYERS = ("linear", "layernorm_linear", "layernorm_mlp", "transformer_layer")
FP8 = [name for name in RECIPES if name != "plain"]


def keep(function, *args):
    """Instead of a checkpoint."""
    return function(*args)


def around_all(layers, x, save, recipe):
    with fp8(recipe):
        return save(layers, x)


def around_each(layers, x, save, recipe):
    with fp8(recipe):
        for layer in layers:
            x = save(layer, x)
    return x


def inside_all(layers, x, save, recipe):
    return save(lambda x: around_all(layers, x, keep, recipe), x)


def inside_each(layers, x, save, recipe):
    for layer in layers:
        x = save(lambda x, layer=layer: around_all(layer, x, keep, recipe), x)
    return x


def inside_and_around(layers, x, save, recipe):
    with fp8(recipe):
        return inside_each(layers, x, save, recipe)


def off_inside(layers, x, save, recipe):
    def body(x):
        with te.autocast(enabled=False):
            x = layers[0](x)
        return layers[1:](x)

    with fp8(recipe):
        return save(body, x)


def several_inside_one(layers, x, save, recipe):
    return save(lambda x: inside_each(layers, x, keep, recipe), x)


def nested(layers, x, save, recipe):
    with fp8(recipe):
        return save(lambda x: around_each(layers, x, save, recipe), x)


def every_other(layers, x, save, recipe):
    with fp8(recipe):
        for number, layer in enumerate(layers):
            x = save(layer, x) if number % 2 else layer(x)
    return x


PLACES = [around_all, around_each, inside_all, inside_each, inside_and_around, off_inside, several_inside_one, nested, every_other]


@pytest.fixture(autouse=True)
def _leaves_no_autocast():
    yield
    assert STATE.context is OFF


def assert_transparent(device, call, names=LAYERS, steps=4, methods=METHODS):
    """call(layers, x, save) gives the same whatever `save` is."""
    kept = stack(*names, device=device)
    expected = train(kept, lambda x: call(kept, x, keep), steps)
    for method in methods:
        saved, save = stack(*names, device=device), CHECKPOINTS[method]
        assert_same(train(saved, lambda x, saved=saved, save=save: call(saved, x, save), steps), expected)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("place", PLACES)
def test_gradients_and_scales_are_those_of_keeping_everything(device, place, recipe):
    assert_transparent(device, lambda layers, x, save: place(layers, x, save, RECIPES[recipe]), methods=CHECKPOINTS)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("place", [around_all, around_each, inside_all, nested])
def test_a_layer_that_checkpoints_itself(device, place, recipe):
    names = ["linear", "checkpointing_mlp", "layernorm_linear", "checkpointing_mlp"]
    assert_transparent(device, lambda layers, x, save: place(layers, x, save, RECIPES[recipe]), names)


@pytest.mark.parametrize("recipe", FP8)
def test_dropout_in_between(device, recipe):
    def call(layers, x, save):
        def body(x):
            for layer in layers:
                x = torch.nn.functional.dropout(layer(x), 0.3)
            return x

        return around_all(body, x, save, RECIPES[recipe])

    assert_transparent(device, call)


@pytest.mark.parametrize("recipe", FP8)
def test_is_first_microbatch(device, recipe):
    def call(layers, x, save):
        for first in (True, False):
            x = around_all(lambda x, first=first: layers[0](x, is_first_microbatch=first), x, save, RECIPES[recipe])
        return x

    assert_transparent(device, call, ["layernorm_linear"])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["forward", "reversed"])
@pytest.mark.parametrize("recipes", [("delayed", "delayed"), ("delayed", "current"), ("block", "plain")], ids="-".join)
@pytest.mark.parametrize("place", [around_each, inside_each])
@pytest.mark.parametrize("method", METHODS)
def test_two_forwards_before_two_backwards(device, method, place, recipes, order):
    def run(save):
        layers = stack(*LAYERS, device=device)
        results = []
        for number in range(3):
            inputs = [batch(2 * number + i, device) for i in range(2)]
            torch.manual_seed(number)
            outputs = [place(layers, x, save, RECIPES[recipe]) for x, recipe in zip(inputs, recipes)]
            layers.zero_grad()
            for i in order:
                outputs[i].float().square().sum().backward()
            gradients = {name: parameter.grad.clone() for name, parameter in layers.named_parameters()}
            results.append({"x0": inputs[0].grad, "x1": inputs[1].grad, **gradients, **states(layers)})
        return results

    assert_same(run(CHECKPOINTS[method]), run(keep))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("place", [around_all, inside_all, inside_each])
def test_two_backwards_of_one_forward(device, place, recipe):
    def run(save):
        layers, x = stack(*LAYERS, device=device), batch(0, device)
        torch.manual_seed(0)
        loss = place(layers, x, save, RECIPES[recipe]).float().square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        return {"dx": x.grad, **{name: p.grad for name, p in layers.named_parameters()}, **states(layers)}

    assert_same(run(CHECKPOINTS["not_reentrant"]), run(keep))


VARIANTS = {
    "selective": functools.partial(
        checkpoint, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts([torch.ops.overdrive.gemm.default])
    ),
    "no_early_stop": functools.partial(checkpoint, use_reentrant=False, early_stop=False),
    "sequential": lambda layers, x: checkpoint_sequential(layers, 2, x, use_reentrant=False),
    "sequential_reentrant": lambda layers, x: checkpoint_sequential(layers, 2, x, use_reentrant=True),
    "offloading": lambda layers, x: checkpoint(offloading(layers), x, use_reentrant=False),
    "offloaded": lambda layers, x: offloading(functools.partial(checkpoint, layers, use_reentrant=False))(x),
    "odd_hooks": lambda layers, x: with_odd_hooks(layers, x),
}


def offloading(function):
    def call(x):
        with torch.autograd.graph.save_on_cpu():
            return function(x)

    return call


def with_odd_hooks(function, x):
    """Saved-tensor hooks that are not plain functions."""
    with torch.autograd.graph.saved_tensors_hooks(functools.partial(lambda t: t), torch.nn.Identity()):
        return function(x)


@pytest.mark.parametrize("recipe", FP8)
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_ways_to_save(device, variant, recipe):
    def run(save):
        layers = stack(*LAYERS, device=device)
        return train(layers, lambda x: around_all(layers, x, save, RECIPES[recipe]), 3)

    assert_same(run(VARIANTS[variant]), run(keep))


@pytest.mark.parametrize("recipe", FP8)
def test_composable_checkpoint(device, recipe):
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    from torch.distributed._composable import checkpoint as composable

    def run(prepare):
        layers = stack(*LAYERS, device=device)
        for layer in layers:
            prepare(layer)
        return train(layers, lambda x: around_all(layers, x, keep, RECIPES[recipe]), 3)

    assert_same(run(composable), run(lambda layer: None))


def test_a_failing_forward_leaves_nothing_behind(device):
    layers = stack("linear", device=device)

    def fails(x):
        with fp8(RECIPES["delayed"]):
            raise KeyError(layers(x).shape)

    for save in CHECKPOINTS.values():
        with pytest.raises(KeyError):
            save(fails, batch(0, device))
        assert STATE.context is OFF


def test_what_te_checkpoint_refuses():
    for name, value in {"distribute_saved_activations": True, "tp_group": object(), "get_rng_state_tracker": lambda: None}.items():
        with pytest.raises(NotImplementedError, match=name):
            te.checkpoint(torch.sin, torch.ones(1), **{name: value})


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_te_checkpoint_passes_keywords(use_reentrant):
    x = torch.ones(2, requires_grad=True)
    te.checkpoint(lambda x, *, power: x**power, x, use_reentrant=use_reentrant, power=3).sum().backward()
    assert x.grad.tolist() == [3, 3]
