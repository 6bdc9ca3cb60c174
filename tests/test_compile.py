"""torch.compile(fullgraph=True): the bits of eager for every layer and recipe, one graph for all layers and steps."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import overdrive.pytorch as te
from overdrive.recipe import DelayedScaling, Float8BlockScaling, Float8CurrentScaling
from tests.steps import MODULES, RECIPES, SIZE, TOKENS, assert_same, fp8, stack, train

pytestmark = pytest.mark.filterwarnings(  # torch.compile's own
    "ignore::DeprecationWarning", "ignore:.*Online softmax.*", "ignore:The .grad attribute of a Tensor"
)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs() -> int:
    """How many graphs were compiled since the test began."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def assert_compiles(make, call, recipe, inside: bool, backend: str = "aot_eager", steps: int = 3) -> None:
    """call(module, x) is one graph and equals eager for `steps` steps, the autocast inside or outside of what is compiled."""

    def program(module, wrap):
        def body(x):
            with fp8(recipe, inside):
                return call(module, x)

        body = wrap(body)

        def whole(x):
            with fp8(recipe, not inside):
                return body(x)

        return train(module, whole, steps)

    eager = program(make(), lambda body: body)
    compiled = program(make(), lambda body: torch.compile(body, fullgraph=True, backend=backend))
    assert graphs() == 1
    assert_same(compiled, eager)


def apply(module, x):
    return module(x)


FEWER = {"layernorm": ("plain",), "rmsnorm": ("plain",), "attention": ("delayed",), "checkpointing_mlp": ("delayed", "block")}
CASES = [
    pytest.param(name, recipe, inside, id=f"{name}-{recipe}-{'inside' if inside else 'outside'}")
    for name in MODULES
    for recipe in FEWER.get(name, RECIPES)
    for inside in ([False] if recipe == "plain" else [False, True])
]


@pytest.mark.parametrize(("name", "recipe", "inside"), CASES)
def test_two_layers_are_one_graph_with_eager_bits(device, name, recipe, inside):
    assert_compiles(lambda: stack(name, name, device=device), apply, RECIPES[recipe], inside)


@pytest.mark.parametrize(("name", "recipe"), [("layernorm_linear", "delayed"), ("layernorm_mlp", "block"), ("linear", "current")])
def test_inductor_gives_eager_bits(device, name, recipe):
    assert_compiles(lambda: stack(name, name, device=device), apply, RECIPES[recipe], True, backend="inductor")


@pytest.mark.parametrize("recipe", ["delayed", "current"])
def test_a_compiled_layer_serves_its_siblings(device, recipe):
    layers = stack(*["layernorm_linear"] * 4, device=device)
    one = torch.compile(apply, fullgraph=True, backend="aot_eager")

    def call(x):
        with fp8(RECIPES[recipe]):
            for layer in layers:
                x = one(layer, x)
            return x

    eager = stack(*["layernorm_linear"] * 4, device=device)
    compiled = train(layers, call)
    assert graphs() == 1
    assert_same(compiled, train(eager, lambda x: fp8_call(eager, RECIPES[recipe], x)))


def fp8_call(module, recipe, x):
    with fp8(recipe):
        return module(x)


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("producer", ["layernorm", "rmsnorm", "linear"])
@pytest.mark.parametrize("recipe", ["delayed", "current", "block"])
def test_fp8_outputs_between_compiled_layers(device, producer, recipe, inside):
    def call(layers, x):
        return layers[1](layers[0](x, fp8_output=True))

    assert_compiles(lambda: stack(producer, "linear", device=device), call, RECIPES[recipe], inside)


@pytest.mark.parametrize("recipe", ["delayed", "current", "block"])
def test_microbatches_reuse_the_weight(device, recipe):
    def run(wrap):
        module = stack("layernorm_linear", "linear", device=device)
        body = wrap(lambda x, first: module[1](module[0](x, is_first_microbatch=first), is_first_microbatch=first))
        order = iter([True, False, False] * 3)
        return train(module, lambda x: fp8_call(lambda x: body(x, next(order)), RECIPES[recipe], x), 9)

    eager = run(lambda body: body)
    assert_same(run(lambda body: torch.compile(body, fullgraph=True, backend="aot_eager")), eager)
    assert graphs() == 3  # first microbatch before there was a cached weight, first, later


@pytest.mark.parametrize("recipe", [lambda: None, DelayedScaling, Float8CurrentScaling, Float8BlockScaling])
def test_recipes_made_in_compiled_code(device, recipe):
    def call(layers, x):
        with te.autocast(recipe=recipe()):
            return layers(x)

    assert_compiles(lambda: stack("linear", device=device), call, None, True)


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_checkpoint_in_compiled_code(device, recipe, inside):
    def call(layers, x):
        return layers[1](checkpoint(layers[0], x, use_reentrant=False))

    assert_compiles(lambda: stack("layernorm_mlp", "linear", device=device), call, RECIPES[recipe], inside)


@pytest.mark.parametrize("recipe", ["delayed", "current", "block"])
@pytest.mark.parametrize(("features", "tokens"), [(24, 32), (64, 30)], ids=["features", "tokens"])
def test_odd_shapes_do_not_break_the_graph(device, recipe, features, tokens):
    def run(wrap):
        torch.manual_seed(1)
        module = te.LayerNormLinear(features, features, device=device, params_dtype=torch.bfloat16)
        body = wrap(lambda x: fp8_call(module, RECIPES[recipe], x))
        x = torch.randn(tokens, features).to(device, torch.bfloat16).requires_grad_()
        body(x).float().square().sum().backward()
        return {"dx": x.grad, **{name: p.grad for name, p in module.named_parameters()}}

    compiled = run(lambda body: torch.compile(body, fullgraph=True, backend="aot_eager"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(compiled, run(lambda body: body))
    assert graphs() == 1


@pytest.mark.parametrize("recipe", ["delayed", "block"])
def test_any_number_of_tokens_is_one_graph(device, recipe):
    module, twin = (stack("layernorm_mlp", "linear", device=device) for _ in range(2))
    compiled = torch.compile(lambda x: fp8_call(module, RECIPES[recipe], x), fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (32, 48, 80):
        x = torch.randn(tokens, SIZE).to(device, torch.bfloat16)
        assert torch.equal(compiled(x), fp8_call(twin, RECIPES[recipe], x)), tokens
    assert graphs() == 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_evaluation_and_training_take_turns(device, recipe):
    def run(wrap):
        module = stack("layernorm_linear", "linear", device=device)
        body = wrap(lambda x: fp8_call(module, RECIPES[recipe], x))
        results = []
        for number in range(3):
            results += train(module, body, 1, number)
            with torch.no_grad():
                results.append({"evaluated": body(torch.ones(TOKENS, SIZE).to(device, torch.bfloat16))})
        return results

    eager = run(lambda body: body)
    assert_same(run(lambda body: torch.compile(body, fullgraph=True, backend="aot_eager")), eager)
    assert graphs() == 2


@pytest.mark.parametrize("recipe", ["plain", "delayed"])
def test_under_torch_autocast(device, recipe):
    def call(layers, x):
        with torch.autocast(device, torch.bfloat16):
            return layers(x.float())

    assert_compiles(
        lambda: stack("layernorm_mlp", "linear", device=device, dtype=torch.float32), call, RECIPES[recipe], inside=False
    )
