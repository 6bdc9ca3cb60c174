"""Which gradients come, where they go and when: frozen parts, microbatches, main_grad, backward_dw, torch.autocast."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.modules.layer_oracle import TOKENS, assert_same_step, build, check, features, fp8, gradients_like, step, tuple_of
from tests.numerics import RECIPES, assert_close, assert_same_bits, relative_error

LAYERS = ("Linear", "LayerNormLinear", "LayerNormMLP")
layers = pytest.mark.parametrize("layer", LAYERS)
recipes = pytest.mark.parametrize("recipe", RECIPES)
VARIANTS = {
    "Linear": {"layer": "Linear"},
    "Linear, split": {"layer": "Linear", "parameters_split": ("q", "k")},
    "LayerNormLinear": {"layer": "LayerNormLinear"},
    "LayerNormLinear, split": {"layer": "LayerNormLinear", "parameters_split": {"q": 16, "kv": 16}},
    "LayerNormMLP": {"layer": "LayerNormMLP", "activation": "swiglu"},
    "LayerNormMLP, checkpoint": {"layer": "LayerNormMLP", "checkpoint": True},
}
SETTLED = 5  # steps on the same input after which delayed scaling's scales stay
variants = pytest.mark.parametrize("variant", VARIANTS)


def make(variant, device, dtype=torch.float32, **arguments):
    options = {**VARIANTS[variant], **arguments}
    return build(options.pop("layer"), device, dtype, **options)


def twins(variant, device, dtype=torch.float32, **arguments):
    """A module built with the arguments and one without, of equal parameters."""
    special, plain = make(variant, device, dtype, **arguments), make(variant, device, dtype)
    special.load_state_dict(plain.state_dict())
    return special, plain


def weights_of(module):
    return {name: p for name, p in module.named_parameters() if p.dim() == 2}


class Ops(TorchDispatchMode):
    """overdrive's op calls as (name, arguments)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "overdrive":
            self.calls.append((func.name().removeprefix("overdrive::"), args))
        return func(*args, **(kwargs or {}))


# --- which gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["plain", "current", "block"])
@layers
def test_any_part_may_be_frozen(layer, recipe, device):
    """Every subset of input and parameters that requires grad: those get what they get when all do, the rest None."""
    module = build(layer, device)
    x = features(*TOKENS, device=device)
    leaves = {"input": x, **dict(module.named_parameters())}
    everything = step(module, x, recipe)
    for flags in itertools.product((True, False), repeat=len(leaves)):
        for leaf, flag in zip(leaves.values(), flags):
            leaf.requires_grad_(flag)
        result = step(module, x, recipe)
        assert_same_bits(result.outputs[0], everything.outputs[0], "output")
        assert result.outputs[0].requires_grad == any(flags)
        for name, flag in zip(leaves, flags):
            if flag:
                error = relative_error(result.grads[name], everything.grads[name])
                assert error < 1e-5, f"gradient of {name} with {dict(zip(leaves, flags))}: {error}"
            else:
                assert result.grads[name] is None, name


@pytest.mark.parametrize("mode", ["plain", "fuse", "delay"])
@pytest.mark.parametrize("suffix", ["weight", "bias"])
def test_one_of_several_split_parts_may_be_frozen(suffix, mode, device):
    options = {"fuse": {"fuse_wgrad_accumulation": True}, "delay": {"delay_wgrad_compute": True}, "plain": {}}[mode]
    module = build("Linear", device, parameters_split=("q", "k"), **options)
    module.q_weight.main_grad, module.k_weight.main_grad = (torch.zeros_like(module.q_weight) for _ in range(2))
    getattr(module, f"q_{suffix}").requires_grad_(False)
    module(features(*TOKENS, device=device)).sum().backward()
    module.backward_dw()
    where = "main_grad" if mode == "fuse" and suffix == "weight" else "grad"
    frozen = getattr(getattr(module, f"q_{suffix}"), where)
    assert frozen is None or not frozen.any()
    assert getattr(getattr(module, f"k_{suffix}"), where).any()


