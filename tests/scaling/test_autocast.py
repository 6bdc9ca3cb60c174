"""`autocast`: which recipe a layer follows, when steps begin, and that nothing outlives the block."""

from __future__ import annotations

import inspect

import pytest
import torch

import overdrive.pytorch as te
from overdrive.common.recipe import MXFP8BlockScaling, NVFP4BlockScaling
from overdrive.recipe import DelayedScaling, Float8BlockScaling, Float8CurrentScaling, Format
from overdrive.scaling.arena import SLOTS
from overdrive.scaling.autocast import OFF, STATE
from tests.numerics import assert_same_bits
from tests.steps import RECIPES, assert_same, batch, fp8, stack, states, train

LAYERS = ("linear", "layernorm_linear", "layernorm_mlp")
FP8 = ("delayed", "current", "block")


@pytest.fixture(autouse=True)
def _leaves_nothing():
    assert STATE.context is OFF
    yield
    assert STATE.context is OFF


def outputs(device, context, number=0):
    """What a fresh stack gives inside of `context()`."""
    with context():
        return stack(*LAYERS, device=device)(batch(number, device)).detach()


def under(name):
    return lambda: fp8(RECIPES[name])


def nested(outer, *inner):
    """Several autocasts, the last one innermost."""

    class Nested:
        def __enter__(self):
            self.entered = [context() for context in (outer, *inner)]
            for context in self.entered:
                context.__enter__()

        def __exit__(self, *error):
            for context in reversed(self.entered):
                context.__exit__(*error)

    return Nested


def off():
    return te.autocast(enabled=False)


NESTS = {
    "off inside": (under("current"), off, "plain"),
    "on inside off": (off, under("block"), "block"),
    "another inside": (under("delayed"), under("current"), "current"),
    "delayed inside": (under("block"), under("delayed"), "delayed"),
    "the same inside": (under("delayed"), under("delayed"), "delayed"),
}


@pytest.mark.parametrize(("outer", "inner", "wins"), NESTS.values(), ids=NESTS)
def test_the_innermost_wins(device, outer, inner, wins):
    assert_same_bits(outputs(device, nested(outer, inner)), outputs(device, under(wins)))


def test_every_recipe_gives_other_numbers(device):
    """Or the tests here would not tell recipes apart."""
    found = [outputs(device, under(name)) for name in RECIPES]
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


def test_leaving_an_inner_one_restores_the_outer(device):
    layers, twin, x = stack(*LAYERS, device=device), stack(*LAYERS, device=device), batch(0, device)
    with fp8(RECIPES["current"]):
        with off():
            layers(x)
        with pytest.raises(KeyError), fp8(RECIPES["block"]):
            raise KeyError
        got = layers(x)
    with fp8(RECIPES["current"]):
        assert_same_bits(got, twin(x))


def test_leaving_by_an_exception_restores(device):
    with pytest.raises(KeyError), fp8(RECIPES["delayed"]):
        raise KeyError
    assert_same_bits(outputs(device, lambda: fp8(None)), outputs(device, off))


def test_the_default_is_delayed_scaling(device):
    assert te.get_default_recipe() == DelayedScaling()
    assert_same_bits(outputs(device, te.autocast), outputs(device, lambda: te.autocast(recipe=DelayedScaling())))


def test_fp8_autocast_is_the_older_name(device):
    assert list(inspect.signature(te.fp8_autocast).parameters) == ["enabled", "calibrating", "fp8_recipe", "fp8_group", "_graph"]
    names = ["enabled", "calibrating", "recipe", "amax_reduction_group", "_graph"]
    assert list(inspect.signature(te.autocast).parameters) == names
    recipe = RECIPES["current"]
    assert_same_bits(outputs(device, lambda: te.fp8_autocast(enabled=True, fp8_recipe=recipe)), outputs(device, under("current")))
    assert_same_bits(outputs(device, lambda: te.fp8_autocast(False, fp8_recipe=recipe)), outputs(device, off))


def test_as_a_decorator(device):
    layers, x = stack(*LAYERS, device=device), batch(0, device)

    @te.autocast(recipe=RECIPES["current"])
    def call(x):
        return layers(x)

    for _ in range(2):  # each call enters anew
        assert_same_bits(call(x), outputs(device, under("current")))


