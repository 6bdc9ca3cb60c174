"""quantized_model_init: half the memory, the bits of an ordinary layer in the same recipe, and state that goes in and out."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch

import overdrive.pytorch as te
from overdrive.recipe import DelayedScaling, Float8BlockScaling, Float8CurrentScaling, MXFP8BlockScaling
from tests.numerics import assert_close, assert_same_bits
from tests.steps import MODULES, RECIPES, SIZE, batch, fp8, stack

FP8 = ("delayed", "current", "block")
LAYERS = ("linear", "layernorm_linear", "layernorm_mlp", "checkpointing_mlp", "attention", "transformer_layer")
every_recipe = pytest.mark.parametrize("recipe", FP8)
every_layer = pytest.mark.parametrize("name", LAYERS)


def quantized(name, recipe, device, dtype=torch.bfloat16, **options):
    """A layer of tests.steps with weights in FP8 only."""
    with te.quantized_model_init(recipe=RECIPES[recipe], **options):
        return MODULES[name](device=device, params_dtype=dtype).eval()


def settled(name, recipe, device, dtype=torch.bfloat16):
    """An ordinary layer whose delayed scales, if it has any, are those of its weights."""
    layer = stack(name, device=device, dtype=dtype)[0].eval()
    for number in range(2):
        with fp8(RECIPES[recipe]):
            layer(batch(number, device, dtype))
    with fp8(RECIPES[recipe]):  # the step ends where the next begins
        pass
    return layer


def pair(name, recipe, device, dtype=torch.bfloat16):
    """(ordinary layer, the same with weights in FP8 only)."""
    layer, held = settled(name, recipe, device, dtype), quantized(name, recipe, device, dtype)
    held.load_state_dict(layer.state_dict(), strict=True)
    return layer, held


def run(layer, recipe, x, grad=False):
    """layer(x) in FP8."""
    with torch.set_grad_enabled(grad), fp8(None if recipe is None else RECIPES[recipe]):
        return layer(x)


def weights(layer):
    """The FP8 parameters by name."""
    return {name: p for name, p in layer.named_parameters() if isinstance(p, te.Float8Tensor)}


def assert_same_weights(actual, expected):
    actual, expected = weights(actual), weights(expected)
    assert actual.keys() == expected.keys()
    assert actual
    for name, weight in expected.items():
        got, want = actual[name].quantized, weight.quantized
        assert got.mode == want.mode
        assert_same_bits(got.data, want.data, name)
        assert_same_bits(got.scale_inv, want.scale_inv, name)


def storage_bytes(tensors):
    """Bytes of the distinct storages behind the tensors, FP8 ones' data and scales included."""
    plain = []
    for tensor in tensors:
        inner = tensor.quantized if isinstance(tensor, te.Float8Tensor) else None
        plain += [tensor] if inner is None else [t for t in (inner.data, inner.data_t, inner.scale_inv) if t is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in plain}.values())


# --- memory -----------------------------------------------------------------------------------------------------------


@every_recipe
def test_parameters_take_half_the_memory(device, recipe):
    def build():
        options = {"num_gqa_groups": 2, "device": device, "params_dtype": torch.bfloat16, "bias": False}
        return te.TransformerLayer(512, 1024, 4, **options)

    def in_high_precision():
        gc.collect()
        tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.dtype == torch.bfloat16]
        return {t.untyped_storage().data_ptr() for t in tensors if t.numel() >= 512 * 256}

    ordinary, before = build(), in_high_precision()
    with te.quantized_model_init(recipe=RECIPES[recipe]):
        held = build()
    assert storage_bytes(held.parameters()) < 0.51 * storage_bytes(ordinary.parameters())
    x = torch.randn(8, 2, 512).to(device, torch.bfloat16)
    run(held.eval(), recipe, x)
    assert in_high_precision() <= before | {p.untyped_storage().data_ptr() for p in ordinary.parameters()}
    assert storage_bytes(held.state_dict().values()) == storage_bytes(held.parameters())


def test_one_weight_at_a_time_is_built_in_high_precision(device):
    seen = []

    def init(weight):
        assert all(storage() is None for storage in seen), "an earlier weight is still there in high precision"
        torch.nn.init.normal_(weight)
        seen.append(weakref.ref(weight._base if weight._base is not None else weight))

    with te.quantized_model_init():
        for _ in range(2):
            te.LayerNormMLP(64, 128, init_method=init, output_layer_init_method=init, device=device)
    assert len(seen) == 4