@variants
@recipes
def test_backward_runs_twice_with_retain_graph(recipe, variant, device):
    if recipe == "plain" and "checkpoint" in variant:
        pytest.skip("one recipe is enough: recomputing is torch's")
    module = make(variant, device)
    x = features(*TOKENS, device=device)
    with fp8(recipe):
        outputs = tuple_of(module(x))
    leaves = [x, *module.parameters()]
    first, second = (torch.autograd.grad(outputs, leaves, gradients_like(outputs), retain_graph=True) for _ in range(2))
    for a, b in zip(first, second):
        assert_same_bits(a, b)


@variants
@recipes
def test_gradients_accumulate(recipe, variant, device):
    module = make(variant, device)
    x = features(*TOKENS, device=device)
    for _ in range(SETTLED):
        once = step(module, x, recipe).grads
    with fp8(recipe):
        output = tuple_of(module(x))
    torch.autograd.backward(output, gradients_like(output))
    for name, parameter in module.named_parameters():
        assert relative_error(parameter.grad, 2 * once[name]) < 1e-6, name


# --- what is kept -----------------------------------------------------------------------------------------------------


def saved_by(call):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        call()
    return saved


@variants
@recipes
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_inference_keeps_nothing_and_makes_no_transposed_copy(guard, recipe, variant, device):
    module = make(variant, device)
    x = features(*TOKENS, device=device)
    with guard(), fp8(recipe), Ops() as ops:
        assert not saved_by(lambda: module(x))
    quantizing = [args for name, args in ops.calls if name in ("quantize", "norm", "activation")]
    assert bool(quantizing) == (recipe != "plain" or not variant.startswith("Linear"))
    assert not any(args[-1] for args in quantizing)
    if recipe != "delayed":
        assert_same_bits(module(x) if recipe == "plain" else step(module, x, recipe).outputs[0], run(module, x, recipe))


def run(module, x, recipe):
    with torch.no_grad(), fp8(recipe):
        return tuple_of(module(x))[0]


TRAINED = {
    "Linear": [(("input",), {"x"}), (("weight",), {"weight"}), (("bias",), {"x", "weight"})],
    "LayerNormLinear": [(("weight",), {"x", "weight"}), (("bias",), {"x", "weight"}), (("layer_norm_bias",), set())],
    "LayerNormMLP": [(("fc2_bias",), {"x", "fc1_weight", "fc2_weight"}), (("fc2_weight",), {"x", "fc1_weight", "fc2_weight"}),
                     (("fc1_bias",), {"x", "fc1_weight"})],
}  # fmt: skip


@pytest.mark.parametrize(("layer", "trained", "unneeded"), [(layer, *row) for layer, rows in TRAINED.items() for row in rows])
def test_backward_keeps_only_what_it_reads(layer, trained, unneeded, device):
    """LoRA and frozen trunks live from this."""
    module = build(layer, device).requires_grad_(False)
    x = features(*TOKENS, device=device).requires_grad_("input" in trained)
    for name in trained:
        if name != "input":
            getattr(module, name).requires_grad_(True)
    held = {t.untyped_storage().data_ptr() for t in saved_by(lambda: module(x))}
    candidates = {"x": x, **dict(module.named_parameters())}
    assert not {name for name in unneeded if candidates[name].untyped_storage().data_ptr() in held}
    if trained in (("bias",), ("fc2_bias",)):
        assert not held


# --- microbatches -----------------------------------------------------------------------------------------------------


def weight_quantizations(module, call):
    addresses = {weight.data_ptr() for weight in weights_of(module).values()}
    with Ops() as ops:
        call()
    return sum(name == "quantize" and args[0].data_ptr() in addresses for name, args in ops.calls)


@variants
@pytest.mark.parametrize("recipe", ["delayed", "current", "block"])
def test_a_weight_is_quantized_at_the_first_microbatch_only(recipe, variant, device):
    module = make(variant, device)
    gemms = 2 if "MLP" in variant else 1
    x = features(*TOKENS, device=device)
    for first, expected in ((None, gemms), (True, gemms), (False, 0), (False, 0), (None, gemms), (True, gemms)):
        with fp8(recipe):
            assert weight_quantizations(module, lambda first=first: module(x, is_first_microbatch=first)) == expected, first


