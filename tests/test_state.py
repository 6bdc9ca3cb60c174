"""State: what state dicts hold, that training resumes bit for bit, what foreign checkpoints do, and whose slots are whose."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings

import pytest
import torch

import overdrive.pytorch as te
from overdrive.ops.scaling import UNTOUCHED, arena, record_amax, tenant_id
from overdrive.recipe import DelayedScaling
from overdrive.scaling.arena import SLOTS, SlotRange
from tests.numerics import assert_same_bits
from tests.steps import MODULES, RECIPES, SIZE, assert_same, batch, fp8, stack, states, train

DELAYED = RECIPES["delayed"]
LAYERS = ("linear", "layernorm_linear", "layernorm_mlp", "transformer_layer")


def quantizing(module, recipe=DELAYED):
    """`module` in FP8."""

    def call(x):
        with fp8(recipe):
            return module(x)

    return call


def saved(module):
    """The state dict after a trip through a file that may hold only tensors."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


KEYS = {
    "linear": ["weight", "bias"],
    "layernorm": ["weight", "bias"],
    "rmsnorm": ["weight"],
    "layernorm_linear": ["layer_norm_weight", "layer_norm_bias", "q_weight", "k_weight", "q_bias", "k_bias"],
    "layernorm_mlp": ["layer_norm_weight", "layer_norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"],
    "transformer_layer": [
        *(
            f"self_attention.layernorm_qkv.{name}"
            for name in [
                *("layer_norm_weight", "layer_norm_bias", "query_weight", "key_weight", "value_weight"),
                *("query_bias", "key_bias", "value_bias"),
            ]
        ),
        *("self_attention.proj.weight", "self_attention.proj.bias"),
        *(f"layernorm_mlp.{name}" for name in ["layer_norm_weight", "layer_norm_bias", "fc1_weight", "fc1_bias", "fc2_weight"]),
        "layernorm_mlp.fc2_bias",
    ],
}


@pytest.mark.parametrize("name", KEYS)
def test_keys(device, name):
    assert sorted(MODULES[name](device=device).state_dict()) == sorted(KEYS[name])


@pytest.mark.parametrize("recipe", RECIPES)
def test_extra_state_only_where_scales_are_delayed(device, recipe):
    layers = stack(*LAYERS, device=device)
    train(layers, quantizing(layers, RECIPES[recipe]), 2)
    found = states(layers)
    if recipe != "delayed":
        assert not found
        return
    assert {name.rsplit(".", 1)[0] for name in found} >= {str(i) for i, name in enumerate(LAYERS) if name != "transformer_layer"}
    for state in found.values():
        assert type(state) is torch.Tensor
        assert state.dtype == torch.float32
        assert not state.requires_grad


def test_extra_state_holds_scales_pending_amaxes_and_history(device):
    layer = stack("linear", device=device)
    call = quantizing(layer)
    inputs = [batch(number, device) for number in range(5)]
    for x in inputs:
        call(x).float().sum().backward()
    scales, pending, *history = states(layer)["0._extra_state"]
    amaxes = [x.detach().abs().max().float() for x in inputs]
    assert_same_bits(pending[0], amaxes[4])
    assert_same_bits(torch.stack([row[0] for row in history[-3:]]), torch.stack(amaxes[1:4]))
    assert_same_bits(scales[0], torch.full_like(amaxes[0], 448) / torch.stack(amaxes[1:4]).max())
    assert pending[2] == UNTOUCHED, "the output slot is not used"


def test_loading_inside_an_autocast_takes_effect_at_once(device):
    layers, other, x = stack("linear", device=device), stack("linear", device=device), batch(3, device)
    train(layers, quantizing(layers), 3)
    with fp8(DELAYED):
        expected = layers(x)
        state = saved(layers)
    with fp8(DELAYED):
        other.load_state_dict(state)
        assert_same_bits(other(x), expected)


LENGTHS = {"before_the_ring_is_full": 2, "full": 3, "wrapped": 5, "wrapped_twice": 7}


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("before", LENGTHS.values(), ids=LENGTHS)
def test_a_loaded_model_goes_on_bit_for_bit(device, before, used):
    other, layers = stack(*LAYERS, device=device, seed=2), stack(*LAYERS, device=device)
    if used:
        train(other, quantizing(other), 4, first=20)
    train(layers, quantizing(layers), before)
    other.load_state_dict(saved(layers))
    assert_same(states(other), states(layers))
    assert_same(train(other, quantizing(other), 5, before), train(layers, quantizing(layers), 5, before))


@pytest.mark.parametrize("when", ["after_forward", "after_backward_only_of_some", "after_step"])
def test_going_on_from_the_middle_of_a_step(device, when):
    def half(layers, number):
        x = batch(number, device)
        with fp8(DELAYED):
            y = layers(x)
        if when != "after_forward":
            (y if when == "after_step" else layers[1](layers[0](x))).float().sum().backward()

    layers, other = stack(*LAYERS, device=device), stack(*LAYERS, device=device, seed=2)
    train(layers, quantizing(layers), 2)
    half(layers, 2)
    other.load_state_dict(saved(layers))
    assert_same(train(other, quantizing(other), 4, 3), train(layers, quantizing(layers), 4, 3))