@pytest.mark.gpu
def test_peak_memory_of_building(device):
    size = 4096
    te.Linear(16, 16, device=device)  # what all layers share is there
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with te.quantized_model_init(recipe=Float8CurrentScaling()):
        layers = [te.Linear(size, size, bias=False, params_dtype=torch.bfloat16, device=device) for _ in range(8)]
    weight = 2 * size * size
    assert torch.cuda.max_memory_allocated() - before < (0.5 * len(layers) + 1.1) * weight
    assert torch.cuda.memory_allocated() - before < 0.51 * len(layers) * weight


# --- numbers ----------------------------------------------------------------------------------------------------------


@every_recipe
@every_layer
def test_equals_the_ordinary_layer(device, name, recipe):
    layer, held = pair(name, recipe, device)
    for number in range(2):
        x = batch(number, device)
        assert_same_bits(run(held, recipe, x), run(layer, recipe, x))
    assert all(not weight.requires_grad for weight in weights(held).values())
    assert weights(held)


@every_recipe
@every_layer
def test_input_gradients_equal_the_ordinary_layers(device, name, recipe):
    """The transposed copy of the weight is made where an input gradient is owed."""
    layer, held = pair(name, recipe, device)

    def gradients(module):
        for parameter_name, parameter in module.named_parameters():
            parameter.requires_grad_("weight" not in parameter_name or "layer_norm" in parameter_name)
        x = batch(1, device)
        run(module, recipe, x, grad=True).float().square().sum().backward()
        return {"x": x.grad, **{n: p.grad for n, p in module.named_parameters() if p.requires_grad}}

    got, want = gradients(held), gradients(layer)
    assert got.keys() == want.keys()
    for key in want:
        assert_same_bits(got[key], want[key], key)
    assert all(weight.quantized.data_t is None for weight in weights(held).values())


@every_recipe
@every_layer
def test_without_an_autocast_it_computes_with_the_dequantized_weights(device, name, recipe):
    held = pair(name, recipe, device)[1]
    plain = MODULES[name](device=device, params_dtype=torch.bfloat16).eval()
    plain.load_state_dict(held.state_dict(), strict=True)
    x = batch(0, device)
    assert_same_bits(run(held, None, x), run(plain, None, x))
    for calibrating in (False, True):
        with te.autocast(enabled=False, calibrating=calibrating):
            assert_same_bits(held(x), plain(x))
    x, twin = batch(0, device), batch(0, device)
    held(x).float().square().sum().backward()
    plain(twin).float().square().sum().backward()
    assert_same_bits(x.grad, twin.grad)


@every_recipe
def test_near_the_unquantized_layer(device, recipe):
    layer, held = pair("linear", recipe, device)
    x = batch(0, device)
    assert_close(run(held, recipe, x), layer.double()(x.double()), torch.bfloat16, recipe)


def test_delayed_and_current_scaling_serve_each_other(device):
    layer, held = settled("layernorm_mlp", "current", device), quantized("layernorm_mlp", "delayed", device)
    held.load_state_dict(layer.state_dict())
    x = batch(0, device)
    assert_same_bits(run(held, "current", x), run(layer, "current", x))


@pytest.mark.parametrize("recipe", [Float8BlockScaling(x_block_scaling_dim=2, w_block_scaling_dim=1), Float8BlockScaling(True)])
def test_other_block_shapes(device, recipe):
    layer = stack("layernorm_linear", device=device)[0]
    with te.quantized_model_init(recipe=recipe):
        held = MODULES["layernorm_linear"](device=device, params_dtype=torch.bfloat16)
    held.load_state_dict(layer.state_dict())
    x, twin = batch(0, device), batch(0, device)
    with te.autocast(recipe=recipe):
        y, expected = held(x), layer(twin)
    assert_same_bits(y, expected)
    y.float().sum().backward()
    expected.float().sum().backward()
    assert_close(x.grad, twin.grad.double(), torch.bfloat16, "block")