@variants
@recipes
def test_microbatches_compute_what_single_calls_do(recipe, variant, device):
    module = make(variant, device)
    x = features(*TOKENS, device=device)
    for _ in range(SETTLED):
        expected = step(module, x, recipe)
    for first in (True, False, False):
        assert_same_step(step(module, x, recipe, is_first_microbatch=first), expected)


@pytest.mark.parametrize("recipe", ["current", "block"])
@layers
def test_what_refreshes_the_kept_weight(recipe, layer, device):
    module = build(layer, device)
    x = features(*TOKENS, device=device)

    def output(first):
        with torch.no_grad(), fp8(recipe):
            return module(x, is_first_microbatch=first)

    def change(factor):
        with torch.no_grad():
            for weight in weights_of(module).values():
                weight.mul_(factor)

    kept = output(False)  # no True before: made now
    assert_same_bits(kept, output(None))
    change(-2)
    assert_same_bits(output(False), kept, "the kept weight")
    fresh = output(None)
    assert relative_error(fresh, kept) > 0.1
    assert_same_bits(output(False), kept, "the kept weight after a call that keeps none")
    assert_same_bits(output(True), fresh, "a refreshed weight")
    change(-2)
    assert_same_bits(output(False), fresh, "the kept weight")
    module.load_state_dict({name: value.clone() for name, value in module.state_dict().items()})
    assert_same_bits(output(False), output(None), "after load_state_dict")
    change(-2)
    module.to(torch.float64).to(torch.float32)
    assert_same_bits(output(False), output(None), "after .to()")


def test_a_weight_kept_in_inference_serves_training_and_another_recipe(device):
    module = build("Linear", device)
    x = features(*TOKENS, device=device)
    with torch.no_grad(), fp8("current"):
        module(x, is_first_microbatch=True)
    for recipe in ("current", "block", "current"):
        check(module, x, recipe, call=lambda x: module(x, is_first_microbatch=False))


# --- main_grad --------------------------------------------------------------------------------------------------------


def with_main_grads(module, value=0.0):
    for weight in weights_of(module).values():
        weight.main_grad = torch.full(weight.shape, value, dtype=torch.float32, device=weight.device)
    return module


@variants
@recipes
@pytest.mark.parametrize("delay", [False, True])
def test_weight_gradients_are_added_into_main_grad(delay, recipe, variant, device):
    fused, plain = twins(variant, device, torch.bfloat16, fuse_wgrad_accumulation=True, delay_wgrad_compute=delay)
    with_main_grads(fused, 0.5)
    x = features(*TOKENS, dtype=torch.bfloat16, device=device)
    total = {name: torch.full(weight.shape, 0.5, dtype=torch.float64) for name, weight in weights_of(fused).items()}
    for _ in range(2):
        expected = step(plain, x, recipe).grads
        actual = step(fused, x, recipe).grads
        fused.backward_dw()
        for name, weight in weights_of(fused).items():
            assert actual[name] is None
            assert weight.grad_added_to_main_grad is True
            assert weight.main_grad.dtype == torch.float32
            total[name] += expected[name].cpu().double()
            assert_close(weight.main_grad, total[name], torch.bfloat16, what=f"main_grad of {name}")
        for name in actual.keys() - total.keys():
            assert_same_bits(actual[name], expected[name], name)


def test_main_grad_is_more_exact_than_the_weights_dtype(device):
    module = with_main_grads(build("Linear", device, torch.bfloat16, fuse_wgrad_accumulation=True))
    x = features(*TOKENS, dtype=torch.bfloat16, device=device)
    output = step(module, x).outputs[0]
    dy = gradients_like((output,))[0].cpu().double().flatten(0, 1)
    assert_close(module.weight.main_grad, dy.t() @ x.detach().cpu().double().flatten(0, 1), torch.float32)


