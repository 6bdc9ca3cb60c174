"""LayerNorm and RMSNorm modules: parameters, numbers, several dimensions, sm_margin, torch's own as the peer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import overdrive.functional.norm as functional_norm
import overdrive.pytorch as te
from tests.modules.layer_oracle import assert_same_step, check, features, norm, step
from tests.numerics import assert_same_bits, observe, relative_error

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
kinds = pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
centred = pytest.mark.parametrize("zero_centered", [False, True])


def make(kind, shape, device, dtype=torch.float32, **arguments):
    module = getattr(te, kind)(shape, params_dtype=dtype, device=device, **arguments)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_((torch.randn(parameter.shape) * 0.2).to(parameter))
    return module


def formula(module, kind, zero_centered=False):
    def flat(x, p):
        size = module.weight.numel()
        vectors = [p[name].reshape(size) if name in p else None for name in ("weight", "bias")]
        gain = torch.ones(size, dtype=torch.float64) if vectors[0] is None else vectors[0]
        y = norm(x.reshape(-1, size), gain, vectors[1], kind == "RMSNorm", zero_centered, module.eps)
        return (y.reshape(x.shape),)

    return flat


@kinds
@centred
@pytest.mark.parametrize("eps", [1e-5, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients(dtype, eps, zero_centered, kind, device):
    module = make(kind, 96, device, dtype, zero_centered_gamma=zero_centered, eps=eps)
    check(module, features(3, 5, size=96, dtype=dtype, device=device), formula=formula(module, kind, zero_centered))


@kinds
@pytest.mark.parametrize("shape", [(4, 24), (2, 3, 16), [48]])
def test_the_norm_of_several_dimensions(shape, kind, device):
    module = make(kind, shape, device)
    assert module.normalized_shape == tuple(shape)
    assert all(parameter.shape == tuple(shape) for parameter in module.parameters())
    x = torch.randn(5, *shape).to(device).requires_grad_()
    check(module, x, formula=formula(module, kind))


@kinds
@pytest.mark.parametrize("mixed", [torch.float16, torch.bfloat16])
def test_under_torchs_autocast_its_dtype_wins_and_gradients_keep_the_parameters(mixed, kind, device):
    module = make(kind, 64, device)
    with torch.autocast(device, mixed):
        result = check(module, features(4, size=64, device=device), formula=formula(module, kind), dtype=mixed)
    assert {grad.dtype for grad in result.grads.values()} == {torch.float32}


@kinds
@centred
def test_parameters_and_their_initialisation(zero_centered, kind, device):
    module = getattr(te, kind)(32, zero_centered_gamma=zero_centered, device=device, params_dtype=torch.bfloat16)
    assert list(module.state_dict()) == (["weight", "bias"] if kind == "LayerNorm" else ["weight"])
    for _ in range(2):
        assert (module.weight == (0 if zero_centered else 1)).all()
        assert module.weight.dtype == torch.bfloat16
        assert module.weight.sequence_parallel is False
        assert module.bias is None or not module.bias.any()
        with torch.no_grad():
            module.weight.fill_(7)
        module.reset_parameters()
    assert getattr(te, kind)(hidden_size=32, device=device).weight.shape == (32,)
    assert getattr(te, kind)(32, device=device, dtype=torch.float16).weight.dtype == torch.float16


@pytest.mark.parametrize("arguments", [{}, {"bias": False}, {"elementwise_affine": False}])
def test_agrees_with_torchs_layer_norm_in_state_and_values(arguments, device):
    ours, theirs = te.LayerNorm(40, device=device, **arguments), nn.LayerNorm(40, device=device, **arguments)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = features(6, size=40, device=device)
    assert relative_error(ours(x), theirs(x)) < 1e-6
    assert_same_step(step(copy.deepcopy(ours), x), step(ours, x))


@pytest.mark.parametrize("sm_margin", [8, {"forward": 8, "inference": 3}])
@kinds
def test_sm_margin_reaches_the_kernels_and_changes_no_number(kind, sm_margin, device, monkeypatch):
    plain, sparing = make(kind, 64, device), make(kind, 64, device, sm_margin=sm_margin)
    sparing.load_state_dict(plain.state_dict())
    seen = {}

    def watch(name, position):
        observe(monkeypatch, functional_norm, name, lambda *arguments: seen.setdefault(name, []).append(arguments[position]))

    watch("norm", 6)
    watch("norm_backward", 8)
    x = features(100, size=64, device=device)
    expected = step(plain, x)
    seen.clear()
    actual = step(sparing, x)
    with torch.no_grad():
        sparing(x)
    assert seen == ({"norm": [8, 8], "norm_backward": [8]} if sm_margin == 8 else {"norm": [8, 3], "norm_backward": [0]})
    assert_same_bits(actual.outputs[0], expected.outputs[0])
    for name, grad in expected.grads.items():  # the sums over tokens may be split differently
        assert relative_error(actual.grads[name], grad) < 1e-5


@kinds
@pytest.mark.parametrize("frozen", ["weight", "input", "bias"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(frozen, kind, device):
    module = make(kind, 48, device)
    x = features(7, size=48, device=device)
    if frozen == "input":
        x = x.detach()
    elif getattr(module, frozen) is not None:
        getattr(module, frozen).requires_grad_(False)
    check(module, x, formula=formula(module, kind))