@every_recipe
@pytest.mark.parametrize("sizes", [{"a": 128, "b": 64}, {"a": 10, "b": 6, "c": 160}, {"a": 256}], ids=str)
def test_split_weights_are_quantized_as_one(device, sizes, recipe):
    options = {"parameters_split": sizes, "device": device, "params_dtype": torch.bfloat16}
    features = (144, sum(sizes.values()))
    ordinary = te.Linear(*features, **options)
    with torch.no_grad():  # blocks of different scales
        for name in sizes:
            getattr(ordinary, f"{name}_weight").copy_(torch.randn(sizes[name], 144) * torch.logspace(-3, 3, sizes[name])[:, None])
    with te.quantized_model_init(recipe=RECIPES[recipe]):
        held = te.Linear(*features, **options)
    held.load_state_dict(ordinary.state_dict(), strict=True)
    assert [(n, tuple(p.shape)) for n, p in held.named_parameters()] == [
        (n, tuple(p.shape)) for n, p in ordinary.named_parameters()
    ]
    with te.quantized_model_init(recipe=RECIPES[recipe]):
        whole = te.Linear(*features, device=device, params_dtype=torch.bfloat16)
    parts = [ordinary.state_dict()[f"{n}_{kind}"] for kind in ("weight", "bias") for n in sizes]
    whole.load_state_dict({"weight": torch.cat(parts[: len(sizes)]), "bias": torch.cat(parts[len(sizes) :])})
    assert_same_bits(torch.cat([w.dequantize() for w in weights(held).values()]), whole.weight.dequantize())
    x = torch.randn(32, 144).to(device, torch.bfloat16)
    assert_same_bits(run(held, recipe, x), run(whole, recipe, x))
    again = copy.deepcopy(held)
    again.load_state_dict(held.state_dict())
    assert_same_bits(run(again, recipe, x), run(held, recipe, x))


def test_initial_values_are_those_of_an_ordinary_layer(device):
    for name in LAYERS:
        torch.manual_seed(0)
        with te.quantized_model_init(recipe=RECIPES["current"], preserve_high_precision_init_val=True):
            held = MODULES[name](device=device, params_dtype=torch.bfloat16)
        torch.manual_seed(0)
        ordinary = dict(MODULES[name](device=device, params_dtype=torch.bfloat16).named_parameters())
        for key, weight in weights(held.to(device)).items():
            initial = weight.get_high_precision_init_val()
            assert initial.device.type == "cpu"
            assert_same_bits(initial, ordinary[key])
            weight.clear_high_precision_init_val()
            assert weight.get_high_precision_init_val() is None
    assert next(iter(weights(quantized("linear", "current", device)).values())).get_high_precision_init_val() is None


# --- state ------------------------------------------------------------------------------------------------------------


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_recipe
@every_layer
def test_state_dicts_go_in_and_out(device, name, recipe):
    layer, held = pair(name, recipe, device)
    assert held.state_dict().keys() == layer.state_dict().keys()
    x = batch(0, device)
    expected = run(held, recipe, x)

    twin = quantized(name, recipe, device)
    twin.load_state_dict(held.state_dict(), strict=True)  # in memory: the very bits
    assert_same_weights(twin, held)
    assert_same_bits(run(twin, recipe, x), expected)
    assert not {p.quantized.data.data_ptr() for p in weights(twin).values()} & {
        p.quantized.data.data_ptr() for p in weights(held).values()
    }

    saved = through_a_file(held.state_dict())
    assert all(type(value) is torch.Tensor for value in saved.values())
    layer.load_state_dict(saved, strict=True)
    for key, weight in weights(held).items():
        assert_same_bits(layer.state_dict()[key], weight.dequantize(), key)
    twin.load_state_dict(saved, strict=True)
    for key, weight in weights(twin).items():  # the values; a scale that is no power of two is rounded to bf16 on the way
        assert_close(weight.dequantize(), held.state_dict()[key].dequantize().double(), torch.bfloat16, what=key)
        assert_same_bits(weight.quantized.data, weights(held)[key].quantized.data) if recipe != "block" else None
    third = quantized(name, recipe, device)
    third.load_state_dict(through_a_file(twin.state_dict()))
    assert_same_bits(run(third, recipe, x), run(twin, recipe, x))