def test_backward_may_lie_outside_or_inside_another(device):
    def run(around_backward):
        layers, x = stack(*LAYERS, device=device), batch(0, device)
        with fp8(RECIPES["current"]):
            y = layers(x)
        with around_backward:
            y.float().square().sum().backward()
        return {"dx": x.grad, **{name: p.grad for name, p in layers.named_parameters()}}

    expected = run(fp8(None))
    for around in (off(), fp8(RECIPES["block"]), te.autocast(recipe=RECIPES["current"])):
        assert_same(run(around), expected)


@pytest.mark.parametrize("recipe", ["fp8", 3, DelayedScaling, Format.HYBRID])
def test_a_recipe_that_is_none(recipe):
    with pytest.raises(TypeError, match=r"recipe must be a recipe of overdrive\.common\.recipe"), te.autocast(recipe=recipe):
        pass


@pytest.mark.parametrize("recipe", [MXFP8BlockScaling(), NVFP4BlockScaling()], ids=["mxfp8", "nvfp4"])
def test_recipes_that_are_not_built_refuse_when_used(recipe):
    with te.autocast(enabled=False, recipe=recipe):
        pass
    with pytest.raises(NotImplementedError, match=f"{type(recipe).__name__} cannot run here: .* use DelayedScaling"):
        te.autocast(recipe=recipe).__enter__()


@pytest.mark.parametrize("make", [DelayedScaling, Float8CurrentScaling, Float8BlockScaling])
@pytest.mark.parametrize("name", ["fp8_dpa", "fp8_mha"])
def test_fp8_attention_refuses(make, name):
    with pytest.raises(NotImplementedError, match=f"{name}=True"), te.autocast(recipe=make(**{name: True})):
        pass


# --- delayed scaling's steps ---------------------------------------------------------------------------------------------

DELAYED = RECIPES["delayed"]


def test_nothing_to_keep_outside_of_fp8(device):
    layers = stack(*LAYERS, device=device)
    train(layers, layers, 2)
    assert not states(layers)


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("evaluations", [1, 3])
def test_evaluation_leaves_the_state_alone(device, grad_mode, evaluations):
    def run(evaluations):
        layers = stack(*LAYERS, device=device)
        results = []
        for number in range(4):
            results += train(layers, lambda x: call_in(layers, x), 1, number)
            for i in range(evaluations):
                before = states(layers)
                with grad_mode():
                    y = call_in(layers, batch(40 + i, device))
                assert y.isfinite().all()
                assert_same(states(layers), before)
        return results

    assert_same(run(evaluations), run(0))


def call_in(layers, x, recipe=DELAYED):
    with fp8(recipe):
        return layers(x)


def test_evaluation_uses_live_scales(device):
    layers = stack("linear", device=device)
    train(layers, lambda x: call_in(layers, x), 4)
    x = batch(4, device).detach()
    call_in(layers, x)  # ends the last step: scales are those of the four
    with torch.no_grad():
        fresh = call_in(stack("linear", device=device), x)
        assert not torch.equal(call_in(layers, x), fresh)


def amaxes(module):
    """Pending forward amaxes (input, weight) by name of the state."""
    return {name: state[1, :2] for name, state in states(module).items()}


@pytest.mark.parametrize("recorded_in", [torch.enable_grad, torch.no_grad])
def test_calibration_records_without_touching_numbers(device, recorded_in):
    layers, twin, x = stack(*LAYERS, device=device), stack(*LAYERS, device=device), batch(3, device)
    with recorded_in(), te.autocast(enabled=False, calibrating=True, recipe=DELAYED):
        y = layers(x)
    assert_same_bits(y, twin(x))
    assert_same_bits(amaxes(layers)["0._extra_state"][0], x.detach().abs().max().float())
    assert_same_bits(amaxes(layers)["0._extra_state"][1], layers[0].weight.detach().abs().max().float())
    call_in(layers, x)  # the first FP8 step
    scale = states(layers)["0._extra_state"][0]
    assert_same_bits(scale[0], torch.full_like(scale[0], 448) / x.detach().abs().max().float())


def test_calibrating_matters_to_delayed_scaling_alone(device):
    for name in ("current", "block"):
        recipe = RECIPES[name]
        got = outputs(device, lambda recipe=recipe: te.autocast(enabled=False, calibrating=True, recipe=recipe))
        assert_same_bits(got, outputs(device, off))


def test_calibrating_while_enabled_is_enabled(device):
    assert_same_bits(
        outputs(device, lambda: te.autocast(calibrating=True, recipe=DELAYED)), outputs(device, lambda: te.autocast(recipe=DELAYED))
    )


