"""CUDA graphs of layers: replays give what eager steps give, scales included; what cannot be captured says so."""

from __future__ import annotations

import copy
import gc
import importlib

import pytest
import torch

import overdrive.pytorch as te
from overdrive.modules.graphs import Captured
from overdrive.ops.scaling import Arena
from overdrive.recipe import DelayedScaling
from tests.numerics import assert_same_bits, relative_error
from tests.steps import RECIPES, SIZE, batch, fp8, stack, states


@pytest.fixture(autouse=True)
def _collected():
    """What earlier tests left in cycles is freed now, not by the collector inside of a capture."""
    gc.collect()


LAYERS = {
    "linear": lambda: stack("linear", device="cuda"),
    "layernorm_mlp": lambda: stack("layernorm_linear", "layernorm_mlp", device="cuda"),
    "transformer_layer": lambda: te.TransformerLayer(
        SIZE, 2 * SIZE, 4, hidden_dropout=0.0, attention_dropout=0.0, attn_input_format="bshd", params_dtype=torch.bfloat16
    ),
}


def step(layer, recipe, index, inside):
    for parameter in layer.parameters():
        parameter.grad = None
    x = batch(index, "cuda")
    with fp8(recipe, on=not inside):
        y = layer(x)
    (y * y).sum().backward()
    return [y, x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_replays_are_steps(recipe, name):
    """Outputs, gradients and scaling states of replays are those of eager steps, from before the capture on."""
    recipe = RECIPES[recipe]
    layer = LAYERS[name]()
    step(layer, recipe, 0, inside=False)
    expected = copy.deepcopy(layer)
    options = {"enabled": recipe is not None, "recipe": recipe}
    assert te.make_graphed_callables(layer, (batch(0, "cuda"),), **options) is layer
    for index in range(1, 5):
        for got, want in zip(step(layer, recipe, index, inside=True), step(expected, recipe, index, inside=False)):
            if name == "transformer_layer":  # attention's backward adds up in any order
                assert relative_error(got, want) < 0.02
            else:
                assert_same_bits(got, want)
    if name != "transformer_layer":
        with fp8(recipe):  # ends the last step of both
            pass
        for key, state in states(expected).items():
            assert_same_bits(states(layer)[key], state, key)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning")
def test_a_whole_step_can_be_captured():
    recipe, layer = RECIPES["delayed"], LAYERS["layernorm_mlp"]()
    expected = copy.deepcopy(layer)
    x = batch(0, "cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            with te.autocast(recipe=recipe):
                layer(x).sum().backward()
    torch.cuda.synchronize()
    for part in layer:
        part.set_scaling_state(None)
    graph = torch.cuda.CUDAGraph()
    layer.zero_grad()
    with torch.cuda.graph(graph), te.autocast(recipe=recipe):
        y = layer(x)
        y.sum().backward()
    for index in range(1, 4):
        with torch.no_grad():
            x.copy_(batch(index, "cuda"))
        graph.replay()
        with te.autocast(recipe=recipe):
            want = expected(x)
        want.sum().backward()
        assert_same_bits(y, want)


def test_an_autocast_around_the_capture_is_refused(device, monkeypatch):
    layer, x = stack("linear", device=device), batch(0, device)
    with fp8(RECIPES["delayed"]):
        layer(x)
        monkeypatch.setattr(importlib.import_module("overdrive.scaling.autocast"), "capturing", lambda device: True)
        with pytest.raises(RuntimeError, match="Enter autocast in the function that is captured"):
            layer(x)
    with fp8(RECIPES["delayed"]):
        layer(x)


def test_state_that_a_graph_knows_does_not_move(device):
    arena = Arena(torch.device(device))
    arena.captured = True
    arena.reserve(8, 1)
    with pytest.raises(RuntimeError, match="before the capture"):
        arena.reserve(8, 4)


def test_no_autograd_graph_outlives_a_captured_call(device):
    """Its nodes would add to the gradients on the stream of that call."""
    layer, x = stack("linear", device=device), batch(0, device)
    captured = Captured(lambda x: (layer(x), x.detach()), enabled=False)
    first, other = captured(x)
    assert first.grad_fn is not None
    assert not other.requires_grad
    second, _ = captured(x)
    assert first.grad_fn is None
    assert second.grad_fn is not None
    captured.finish()
    assert second.grad_fn is None
    third, fourth = captured(x)[0], captured(x)[0]
    assert third.grad_fn is not None
    assert_same_bits(third, fourth)


@pytest.mark.gpu
def test_failed_capture_leaves_the_module_as_it_was():
    layer = LAYERS["linear"]()
    forward = layer.forward
    with pytest.raises(ValueError, match="in_features"):
        te.make_graphed_callables(layer, (torch.randn(4, SIZE + 1, device="cuda", dtype=torch.bfloat16, requires_grad=True),))
    assert layer.forward == forward


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.relu, (torch.ones(1),)), TypeError, "modules must be a torch.nn.Module"),
        ((torch.nn.ReLU(), (torch.ones(1),), 3, False, {"a": 1}), NotImplementedError, "sample_kwargs"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        te.make_graphed_callables(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_needs_a_gpu():
    with pytest.raises(RuntimeError, match="need a GPU"):
        te.make_graphed_callables(te.Linear(16, 16), (torch.ones(16, 16),), recipe=DelayedScaling())


@pytest.mark.parametrize("recipe", ["delayed", "current"])
def test_scaling_state_can_be_taken_and_given_back(recipe, device):
    """What make_graphed_callables does around its warm-up."""
    layer = stack("linear", device=device)
    linear = layer[0]
    assert linear.scaling_state() is None
    with fp8(RECIPES[recipe]):
        layer(batch(1, device)).sum().backward()
    state = linear.scaling_state()
    assert (state is not None) == (recipe == "delayed")
    with fp8(RECIPES[recipe]):
        layer(batch(2, device)).sum().backward()
    linear.set_scaling_state(state)
    assert (linear.scaling_state() is None) == (state is None)
    if state is not None:
        assert_same_bits(linear.scaling_state(), state)
    linear.set_scaling_state(None)
    assert linear.scaling_state() is None