def test_slots_with_histories_of_different_length(device):
    layers, other = stack("linear", "linear", "linear", device=device), stack("linear", "linear", "linear", device=device)
    for number in range(4):
        with fp8(DELAYED), torch.set_grad_enabled(True):
            x = batch(number, device)
            y = layers[: 1 + number % 3](x)
            if number != 1:
                y.float().sum().backward()
    other.load_state_dict(saved(layers))
    assert_same(states(other), states(layers))
    assert_same(train(other, quantizing(other), 5, 4), train(layers, quantizing(layers), 5, 4))


def test_loading_into_another_history_length(device):
    """The newest entries count; a longer history than was saved starts with what there is."""
    layers = stack("linear", device=device)
    train(layers, quantizing(layers), 5)
    for length in (2, 6):
        other = stack("linear", device=device)
        other.load_state_dict(saved(layers))
        train(other, quantizing(other, DelayedScaling(amax_history_len=length)), 1, 5)
        history = states(other)["0._extra_state"][2:, 0]
        kept = states(layers)["0._extra_state"][1:, 0]  # its pending amax, then the history
        assert history[-1] == kept[0]
        scale = states(other)["0._extra_state"][0, 0]
        window = torch.cat((kept[1:], kept[:1]))[-length:]
        assert_same_bits(scale, torch.full_like(scale, 448) / window.max())


@pytest.mark.parametrize("plain", [torch.nn.Linear(SIZE, 32), torch.nn.LayerNorm(SIZE), torch.nn.RMSNorm(SIZE)], ids=repr)
def test_state_dicts_of_torch_load(device, plain):
    sizes = (SIZE, 32) if isinstance(plain, torch.nn.Linear) else (SIZE,)
    layer = getattr(te, type(plain).__name__)(*sizes, device=device)
    assert str(layer.load_state_dict(plain.state_dict(), strict=True)) == "<All keys matched successfully>"
    for name, parameter in plain.named_parameters():
        assert_same_bits(getattr(layer, name), parameter)
    plain.load_state_dict({name: tensor.cpu() for name, tensor in layer.state_dict().items()}, strict=True)