@pytest.mark.parametrize("recipe", ["plain", "current"])
@layers
def test_the_first_microbatch_overwrites_main_grad_and_the_others_add(layer, recipe, device):
    module = with_main_grads(build(layer, device, fuse_wgrad_accumulation=True), torch.nan)
    x = features(*TOKENS, device=device)
    step(module, x, recipe, is_first_microbatch=True)
    once = {name: weight.main_grad.clone() for name, weight in weights_of(module).items()}
    for first, times in ((False, 2), (None, 3), (True, 1)):
        step(module, x, recipe, is_first_microbatch=first)
        for name, weight in weights_of(module).items():
            assert relative_error(weight.main_grad, times * once[name]) < 1e-6, (name, first)


@pytest.mark.parametrize("main_grad", ["missing", None, "wrong shape"])
def test_without_a_main_grad_the_error_says_so(main_grad, device):
    module = build("Linear", device, fuse_wgrad_accumulation=True)
    if main_grad != "missing":
        module.weight.main_grad = main_grad and torch.zeros(3, device=device)
    with pytest.raises(RuntimeError, match=r"fuse_wgrad_accumulation=True needs .*weight.main_grad of shape \[32, 48\]"):
        module(features(*TOKENS, device=device)).sum().backward()


# --- delayed weight gradients -----------------------------------------------------------------------------------------


@variants
@recipes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_delayed_weight_gradients_are_the_immediate_ones(dtype, recipe, variant, device):
    delayed, plain = twins(variant, device, dtype, delay_wgrad_compute=True)
    x = features(*TOKENS, dtype=dtype, device=device)
    for _ in range(2):
        expected, actual = step(plain, x, recipe), step(delayed, x, recipe)
        assert all(actual.grads[name] is None for name in weights_of(delayed))
        delayed.backward_dw()
        late = {name: weight.grad for name, weight in weights_of(delayed).items()}
        assert_same_step(actual._replace(grads={**actual.grads, **late}), expected)
    before = {name: grad.clone() for name, grad in late.items()}
    delayed.backward_dw()  # nothing waits any more
    for name, weight in weights_of(delayed).items():
        assert_same_bits(weight.grad, before[name], name)


@layers
def test_several_delayed_backwards_add_up(layer, device):
    module = build(layer, device, delay_wgrad_compute=True)
    x = features(*TOKENS, device=device)
    step(module, x)
    module.backward_dw()
    once = {name: weight.grad.clone() for name, weight in weights_of(module).items()}
    for _ in range(2):
        output = module(x)
        output.backward(gradients_like((output,))[0])
    module.backward_dw()
    for name, weight in weights_of(module).items():
        assert relative_error(weight.grad, 3 * once[name]) < 1e-6


def test_backward_dw_with_nothing_delayed_does_nothing(device):
    module = build("Linear", device)
    module.backward_dw()
    assert module.weight.grad is None


# --- torch.autocast ---------------------------------------------------------------------------------------------------


@variants
@recipes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torchs_autocast_decides_the_dtype_and_gradients_keep_the_parameters(dtype, recipe, variant, device):
    module = make(variant, device)
    for x in (features(*TOKENS, device=device), features(*TOKENS, dtype=dtype, device=device)):
        with torch.autocast(device, dtype):
            result = check(module, x, recipe, dtype=dtype)
        assert {grad.dtype for name, grad in result.grads.items() if name != "input"} == {torch.float32}
        assert result.grads["input"].dtype == x.dtype


@variants
@pytest.mark.parametrize("way", ["fuse", "delay"])
def test_weight_gradients_find_their_parameters_under_torchs_autocast(way, variant, device):
    option = {"fuse": "fuse_wgrad_accumulation", "delay": "delay_wgrad_compute"}[way]
    special, plain = twins(variant, device, **{option: True})
    with_main_grads(special)
    x = features(*TOKENS, device=device)
    with torch.autocast(device, torch.bfloat16):
        expected = step(plain, x).grads
        step(special, x)
    special.backward_dw()
    for name, weight in weights_of(special).items():
        if way == "delay":
            assert_same_bits(weight.grad, expected[name], name)
        else:
            assert relative_error(weight.main_grad, expected[name]) < 0.01, name


@layers
def test_return_bias_follows_torchs_autocast(layer, device):
    module = build(layer, device, return_bias=True)
    with torch.autocast(device, torch.bfloat16):
        check(module, features(*TOKENS, device=device), dtype=torch.bfloat16)