@pytest.mark.parametrize("name", ["linear", "layernorm_linear"])
def test_assigning_loads(device, name):
    """load_state_dict(assign=True), as models built on the meta device are loaded."""
    layer, held = pair(name, "current", device)
    with te.quantized_model_init(recipe=RECIPES["current"]):
        empty = MODULES[name](device="meta", params_dtype=torch.bfloat16)
    assert weights(empty)
    assert all(p.is_meta for p in empty.parameters())
    empty.to_empty(device=device).load_state_dict(layer.state_dict())
    x = batch(0, device)
    assert_same_bits(run(empty, "current", x), run(held, "current", x))
    for source in (layer, held):
        quantized_too = quantized(name, "current", device)
        quantized_too.load_state_dict(source.state_dict(), assign=True)
        assert_same_weights(quantized_too, held)
        ordinary = MODULES[name](device=device, params_dtype=torch.bfloat16)
        ordinary.load_state_dict(source.state_dict(), assign=True)
        assert not weights(ordinary)


def test_loading_part_of_a_state_dict(device):
    held = pair("layernorm_linear", "block", device)[1]
    before = held.state_dict()["k_weight"].dequantize()
    missing = held.load_state_dict({"q_weight": torch.ones(SIZE // 2, SIZE)}, strict=False).missing_keys
    assert sorted(missing) == ["k_bias", "k_weight", "layer_norm_bias", "layer_norm_weight", "q_bias"]
    assert (held.q_weight.dequantize() == 1).all()
    assert_close(held.k_weight.dequantize(), before.double(), torch.bfloat16, "block")
    assert held.k_weight.dequantize().any()
    data = held.q_weight.quantized.data.clone()
    held.load_state_dict({"q_bias": torch.ones(SIZE // 2)}, strict=False)
    assert_same_bits(held.q_weight.quantized.data, data)
    assert (held.q_bias == 1).all()


@every_recipe
def test_loads_stay_in_place(device, recipe):
    """CUDA graphs know addresses, and a layer may share its weight."""
    held, other = quantized("linear", recipe, device), quantized("linear", recipe, device)
    other.weight, other.bias = held.weight, held.bias
    before = held.weight.quantized.data.data_ptr(), held.weight.quantized.scale_inv.data_ptr()
    for source in (stack("linear", device=device)[0], quantized("linear", recipe, device)):
        held.load_state_dict(source.state_dict())
        assert (held.weight.quantized.data.data_ptr(), held.weight.quantized.scale_inv.data_ptr()) == before
        x = batch(0, device)
        assert_same_bits(run(other, recipe, x), run(held, recipe, x))


def test_loads_that_do_not_fit(device):
    held = quantized("linear", "current", device)
    before = held.weight.quantized.data.clone()
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        held.load_state_dict({"weight": torch.ones(3, SIZE), "bias": torch.ones(SIZE)})
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight"'):
        held.load_state_dict({"bias": torch.ones(SIZE)})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"other"'):
        held.load_state_dict({**held.state_dict(), "other": torch.ones(1)})
    assert_same_bits(held.weight.quantized.data, before)


@every_recipe
@every_layer
def test_copies(device, name, recipe):
    held = pair(name, recipe, device)[1]
    x = batch(0, device)
    expected = run(held, recipe, x)
    for twin in (copy.deepcopy(held), pickle.loads(pickle.dumps(held))):
        assert_same_weights(twin, held)
        assert_same_bits(run(twin, recipe, x), expected)
        with torch.no_grad():
            for weight in weights(twin).values():
                weight.quantized.data.view(torch.uint8).zero_()
        assert not (run(twin, recipe, x) == expected).all(), "the copy's parameters are not what it computes with"
    assert_same_bits(run(held, recipe, x), expected)
    state = copy.deepcopy(held.state_dict())
    for weight in weights(held).values():
        weight.quantized.data.view(torch.uint8).zero_()
    held.load_state_dict(state)
    assert_same_bits(run(held, recipe, x), expected)


@every_recipe
def test_moves_and_dtypes(device, recipe):
    held = pair("layernorm_linear", recipe, device)[1]
    scales = {name: weight.quantized.scale_inv.clone() for name, weight in weights(held).items()}
    twin = copy.deepcopy(held).to("cpu").to(device)
    assert_same_weights(twin, held)
    changes = {
        torch.float32: (lambda m: m.float(), lambda m: m.to(torch.float32), lambda m: m.type(torch.float32)),
        torch.float16: (lambda m: m.half(), lambda m: m.to(dtype=torch.float16), lambda m: m.type(torch.float16)),
    }
    for dtype, change in [(to, change) for to, ways in changes.items() for change in ways]:
        changed = change(copy.deepcopy(held))
        x = batch(0, device, dtype)
        assert run(changed, recipe, x).dtype == dtype
        for name, weight in weights(changed).items():
            assert weight.dtype == dtype
            assert weight.quantized.data.dtype == torch.float8_e4m3fn
            assert_same_bits(weight.quantized.scale_inv, scales[name])
            assert_same_bits(weight.quantized.data, weights(held)[name].quantized.data)
    attributes = ("tensor_model_parallel", "partition_dim", "partition_stride")
    assert all(hasattr(held.q_weight, name) for name in attributes)
    if device == "cuda":
        assert all(p.device.type == "cpu" for p in copy.deepcopy(held).cpu().parameters())


def test_under_torch_autocast(device):
    layer = settled("layernorm_mlp", "current", device, torch.float32)
    held = quantized("layernorm_mlp", "current", device, torch.float32)
    held.load_state_dict(layer.state_dict())
    x = batch(0, device)
    with torch.autocast(device, torch.bfloat16):
        y, plain = run(held, "current", x), run(held, None, x)
    assert (y.dtype, plain.dtype) == (torch.bfloat16, torch.bfloat16)
    expected = layer.double()(x.double())
    assert_close(y, expected, torch.bfloat16, "current", depth=2)
    assert_close(plain, expected, torch.bfloat16, "current", depth=2)


# --- use --------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*Online softmax.*")
@pytest.mark.parametrize("recipe", ["plain", *FP8])
@pytest.mark.parametrize(
    ("name", "grad"), [("linear", False), ("layernorm_linear", True), ("layernorm_mlp", True), ("transformer_layer", False)]
)
def test_compiles_to_one_graph(device, name, recipe, grad):
    torch._dynamo.reset()
    held = pair(name, "current" if recipe == "plain" else recipe, device)[1].requires_grad_(False)
    compiled = torch.compile(copy.deepcopy(held), fullgraph=True, backend="aot_eager")

    def results(module):
        x = batch(0, device)
        y = run(module, None if recipe == "plain" else recipe, x, grad)
        if grad:
            y.float().square().sum().backward()
        return y, x.grad

    for got, want in zip(results(compiled), results(held)):
        assert (got is None) == (want is None)
        assert want is None or assert_same_bits(got, want) is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@every_recipe
def test_layers_share_one_graph(device, recipe):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layers = [pair("layernorm_mlp", recipe, device)[1] for _ in range(3)]
    body = torch.compile(lambda layer, x: layer(x), fullgraph=True, backend="aot_eager")
    with torch.no_grad(), fp8(RECIPES[recipe]):
        x = batch(0, device)
        for layer in layers:
            assert_same_bits(body(layer, x), layer(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@every_recipe
def test_microbatches_and_fp8_outputs(device, recipe):
    layer, held = pair("linear", recipe, device)
    x = batch(0, device)
    with torch.no_grad(), fp8(RECIPES[recipe]):
        for first in (True, False):
            assert_same_bits(held(x, is_first_microbatch=first), layer(x, is_first_microbatch=first))
        assert_same_bits(held(held(x, fp8_output=True)), layer(layer(x, fp8_output=True)))


@every_recipe
def test_generation(device, recipe):
    """A model of several layers makes the same tokens as the ordinary one, prefix after prefix, weights never quantized again."""
    vocabulary, new = 32, 4
    torch.manual_seed(0)
    table = torch.randn(vocabulary, SIZE).to(device, torch.bfloat16)
    ordinary = torch.nn.Sequential(*(settled("transformer_layer", recipe, device) for _ in range(2)))
    with te.quantized_model_init(recipe=RECIPES[recipe]):
        make = MODULES["transformer_layer"]
        held = torch.nn.Sequential(*(make(device=device, params_dtype=torch.bfloat16) for _ in range(2))).eval()
    held.load_state_dict(ordinary.state_dict(), strict=True)

    @torch.inference_mode()
    def generate(model):
        tokens = torch.arange(2 * 16, device=device).view(2, 16) % vocabulary
        for _ in range(new):
            with warnings.catch_warnings(), fp8(RECIPES[recipe]):
                warnings.simplefilter("ignore")  # token counts are no multiples of 16
                logits = model(table[tokens])[:, -1] @ table.t()
            tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), 1)
        return tokens

    assert torch.equal(generate(held), generate(ordinary))


def test_whole_weights_can_be_shared(device):
    layer, other = quantized("layernorm_linear", "current", device), quantized("linear", "current", device)
    layer.weight, layer.bias = other.weight, other.bias  # replaces the parts
    assert layer.weight is other.weight
    assert dict(layer.named_parameters()).keys() == {"layer_norm_weight", "layer_norm_bias", "weight", "bias"}
    x = batch(0, device)
    norm = te.LayerNorm(SIZE, device=device, params_dtype=torch.bfloat16)
    with torch.no_grad(), te.autocast(recipe=RECIPES["current"]):
        assert_same_bits(layer(x), other(norm(x, fp8_output=True)))
    layer.weight = torch.nn.Parameter(torch.zeros(SIZE, SIZE, dtype=torch.bfloat16, device=device))
    assert_same_bits(run(layer, "current", x), layer.bias.expand(x.shape))
    run(layer, "current", x, grad=True).float().sum().backward()
    assert layer.weight.grad is not None


# --- errors -----------------------------------------------------------------------------------------------------------


@every_layer
def test_training_is_refused(device, name):
    held = quantized(name, "current", device).train()
    run(held, "current", batch(0, device), grad=True).float().sum().backward()  # no weight gradient is owed
    held.requires_grad_(True)
    for recipe in (None, "current"):
        with pytest.raises(NotImplementedError, match="training with FP8 primary weights"):
            run(held, recipe, batch(0, device), grad=True)
    run(held, "current", batch(0, device))


@pytest.mark.parametrize(
    ("built", "used"), [("block", "current"), ("block", "delayed"), ("current", "block"), ("delayed", "block")]
)
def test_another_recipe_at_run_time(device, built, used):
    held = quantized("layernorm_mlp", built, device)
    with pytest.raises(RuntimeError, match=r"LayerNormMLP: its weight was quantized as .* cannot read .* same recipe"):
        run(held, used, batch(0, device))


def test_in_place_changes_and_foreign_assignments_are_refused(device):
    held, split = quantized("linear", "current", device), quantized("layernorm_linear", "current", device)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="cannot be changed in place"):
        held.weight.zero_()
    with pytest.raises(NotImplementedError, match="is a part of one FP8 weight"):
        split.q_weight = torch.nn.Parameter(torch.zeros(SIZE // 2, SIZE))
    with pytest.raises(NotImplementedError, match="only layers built in quantized_model_init"):
        MODULES["linear"](device=device).weight = held.weight
    assert weights(split).keys() == {"q_weight", "k_weight"}


def test_what_fp8_does_not_take_stays(device):
    with te.quantized_model_init(), pytest.warns(UserWarning, match=r"divisible by 16, this layer has 24 x 40: its weight stays"):
        layer = te.Linear(24, 40, device=device)
    assert not weights(layer)
    assert layer(torch.ones(2, 24, device=device)).shape == (2, 40)


def test_nesting(device):
    def build():
        return bool(weights(te.Linear(16, 16, device=device)))

    assert te.fp8_model_init is te.quantized_model_init
    assert not build()
    with te.quantized_model_init():
        assert build()
        with te.fp8_model_init(enabled=False):
            assert not build()
        assert build()
        with contextlib.suppress(ZeroDivisionError), te.quantized_model_init(enabled=False):
            raise ZeroDivisionError
        assert build()
    assert not build()


def test_bad_recipes():
    with (
        pytest.raises(TypeError, match=r"quantized_model_init: recipe must be a recipe .* got type"),
        te.quantized_model_init(recipe=DelayedScaling),
    ):
        pass
    with (
        pytest.raises(NotImplementedError, match="MXFP8BlockScaling cannot run here"),
        te.quantized_model_init(recipe=MXFP8BlockScaling()),
    ):
        pass