class Bomb:
    """Calls `exec` when unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


PICKLED = pickle.dumps(Bomb())
FOREIGN = {
    "bytesio": lambda: io.BytesIO(PICKLED),
    "uint8": lambda: torch.frombuffer(bytearray(PICKLED), dtype=torch.uint8),
    "bytes": lambda: PICKLED,
    "dict": lambda: {"scale_fwd": torch.ones(3)},
}


def names_of_extra_states(module):
    """Where Transformer Engine writes one: wherever it keeps FP8 state, also in attention."""
    keepers = [name for name, part in module.named_modules() if hasattr(part, "_slot_range") or name.endswith("core_attention")]
    return [f"{name}._extra_state".removeprefix(".") for name in keepers]


@pytest.mark.parametrize("foreign", FOREIGN)
@pytest.mark.parametrize("name", [name for name in MODULES if name != "checkpointing_mlp"])
def test_transformer_engine_checkpoints_load_and_nothing_is_unpickled(device, name, foreign):
    module, other = MODULES[name](device=device), MODULES[name](device=device)
    state = other.state_dict()
    for key in names_of_extra_states(other):
        state[key] = FOREIGN[foreign]()
    with pytest.warns(UserWarning, match="_extra_state is not overdrive's"):
        assert str(module.load_state_dict(state, strict=True)) == "<All keys matched successfully>"
    assert state.keys() >= set(names_of_extra_states(other)), "the caller's dict was changed"
    for key, tensor in other.state_dict().items():
        assert_same_bits(module.state_dict()[key], tensor)


@pytest.mark.parametrize("empty", [torch.empty(0, dtype=torch.uint8), torch.empty(0), None], ids=["uint8", "float32", "none"])
@pytest.mark.parametrize("name", [name for name in MODULES if name != "checkpointing_mlp"])
def test_empty_extra_states_load_silently(device, name, empty):
    module = MODULES[name](device=device)
    state = module.state_dict() | dict.fromkeys(names_of_extra_states(module), empty)
    module.load_state_dict(state, strict=True)


def test_state_of_another_shape_is_named(device):
    layer = te.Linear(SIZE, SIZE, device=device)
    with pytest.raises(RuntimeError, match=r"_extra_state: scaling state must be float32 of shape \[2 \+ steps, 5\]"):
        layer.load_state_dict(layer.state_dict() | {"_extra_state": torch.ones(3, 4)})


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": lambda module: torch_saved(module),
}


def torch_saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("trained", [0, 4])
@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_copies_have_slots_of_their_own_with_equal_state(device, make, trained):
    layers, twin = stack(*LAYERS, device=device), stack(*LAYERS, device=device)
    for module in (layers, twin):
        train(module, quantizing(module), trained)
    copied = make(layers)
    assert_same(states(copied), states(layers))
    expected = train(twin, quantizing(twin), 4, trained)
    train(layers, quantizing(layers), 3, 30)  # must not reach the copy
    assert_same(train(copied, quantizing(copied), 4, trained), expected)


def test_to_another_dtype_keeps_the_state(device):
    layers = stack(*LAYERS, device=device)
    train(layers, quantizing(layers), 3)
    before = states(layers)
    layers.float().to(torch.bfloat16)
    assert_same(states(layers), before)
    assert all(buffer.dtype == torch.int32 for name, buffer in layers.named_buffers() if name.endswith("_slots"))
    train(layers, quantizing(layers), 1, 3)


def test_meta_and_back(device):
    layers = stack(*LAYERS, device=device)
    train(layers, quantizing(layers), 3)
    state = saved(layers)
    layers.to("meta")
    assert not states(layers)
    layers.to_empty(device=device)
    layers.load_state_dict(state)
    twin = stack(*LAYERS, device=device)
    train(twin, quantizing(twin), 3)
    assert_same(train(layers, quantizing(layers), 3, 3), train(twin, quantizing(twin), 3, 3))


def test_built_on_meta(device):
    layers, twin = stack("linear", "layernorm_linear", device=device), stack("linear", "layernorm_linear", device=device)
    with torch.device("meta"):
        empty = torch.nn.Sequential(*(MODULES[name](device="meta", params_dtype=torch.bfloat16) for name in LAYERS[:2]))
    empty.to_empty(device=device).load_state_dict(layers.state_dict())
    assert_same(train(empty, quantizing(empty), 3), train(twin, quantizing(twin), 3))


@pytest.mark.parametrize("assign", [False, True])
def test_loading_keeps_split_weights_in_one_buffer(device, assign):
    layers, other = stack("layernorm_linear", device=device), stack("layernorm_linear", device=device, seed=2)
    other.load_state_dict(saved(layers), assign=assign)
    other.to(device)
    assert other[0].k_weight.data_ptr() == other[0].q_weight.data_ptr() + other[0].q_weight.nbytes
    assert_same(train(other, quantizing(other), 2), train(layers, quantizing(layers), 2))


def test_slots_return_clean_when_modules_die(device):
    gc.collect()
    layers = stack(*LAYERS, device=device)
    train(layers, quantizing(layers), 4)
    taken = {range_.start for range_ in ranges(layers)}
    before = SLOTS.count
    del layers
    gc.collect()
    again = stack(*LAYERS, device=device)
    assert {range_.start for range_ in ranges(again)} == taken
    assert SLOTS.count == before
    assert not states(again)
    twin = stack(*LAYERS, device=device)
    assert_same(train(again, quantizing(again), 4), train(twin, quantizing(twin), 4))


def test_slots_return_clean_where_layers_only_pass_through(monkeypatch):
    """On a machine with a GPU, ops may record into the CPU's slots as well."""
    cpu = torch.device("cpu")
    own = SlotRange(1, cpu)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    arena(cpu).reserve(own.end)
    record_amax(arena(cpu).counter, torch.ones(3), own.indices(cpu), 0, tenant_id(DELAYED, None))
    start = own.start
    assert arena(cpu).amax[start] == 1
    del own
    assert SlotRange(1, cpu).start == start
    assert (arena(cpu).amax[start : start + 5] == UNTOUCHED).all()


def ranges(module):
    return [m._slot_range for m in module.modules() if getattr(m, "_slot_range", None) is not None]


def test_many_more_slots_than_at_first(device):
    """The arena grows under a trained model without touching its state."""
    layers, twin = stack("linear", device=device), stack("linear", device=device)
    expected = train(twin, quantizing(twin), 7)
    train(layers, quantizing(layers), 4)
    before, capacity = states(layers), SLOTS.capacity
    crowd = [te.Linear(16, 16, device=device) for _ in range(capacity // 5 + 1)]
    assert SLOTS.capacity > capacity
    assert_same(states(layers), before)
    assert_same(train(layers, quantizing(layers), 3, 4), expected[4:])
    del crowd


def test_state_dict_hooks_and_prefixes_see_it(device):
    layers = stack("linear", device=device)
    train(layers, quantizing(layers), 1)
    destination = {}
    torch.nn.ModuleDict({"a": layers}).state_dict(destination=destination, prefix="p.")
    assert "p.a.0._extra_state" in destination
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.nn.ModuleDict({"a": stack("linear", device=device)}).load_state_dict(
            {name.removeprefix("p."): tensor for name, tensor in destination.items()}
        )
