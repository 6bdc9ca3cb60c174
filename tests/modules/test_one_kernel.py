"""LayerNormLinear with few tokens and no backward to come: one op for norm and product, and when it is used."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import overdrive.pytorch as te
from overdrive.functional import layernorm_linear as stage
from overdrive.functional.qkv import QKVLayout
from tests.modules.layer_oracle import IN, build, features, fp8, tuple_of
from tests.numerics import RECIPES, TOLERANCES, assert_same_bits, relative_error

HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture
def used(monkeypatch):
    """A list with one entry for each use of the op."""
    uses, op = [], stage.norm_gemm

    def counted(*arguments):
        uses.append(arguments)
        return op(*arguments)

    monkeypatch.setattr(stage, "norm_gemm", counted)
    return uses


def assert_alike(actual, expected):
    """The same bits on a CPU; on a GPU sums in another order, parts of which cuBLAS may round."""
    actual, expected = tuple_of(actual), tuple_of(expected)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected):
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        if a.is_cuda:
            assert relative_error(a, e) <= TOLERANCES[a.dtype, "plain"]
        else:
            assert_same_bits(a, e)


def tokens_of(count: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> torch.Tensor:
    return features(count, dtype=dtype, device=device).detach()


def check(module, x, used, call=None):
    """call(x), by default module(x), uses the op without gradients alone, and returns the same."""
    call = call or module
    expected = call(x)
    assert not used
    with torch.no_grad():
        actual = call(x)
    assert len(used) == 1
    assert not any(t.requires_grad for t in tuple_of(actual)[:1])
    assert_alike(actual, expected)


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("count", [1, 5, stage.ONE_KERNEL_TOKENS])
def test_equals_the_layer_with_gradients(count, dtype, normalization, zero_centered, device, used):
    module = build("LayerNormLinear", device, dtype, normalization=normalization, zero_centered_gamma=zero_centered)
    check(module, tokens_of(count, dtype, device), used)


@pytest.mark.parametrize(
    "arguments", [{"bias": False}, {"return_bias": True}, {"parameters_split": ("q", "k")}, {"return_bias": True, "bias": False}]
)
def test_every_kind_of_bias_and_split_parameters(arguments, device, used):
    module = build("LayerNormLinear", device, torch.bfloat16, **arguments)
    check(module, tokens_of(3, device=device), used)


@pytest.mark.parametrize("lead", [(), (1, 1), (2, 3), (1, 4, 2)])
def test_leading_dimensions(lead, device, used):
    module = build("LayerNormLinear", device, torch.bfloat16)
    check(module, features(*lead, dtype=torch.bfloat16, device=device).detach(), used)


def test_residual_and_qkv(device, used):
    module = build("LayerNormLinear", device, torch.bfloat16)
    x, qkv = tokens_of(4, device=device).view(2, 2, IN), QKVLayout(2, 1, 8, True)
    check(module, x, used, module.forward_with_residual)
    used.clear()
    check(module, x, used, lambda x: module.forward_qkv(x, qkv, residual=True))


def test_strided_input(device, used):
    module = build("LayerNormLinear", device, torch.bfloat16)
    check(module, tokens_of(8, device=device).view(4, 2, IN)[:, 1], used)


def test_under_torch_autocast(device, used):
    module, x = build("LayerNormLinear", device), tokens_of(4, torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        check(module, x, used)


def test_inference_mode(device, used):
    module, x = build("LayerNormLinear", device, torch.bfloat16), tokens_of(4, device=device)
    with torch.inference_mode():
        actual = module(x)
    assert len(used) == 1
    assert_alike(actual, module(x))


def test_frozen_parameters_need_no_backward_either(device, used):
    module, x = build("LayerNormLinear", device, torch.bfloat16), tokens_of(4, device=device)
    module.requires_grad_(False)
    assert not module(x).requires_grad
    assert len(used) == 1
    module(x.clone().requires_grad_()).sum().backward()
    assert len(used) == 1


def no_gradients(recipe: str = "plain"):
    stack = contextlib.ExitStack()
    stack.enter_context(torch.no_grad())
    stack.enter_context(fp8(recipe))
    return stack


@pytest.mark.parametrize("count", [0, stage.ONE_KERNEL_TOKENS + 1])
def test_not_for_no_tokens_or_many(count, device, used):
    module, x = build("LayerNormLinear", device, torch.bfloat16), tokens_of(count, device=device)
    with no_gradients():
        actual = module(x)
    assert not used
    assert_same_bits(actual, module(x))


def test_not_for_an_input_that_is_large_though_its_tokens_are_few(device, used):
    size = stage.ONE_KERNEL_INPUT // 4 + 16
    module = te.LayerNormLinear(size, 16, params_dtype=torch.bfloat16, device=device)
    x = features(4, dtype=torch.bfloat16, device=device, size=size).detach()
    with no_gradients():
        module(x)
        assert not used
        module(x[:3])
    assert len(used) == 1


def test_not_where_the_norm_is_returned(device, used):
    module = build("LayerNormLinear", device, torch.bfloat16, return_layernorm_output=True)
    x = tokens_of(4, device=device)
    with no_gradients():
        actual = module(x)
    assert not used
    for a, e in zip(actual, module(x)):
        assert_same_bits(a, e)


def test_not_in_float32_nor_with_rows_that_are_not_multiples_of_16(device, used):
    for module in (build("LayerNormLinear", device), te.LayerNormLinear(IN + 8, 32, params_dtype=torch.bfloat16, device=device)):
        dtype, size = module.weight.dtype, module.in_features
        x = features(4, dtype=dtype, device=device, size=size).detach()
        with no_gradients():
            actual = module(x)
        assert not used
        assert_same_bits(actual, module(x))


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "plain"])
def test_not_in_fp8(recipe, device, used):
    module, x = build("LayerNormLinear", device, torch.bfloat16), tokens_of(16, device=device)
    with no_gradients(recipe):
        actual = module(x)
    with fp8(recipe):
        expected = module(x)
    assert not used
    assert_same_bits(actual, expected)


def test_not_while_calibrating(device, used):
    module, x = build("LayerNormLinear", device, torch.bfloat16), tokens_of(4, device=device)
    with torch.no_grad(), te.autocast(enabled=False, calibrating=True):
        module(x)
    assert not used


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_not_in_the_first_run_of_a_checkpoint(use_reentrant, device, used):
    """Which may run without gradients, though its backward comes."""
    module = build("LayerNormLinear", device, torch.bfloat16)
    x = tokens_of(4, device=device).requires_grad_()
    checkpoint(module, x, use_reentrant=use_reentrant).sum().backward()
    assert not used


def test_hooks_see_the_call(device, used):
    module, x = build("LayerNormLinear", device, torch.bfloat16), tokens_of(4, device=device)
    seen = []
    module.register_forward_pre_hook(lambda module, inputs: seen.append("before") or (inputs[0] * 2,))
    module.register_forward_hook(lambda module, inputs, output: seen.append("after") or output + 1)
    check(module, x, used)
    assert seen == ["before", "after"] * 2


def test_compiled_code_has_the_op_in_its_one_graph(device):
    module, x = build("LayerNormLinear", device, torch.bfloat16), tokens_of(4, device=device)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        actual = torch.compile(module, backend=backend, fullgraph=True)(x)
        assert_same_bits(actual, module(x))
    assert len(graphs) == 1
    assert [n.target for n in graphs[0].graph.nodes].count(torch.ops.overdrive.norm_gemm.default) == 1


@pytest.mark.gpu
def test_one_launch_and_one_allocation(monkeypatch):
    monkeypatch.undo()  # the poison is a launch of its own
    module = te.LayerNormLinear(1024, 3072, params_dtype=torch.bfloat16, device="cuda")
    x = torch.randn(4, 1024, device="cuda", dtype=torch.bfloat16)

    def allocations() -> int:
        return torch.cuda.memory_stats()["allocation.all.allocated"]

    with torch.no_grad():
        module(x)
        before = allocations()
        y = module(x)
        assert allocations() - before == 1
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities, acc_events=True) as profile:
            y = module(x)
            torch.cuda.synchronize()
    launched = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert launched == ["_norm_gemm"]
    assert y.shape == (4, 3072)
