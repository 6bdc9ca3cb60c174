"""Linear, and what it shares with LayerNormLinear: parameters (whole, split, shared, loaded) and numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import overdrive.pytorch as te
from overdrive.scaling.autocast import STATE
from tests.modules.layer_oracle import IN, OUT, TOKENS, assert_same_step, build, check, features, formula_of, fp8, step
from tests.numerics import RECIPES, assert_same_bits, relative_error

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SPLITS = {
    "tuple": (("q", "k_"), {"q": 16, "k": 16}),
    "dict": ({"q_": 12, "k": 4, "v": 16}, {"q": 12, "k": 4, "v": 16}),
    "one": (("all",), {"all": 32}),
}
both = pytest.mark.parametrize("layer", ["Linear", "LayerNormLinear"])
splits = pytest.mark.parametrize("split", SPLITS)


def lie_in_one_buffer(parts):
    """Whether each tensor begins in memory where the one before it ends."""
    ends = [part.data_ptr() + part.numel() * part.element_size() for part in parts]
    one = len({part.untyped_storage().data_ptr() for part in parts}) == 1
    return one and all(part.data_ptr() == end for part, end in zip(parts[1:], ends))


def parts_of(module, suffix):
    return [p for name, p in module.named_parameters() if name.endswith(suffix) and not name.startswith("layer_norm_")]


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients(dtype, recipe, bias, device):
    check(build("Linear", device, dtype, bias=bias), features(*TOKENS, dtype=dtype, device=device), recipe)


@pytest.mark.parametrize("recipe", RECIPES)
@both
@splits
def test_forward_and_gradients_of_split_parameters(split, layer, recipe, device):
    module = build(layer, device, torch.bfloat16, parameters_split=SPLITS[split][0])
    check(module, features(*TOKENS, dtype=torch.bfloat16, device=device), recipe)


@pytest.mark.parametrize("arguments", [{}, {"parameters_split": ("q", "k")}])
@pytest.mark.parametrize("recipe", RECIPES)
def test_return_bias_leaves_the_bias_to_the_caller_and_its_gradient_comes_back(recipe, arguments, device):
    module = build("Linear", device, return_bias=True, **arguments)
    result = check(module, features(*TOKENS, device=device), recipe)
    assert [output.shape[-1] for output in result.outputs] == [OUT, OUT]


def test_return_bias_without_bias_returns_none(device):
    assert build("Linear", device, bias=False, return_bias=True)(features(3, device=device))[1] is None


@pytest.mark.parametrize("few", [0, 2**20])
@pytest.mark.parametrize("recipe", RECIPES)
def test_save_original_input_changes_no_bit(recipe, few, device, monkeypatch):
    """Of few elements the original is not saved."""
    monkeypatch.setattr("overdrive.functional.linear._FEW", few)
    modules = [build("Linear", device, torch.bfloat16, save_original_input=save) for save in (False, True)]
    modules[1].load_state_dict(modules[0].state_dict())
    x = features(*TOKENS, dtype=torch.bfloat16, device=device)
    for _ in range(3):
        steps = [step(module, x, recipe) for module in modules]
        assert_same_step(*steps)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t), fp8(recipe):
        modules[1](x)
    assert (x.data_ptr() in saved) == (few == 0 or recipe == "plain")


@both
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_mode_of_the_module_changes_nothing(layer, recipe, device):
    module = build(layer, device)
    x = features(*TOKENS, device=device)
    outputs = []
    for _ in range(2):
        with fp8(recipe):
            outputs.append(module(x))
        module.eval()
    if recipe != "delayed":  # whose second step has other scales
        assert_same_bits(*outputs)


def test_a_context_left_by_an_exception_is_restored(device):
    before = STATE.context
    with pytest.raises(ValueError, match="in_features"), fp8("current"):
        build("Linear", device)(features(4, device=device, size=IN + 1))
    assert STATE.context is before


# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_and_their_initialisation(dtype, device):
    module = te.Linear(640, 512, params_dtype=dtype, device=device)
    assert {name: (tuple(p.shape), p.dtype, p.device.type) for name, p in module.named_parameters()} == {
        "weight": ((512, 640), dtype, device),
        "bias": ((512,), dtype, device),
    }
    weight = module.weight.float()
    assert abs(weight.mean().item()) < 4 * 0.023 / weight.numel() ** 0.5
    assert weight.std().item() == pytest.approx(0.023, rel=0.01)
    assert weight.abs().max() > 3 * 0.023  # normal, not uniform
    assert not module.bias.any()


def test_dtype_follows_torchs_default_and_device_the_machine():
    torch.set_default_dtype(torch.bfloat16)
    try:
        module = te.Linear(IN, OUT)
    finally:
        torch.set_default_dtype(torch.float32)
    assert module.weight.dtype == torch.bfloat16
    assert module.weight.is_cuda == torch.cuda.is_available()


@both
@pytest.mark.parametrize("split", [None, ("q", "k")])
def test_init_method_is_called_on_each_weight_and_on_nothing_else(layer, split, device):
    seen = []
    module = getattr(te, layer)(
        IN, OUT, device=device, parameters_split=split, init_method=lambda w: (seen.append(w.shape), nn.init.constant_(w, 3))
    )
    rows = OUT if split is None else OUT // 2
    assert seen == [(rows, IN)] * (OUT // rows)
    assert all((p == 3).all() for p in parts_of(module, "weight"))
    assert not any(p.any() for p in parts_of(module, "bias"))


@pytest.mark.parametrize(("mode", "dim"), [(None, 0), ("column", 0), ("row", 1)])
def test_attributes_by_which_frameworks_know_a_partitioned_parameter(mode, dim, device):
    for split in (None, ("q", "k")):
        module = te.Linear(IN, OUT, parallel_mode=mode, parameters_split=split, device=device)
        for weight in parts_of(module, "weight"):
            assert (weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride) == (True, dim, 1)
        for bias in parts_of(module, "bias"):  # a row-parallel layer's bias is whole on every rank
            assert getattr(bias, "tensor_model_parallel", False) == (mode != "row")
            assert hasattr(bias, "sequence_parallel") == (mode == "row")


@both
@pytest.mark.parametrize("split", [None, ("q", "k")])
def test_without_bias_the_attribute_stays_readable(layer, split, device):
    module = getattr(te, layer)(IN, OUT, bias=False, parameters_split=split, device=device)
    assert module.bias.numel() == 0
    assert not any(name.endswith("bias") for name in module.state_dict() if not name.startswith("layer_norm_"))


@both
@splits
def test_names_and_sizes_of_split_parameters(split, layer, device):
    argument, sizes = SPLITS[split]
    module = getattr(te, layer)(IN, OUT, parameters_split=argument, device=device)
    mine = [(name, tuple(p.shape)) for name, p in module.named_parameters() if not name.startswith("layer_norm_")]
    weights = [(f"{name}_weight", (rows, IN)) for name, rows in sizes.items()]
    assert mine == weights + [(f"{name}_bias", (rows,)) for name, rows in sizes.items()]


CHANGES = {
    "nothing": lambda m: m,
    "to dtype": lambda m: m.to(torch.bfloat16).to(torch.float32),
    "type": lambda m: m.type(torch.float16).type(torch.float32),
    "to_empty": lambda m: (state := m.state_dict(), m.to_empty(device=m.q_weight.device), m.load_state_dict(state))[1],
    "deepcopy": copy.deepcopy,
    "load": lambda m: (m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}), m)[1],
    "load, assign": lambda m: (m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True), m)[1],
    "optimizer": lambda m: (step(m, features(4, device=m.q_weight.device.type)), torch.optim.Adam(m.parameters()).step(), m)[2],
    "a part assigned": lambda m: (setattr(m, "k_weight", nn.Parameter(m.k_weight.detach().clone())), m)[1],
    "data assigned": lambda m: (setattr(m.q_weight, "data", m.q_weight.detach() * -2), m)[1],
}


@both
@pytest.mark.parametrize("change", CHANGES)
def test_split_parameters_are_views_of_one_buffer_and_what_the_layer_computes_with(change, layer, device):
    changed = CHANGES[change](build(layer, device, parameters_split=SPLITS["dict"][0]))
    x = features(*TOKENS, device=device)
    if change == "data assigned":  # nobody tells the module; it sees at its next call
        changed(x)
    for suffix in ("weight", "bias"):
        assert lie_in_one_buffer(parts_of(changed, suffix))
    for recipe in RECIPES:
        check(changed, x, recipe)


@pytest.mark.parametrize("layer", ["Linear", "LayerNormLinear", "LayerNormMLP"])
def test_a_deep_copy_shares_nothing_and_keeps_every_option(layer, device):
    module = build(layer, device, fuse_wgrad_accumulation=True)
    for p in module.parameters():
        p.main_grad = torch.zeros_like(p)
    other = copy.deepcopy(module)
    for p in other.parameters():
        p.main_grad = torch.zeros_like(p)
    x = features(*TOKENS, device=device)
    assert_same_step(step(other, x), step(module, x))
    for (name, mine), theirs in zip(module.named_parameters(), other.parameters()):
        assert mine.data_ptr() != theirs.data_ptr()
        assert_same_bits(theirs.main_grad, mine.main_grad, name)
    assert not set(module._slots.tolist()) & set(other._slots.tolist())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_torchs_linear_and_ours_load_each_others_state(strict, assign, device):
    ours, theirs = te.Linear(IN, OUT, device=device), nn.Linear(IN, OUT, device=device)
    x = features(5, device=device)
    ours.load_state_dict(theirs.state_dict(), strict=strict, assign=assign)
    assert relative_error(ours(x), theirs(x)) < 1e-6
    other = nn.Linear(IN, OUT, device=device)
    other.load_state_dict(ours.state_dict(), strict=strict, assign=assign)
    assert relative_error(other(x), ours(x)) < 1e-6


@pytest.mark.parametrize("how", ["assign", "register"])
@pytest.mark.parametrize("split", [None, *SPLITS])
@both
def test_a_weight_given_to_a_layer_is_shared(layer, split, how, device):
    module = build(layer, device, parameters_split=None if split is None else SPLITS[split][0])
    kept_bias = torch.cat(parts_of(module, "bias")).detach().clone()
    other = nn.Linear(IN, OUT, device=device)
    if how == "assign":
        module.weight = other.weight
    else:
        module.register_parameter("weight", other.weight)
    names = [name for name, _ in module.named_parameters() if not name.startswith("layer_norm_")]
    assert sorted(names) == ["bias", "weight"]
    assert module.weight is other.weight
    assert_same_bits(module.bias, kept_bias)
    x = features(*TOKENS, device=device)
    check(module, x)
    with torch.no_grad():
        other.weight.mul_(-2)
    check(module, x, "current", formula_of(module))
    assert other.weight.grad is module.weight.grad
    module.bias = other.bias
    assert_same_bits(module(x), module(x))
    check(module, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor")  # torch.compile's own
@pytest.mark.parametrize("tied", [("q_weight",), ("q_weight", "k_weight", "k_bias")])
@pytest.mark.parametrize("compiled", [False, True])
def test_tied_split_parameters_are_read_by_both_layers(compiled, tied, device):
    first, second = (build("Linear", device, parameters_split=("q", "k")) for _ in range(2))
    for name in tied:
        setattr(second, name, getattr(first, name))
    calls = [torch.compile(m, backend="eager", fullgraph=True) if compiled else m for m in (first, second)]
    x = features(*TOKENS, device=device)
    for change in (lambda: None, lambda: first.q_weight.mul_(-1.5), lambda: second.q_weight.mul_(2)):
        with torch.no_grad():
            change()
        for module, call in zip((first, second), calls):
            check(module, x, call=call)
    third = build("Linear", device)
    second.weight = third.weight
    for module in (first, second):
        check(module, x)


def test_an_optimizer_trains_split_and_whole_parameters_alike(device):
    whole = build("Linear", device)
    split = te.Linear(IN, OUT, parameters_split=("q", "k"), device=device)
    with torch.no_grad():
        for suffix in ("weight", "bias"):
            for part, source in zip(parts_of(split, suffix), getattr(whole, suffix).chunk(2)):
                part.copy_(source)
    x, target = features(*TOKENS, device=device), features(*TOKENS, device=device, size=OUT).detach()
    optimizers = [torch.optim.AdamW(module.parameters(), lr=0.02) for module in (whole, split)]
    losses = []
    for _ in range(5):
        for module, optimizer in zip((whole, split), optimizers):
            optimizer.zero_grad()
            loss = (module(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-2] < 0.95 * losses[0]
    torch.testing.assert_close(torch.cat(parts_of(split, "weight")), whole.weight, rtol=1e-4, atol=1e-6)


def test_a_meta_layer_runs_on_meta_tensors_and_materialises(device):
    module = te.Linear(IN, OUT, device="meta")
    assert module(torch.empty(2, 3, IN, device="meta")).shape == (2, 3, OUT)
    module = module.to_empty(device=device)
    module.load_state_dict(build("Linear", device).state_dict())
    check(module, features(*TOKENS, device=device), "delayed")
