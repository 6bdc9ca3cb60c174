"""`Float8Tensor`: fp8_output=True hands the next layer an FP8 tensor, which looks plain to everybody else."""

from __future__ import annotations

import collections
import io
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import overdrive.pytorch as te
from overdrive.recipe import Float8BlockScaling
from tests.numerics import assert_close, assert_same_bits
from tests.steps import MODULES, RECIPES, SIZE, assert_same, batch, fp8, stack, states, train

FP8 = ("delayed", "current", "block")
PRODUCERS = ("linear", "layernorm", "rmsnorm")
produced = pytest.mark.parametrize(("producer", "recipe"), list(itertools.product(PRODUCERS, FP8)))


def produce(producer, recipe, device, grad=True):
    """(layer, its Float8Tensor)."""
    layer = stack(producer, device=device)[0]
    with fp8(RECIPES[recipe]), torch.set_grad_enabled(grad):
        return layer, layer(batch(0, device), fp8_output=True)


class Count(TorchDispatchMode):
    """Counts the calls of overdrive's ops."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "overdrive":
            self.calls[func.name().removeprefix("overdrive::")] += 1
        return func(*args, **(kwargs or {}))


@produced
def test_looks_like_its_values(device, producer, recipe):
    layer, q = produce(producer, recipe, device)
    x = batch(0, device)
    plain = layer(x)
    assert isinstance(q, te.Float8Tensor)
    assert (q.shape, q.dtype, q.device, q.requires_grad) == (plain.shape, plain.dtype, plain.device, True)
    assert type(q.dequantize()) is torch.Tensor
    assert q.dequantize(torch.float32).dtype == torch.float32
    expected = layer.double()(x.double())
    assert_close(q.dequantize(), expected, torch.bfloat16, recipe, "values", depth=2 if producer == "linear" else 1)
    mode = {"block": "block_1d"}.get(recipe, recipe)
    assert repr(q).startswith(
        f"Float8Tensor(shape=[2, 16, {SIZE}], dtype=torch.bfloat16, fp8_dtype=torch.float8_e4m3fn, scaling={mode}, data=tensor("
    )


OPERATIONS = {
    "add": lambda x: x + 1,
    "matmul": lambda x: x @ x.transpose(-1, -2),
    "float": lambda x: x.float(),
    "sum": lambda x: x.sum(),
    "view": lambda x: x.view(-1, SIZE),
    "flatten": lambda x: x.flatten(),
    "split": lambda x: x.split(16, -1)[1],
    "index": lambda x: x[0, 3],
    "transpose": lambda x: x.transpose(0, 1),
    "contiguous": lambda x: x.contiguous(),
    "clone": lambda x: x.clone(),
    "stack": lambda x: torch.stack([x, x]),
    "isfinite": lambda x: x.isfinite(),
    "linear": lambda x: torch.nn.functional.linear(x, torch.ones(4, SIZE, dtype=x.dtype, device=x.device)),
    "layer_norm": lambda x: torch.nn.functional.layer_norm(x, (SIZE,)),
    "to": lambda x: x.to(torch.float16),
    "numpy": lambda x: torch.from_numpy(x.float().cpu().numpy()),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("recipe", FP8)
def test_every_other_operation_sees_plain_values(device, name, recipe):
    if name == "numpy":
        pytest.importorskip("numpy")
    q = produce("layernorm", recipe, device)[1].detach()
    operation = OPERATIONS[name]
    got, expected = operation(q), operation(q.dequantize())
    if isinstance(got, te.Float8Tensor):
        got = got.dequantize()
    assert_same_bits(got, expected)
    assert_same_bits(torch.as_tensor(q.dequantize()), produce("layernorm", recipe, device)[1].detach().dequantize())


def test_in_place_changes_are_refused_not_lost(device):
    q = produce("layernorm", "current", device)[1].detach()
    for change in (lambda: q.mul_(2), q.zero_, lambda: q.copy_(torch.ones_like(q)), lambda: torch.add(q, 1, out=q)):
        with pytest.raises((NotImplementedError, RuntimeError)):
            change()
    plain = torch.empty(q.shape, dtype=q.dtype, device=device)
    assert_same_bits(plain.copy_(q), q.dequantize())
    assert_same_bits(plain.add_(q), 2 * q.dequantize())


@produced
def test_saving_stores_the_plain_values(device, producer, recipe):
    q = produce(producer, recipe, device)[1]
    file = io.BytesIO()
    torch.save({"q": q}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["q"]
    assert type(loaded) is torch.Tensor
    assert_same_bits(loaded, q.dequantize())


@produced
def test_gradients_flow_as_through_the_plain_output(device, producer, recipe):
    def run(fp8_output):
        layer, x = stack(producer, device=device)[0], batch(0, device)
        with fp8(RECIPES[recipe]):
            y = layer(x, fp8_output=fp8_output)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
        (y * dy).sum().backward()
        return {"dx": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}

    assert_same(run(True), run(False))


@produced
def test_the_next_linear_does_not_quantize_it_again(device, producer, recipe):
    def count(fp8_output):
        layers = stack(producer, "linear", device=device)
        with fp8(RECIPES[recipe]), Count() as counted:
            layers[1](layers[0](batch(0, device), fp8_output=fp8_output))
        return counted.calls["quantize"]

    # a linear quantizes its input and weight, one with fp8_output its output as well; a norm quantizes while it normalizes
    assert (count(True), count(False)) == ((4, 4) if producer == "linear" else (1, 2))


@pytest.mark.parametrize("recipe", FP8)
def test_a_linear_after_a_linear_gets_what_it_would_have_made(device, recipe):
    def run(fp8_output):
        layers = stack("linear", "linear", device=device)

        def call(x):
            with fp8(RECIPES[recipe]):
                return layers[1](layers[0](x, fp8_output=fp8_output))

        return [{k: v for k, v in results.items() if "state" not in k} for results in train(layers, call, 5)]

    assert_same(run(True), run(False))


@pytest.mark.parametrize("recipe", FP8)
@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_a_linear_after_a_norm_is_a_layernorm_linear(device, normalization, recipe):
    both = {"device": device, "params_dtype": torch.bfloat16}
    torch.manual_seed(0)
    fused = te.LayerNormLinear(SIZE, SIZE, normalization=normalization, **both)
    norm, linear = getattr(te, normalization)(SIZE, **both), te.Linear(SIZE, SIZE, **both)
    linear.load_state_dict({name: fused.state_dict()[name] for name in ("weight", "bias")})
    pair = torch.nn.ModuleList([norm, linear])

    def two(x):
        with fp8(RECIPES[recipe]):
            return linear(norm(x, fp8_output=True))

    def one(x):
        with fp8(RECIPES[recipe]):
            return fused(x)

    renamed = {"d0.weight": "dlayer_norm_weight", "d0.bias": "dlayer_norm_bias", "d1.weight": "dweight", "d1.bias": "dbias"}
    got = [{renamed.get(k, k): v for k, v in r.items() if "state" not in k} for r in train(pair, two, 5)]
    assert_same(got, [{k: v for k, v in r.items() if "state" not in k} for r in train(fused, one, 5)])


CONSUMERS = ("linear", "layernorm_linear", "layernorm_mlp", "layernorm", "transformer_layer")


@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize(("made", "used"), [*itertools.product(FP8, ["plain"]), ("block", "current"), ("delayed", "block")])
def test_layers_that_cannot_take_it_read_its_values(device, consumer, made, used):
    def run(dequantize):
        x, layer = batch(0, device), stack(consumer, device=device, seed=3).eval()
        q = produce("layernorm", made, device)[1].detach()
        q = q.dequantize() if dequantize else q
        with fp8(RECIPES[used]):
            y = layer(q.requires_grad_())
        assert type(y) is torch.Tensor
        y.float().square().sum().backward()
        return {"y": y, "dq": q.grad, **{name: p.grad for name, p in layer.named_parameters()}, "x": x}

    assert_same(run(False), run(True))


def test_blocks_of_another_shape_are_not_multiplied_with_each_other(device):
    """A 128x128-block activation from one recipe meets 128x128-block weights of another: no GEMM takes both."""
    made, used = Float8BlockScaling(x_block_scaling_dim=2, w_block_scaling_dim=1), Float8BlockScaling()
    norm, linear = stack("layernorm", device=device)[0], stack("linear", device=device)[0]
    with te.autocast(recipe=made):
        q = norm(batch(0, device), fp8_output=True)
    with te.autocast(recipe=used), Count() as counted:
        got = linear(q)
    assert counted.calls["quantize"] == 2
    with te.autocast(recipe=used):
        assert_same_bits(got, linear(q.dequantize()))


@pytest.mark.parametrize("recipe", FP8)
def test_made_without_gradients_used_with_them(device, recipe):
    """Its FP8 data lacks the transposed copy that a weight gradient reads."""
    _, q = produce("layernorm", recipe, device, grad=False)
    layer = stack("linear", device=device)
    with fp8(RECIPES[recipe]):
        layer(q).float().sum().backward()
    assert layer[0].weight.grad.isfinite().all()
    assert layer[0].weight.grad.any()


@pytest.mark.parametrize("producer", PRODUCERS)
def test_outside_of_autocast_it_is_a_plain_tensor(device, producer):
    layer = stack(producer, device=device)[0]
    x = batch(0, device)
    assert type(layer(x, fp8_output=True)) is torch.Tensor
    assert_same_bits(layer(x, fp8_output=True), layer(x))
    with te.autocast(enabled=False, calibrating=True):
        assert type(layer(x, fp8_output=True)) is torch.Tensor


@pytest.mark.parametrize("recipe", FP8)
@pytest.mark.parametrize("shape", [(0, SIZE), (1, SIZE), (5, 3, SIZE)], ids=str)
def test_odd_token_counts(device, recipe, shape, recwarn):
    x = torch.randn(shape).to(device, torch.bfloat16)
    layers = stack("layernorm", "linear", device=device)
    with fp8(RECIPES[recipe]):
        q = layers[0](x, fp8_output=True)
        y = layers[1](q)
    assert q.shape == y.shape == x.shape
    assert q.dequantize().shape == x.shape
    y.float().sum().backward()
    assert layers[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("recipe", FP8)
def test_under_checkpoint(device, recipe):
    def run(save):
        layers = stack("layernorm", "linear", device=device)

        def body(x):
            return layers[1](layers[0](x, fp8_output=True))

        def call(x):
            with fp8(RECIPES[recipe]):
                return save(body, x)

        return train(layers, call, 3)

    expected = run(lambda body, x: body(x))
    for use_reentrant in (True, False):
        assert_same(run(lambda body, x, r=use_reentrant: te.checkpoint(body, x, use_reentrant=r)), expected)


def test_the_norm_keeps_a_scale(device):
    norm = stack("layernorm", device=device)
    train(norm, lambda x: call_norm(norm, x), 3)
    assert states(norm)["0._extra_state"][0, 0] != 1
    assert set(MODULES) >= set(PRODUCERS)


def call_norm(norm, x):
    with fp8(RECIPES["delayed"]):
        return norm[0](x, fp8_output=True) + 0