def test_only_the_outermost_begins_a_step(device):
    def run(make):
        layers = stack(*LAYERS, device=device)

        def call(x):
            with fp8(DELAYED), make():
                return layers[1:](layers[0](x))

        return train(layers, call, 4)

    assert_same(run(lambda: fp8(DELAYED)), run(lambda: fp8(None)))


def test_layers_used_twice_in_a_step_keep_the_larger_amax(device):
    layers = stack("linear", device=device)
    with fp8(DELAYED):
        large, small = batch(5, device), batch(0, device)
        layers(small), layers(large), layers(small)
    assert_same_bits(amaxes(layers)["0._extra_state"][0], large.detach().abs().max().float())


@pytest.mark.parametrize("other", FP8)
def test_models_used_in_turn_do_not_disturb_each_other(device, other):
    def run(seed, recipe, disturb):
        layers, results = stack(*LAYERS, device=device, seed=seed), []
        for number in range(5):
            disturb(number)
            results += train(layers, lambda x: call_in(layers, x, recipe), 1, number)
        return results

    neighbour = stack(*LAYERS, device=device, seed=9)

    def disturb(number):
        train(neighbour, lambda x: call_in(neighbour, x, RECIPES[other]), 1, 20 + number)

    assert_same(run(1, DELAYED, disturb), run(1, DELAYED, lambda number: None))


def test_two_models_in_one_step_and_backwards_interleaved(device):
    def run(together):
        models, results = [stack(*LAYERS, device=device, seed=seed) for seed in (1, 2)], []
        for number in range(4):
            inputs = [batch(number + i, device) for i in range(2)]
            ys = [call_in(model, x) for model, x in zip(models, inputs)] if together else []
            for i, model in enumerate(models):
                model.zero_grad()
                y = ys[i] if together else call_in(model, inputs[i])
                y.float().square().sum().backward()
                results.append({"y": y.detach(), "dx": inputs[i].grad})
        return results

    assert_same(run(together=True), run(together=False))


def test_recipes_do_not_share_steps(device):
    """A layer used under two DelayedScalings keeps what was recorded for each until that one's next step."""
    layers, short = stack("linear", device=device), DelayedScaling(amax_history_len=1, margin=1)
    call_in(layers, batch(2, device))
    recorded = amaxes(layers)["0._extra_state"][0].clone()
    with fp8(short):
        pass
    assert_same_bits(amaxes(layers)["0._extra_state"][0], recorded)


@pytest.mark.parametrize("name", LAYERS)
def test_models_built_inside(device, name):
    def build_and_train(built_inside):
        with fp8(DELAYED):
            inside = stack(name, device=device) if built_inside else None
            if built_inside:
                x = batch(0, device)
                inside(x).float().sum().backward()
        layers = inside if built_inside else stack(name, device=device)
        if not built_inside:
            with fp8(DELAYED):
                layers(batch(0, device)).float().sum().backward()
        return train(layers, lambda x: call_in(layers, x), 3, 1)

    assert_same(build_and_train(True), build_and_train(False))


def test_a_very_large_model_built_inside(device):
    """More slots than the step's snapshot has room for."""
    with fp8(DELAYED):
        crowd = [te.Linear(16, 16, device=device) for _ in range(SLOTS.capacity // 5 + 2)]
        crowd[-1](torch.ones(16, 16, device=device)).sum().backward()
    with fp8(DELAYED):
        crowd[-1](torch.ones(16, 16, device=device)).sum().backward()
    assert states(torch.nn.ModuleList(crowd[-1:]))["0._extra_state"][0, 0] == 448


@pytest.mark.parametrize("reduce_amax", [True, False])
def test_a_process_group_of_one(device, reduce_amax, tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    backend = "gloo" if device == "cpu" else "nccl"
    torch.distributed.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        recipe = DelayedScaling(amax_history_len=3, reduce_amax=reduce_amax)
        layers, twin = stack(*LAYERS, device=device), stack(*LAYERS, device=device)
        group = torch.distributed.group.WORLD

        def grouped(x):
            with te.autocast(recipe=recipe, amax_reduction_group=group):
                return layers(x)

        assert_same(train(layers, grouped, 4), train(twin, lambda x: call_in(twin, x, recipe), 4))
    finally:
        torch.distributed.destroy_process_group()
