"""ops.activation against float64 formulas and torch.autograd's derivative of them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from overdrive.ops.activation import ACTIVATIONS, activation, activation_backward, activation_backward_into
from overdrive.ops.quantize import Mode, Quantized, quantize
from tests.numerics import E4M3, E5M2, LAYOUTS, assert_close, assert_same_bits, draw, layout
from tests.ops.quantized import MODES, assert_quantized_alike, on_cpu, tail

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LIMIT, ALPHA = 7.0, 1.702

FORMULAS = {
    "gelu": lambda x: x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "qgelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "srelu": lambda x: torch.where(x > 0, x, 0.0) ** 2,
    "silu": lambda x: x * torch.sigmoid(x),
}
GATED = {"geglu": "gelu", "qgeglu": "qgelu", "reglu": "relu", "sreglu": "srelu", "swiglu": "silu"}


def formula(x: torch.Tensor, name: str, limit: float = LIMIT, alpha: float = ALPHA) -> torch.Tensor:
    """The activation as TE-SPEC writes it, in x's precision."""
    if name in FORMULAS:
        return FORMULAS[name](x)
    a, b = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
    if name == "glu":
        return torch.sigmoid(a) * b
    if name == "clamped_swiglu":
        g, u = a.clamp(max=limit), b.clamp(-limit, limit) + 1
        return g * torch.sigmoid(alpha * g) * u
    return FORMULAS[GATED[name]](a) * b


def plain(dtype: torch.dtype) -> tuple:
    return (Mode.PLAIN, dtype, None, None, 0, -1, False, True, False)


def width(name: str, features: int) -> int:
    return features * (1 + ACTIVATIONS[name].gated)


def check(x, dy, name, bias_grad, limit=LIMIT, alpha=ALPHA):
    y, *nothing = activation(x, name, limit, alpha, *plain(x.dtype))
    x64 = x.detach().cpu().double().requires_grad_()
    y64 = formula(x64, name, limit, alpha)
    assert all(t.numel() == 0 for t in nothing)
    assert y.dtype == x.dtype
    assert_close(y, y64.detach(), x.dtype, what=name)
    dx, *nothing, column_sum = activation_backward(dy, x, name, limit, alpha, bias_grad, *plain(x.dtype))
    y64.backward(dy.cpu().double())
    assert all(t.numel() == 0 for t in nothing)
    assert dx.dtype == x.dtype
    assert dx.is_contiguous()
    assert_close(dx, x64.grad, x.dtype, what=f"d {name}")
    assert column_sum.numel() == (x.shape[1] if bias_grad else 0)
    if bias_grad:
        assert_close(column_sum, x64.grad.sum(0), x.dtype, what=f"bias gradient of {name}")


def test_every_name_has_a_formula():
    assert {*FORMULAS, *GATED, "glu", "clamped_swiglu"} == set(ACTIVATIONS)
    assert {name for name, entry in ACTIVATIONS.items() if entry.gated} == {*GATED, "glu", "clamped_swiglu"}


@pytest.mark.parametrize("shape", [(1, 16), (129, 200), (33, 4096)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_forward_and_backward(name, dtype, shape, device):
    tokens, features = shape
    x = draw(tokens, width(name, features), dtype=dtype, device=device, scale=2.0)
    check(x, draw(tokens, features, dtype=dtype, device=device), name, bias_grad=True)


@given(
    name=st.sampled_from(sorted(ACTIVATIONS)),
    dtype=st.sampled_from(DTYPES),
    tokens=st.integers(1, 140),
    features=st.integers(1, 300),
    kinds=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    bias_grad=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_anything(name, dtype, tokens, features, kinds, bias_grad, seed, device):
    torch.manual_seed(seed)
    x = draw(tokens, width(name, features), dtype=dtype, device=device, kind=kinds[0])
    check(x, draw(tokens, features, dtype=dtype, device=device, kind=kinds[1]), name, bias_grad)


@pytest.mark.parametrize(("limit", "alpha"), [(7.0, 1.702), (0.5, 1.0), (1.0, 3.0)])
def test_clamped_swiglu_limits(limit, alpha, device):
    """Both halves below, at and beyond both limits; nothing flows back from beyond, everything from within and from the limit."""
    points = torch.tensor([-2 * limit, -limit, -0.3 * limit, 0.0, 0.3 * limit, limit, 2 * limit])
    a, b = torch.cartesian_prod(points, points).unbind(1)
    x = torch.stack((a, b), 1).to(device)
    dy = torch.ones(len(a), 1, device=device)
    check(x, dy, "clamped_swiglu", bias_grad=False, limit=limit, alpha=alpha)
    dx = activation_backward(dy, x, "clamped_swiglu", limit, alpha, False, *plain(torch.float32))[0].cpu()
    assert (dx[a > limit, 0] == 0).all()
    assert (dx[b.abs() > limit, 1] == 0).all()
    assert (dx[(b.abs() <= limit) & (a != 0), 1] != 0).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivative_point_by_point(name, device):
    """Far out, where one half of a formula overflows or vanishes, and around zero."""
    points = torch.cat([torch.linspace(-100, 100, 801), torch.tensor([-1e4, -1e-20, 0.0, 1e-20, 1e4])])
    x = points[:, None].repeat(1, 1 + ACTIVATIONS[name].gated).to(device)
    dy = torch.ones(len(points), 1, device=device)
    x64 = x.cpu().double().requires_grad_()
    y64 = formula(x64, name)
    y64.sum().backward()
    y = activation(x, name, LIMIT, ALPHA, *plain(torch.float32))[0]
    dx = activation_backward(dy, x, name, LIMIT, ALPHA, False, *plain(torch.float32))[0]
    torch.testing.assert_close(y.cpu().double(), y64.detach(), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(dx.cpu().double(), x64.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_comes_through(name, device):
    x = torch.zeros(2, width(name, 3), device=device)
    x[1, 0] = torch.nan
    y = activation(x, name, LIMIT, ALPHA, *plain(torch.float32))[0]
    assert y.isnan().tolist() == [[False] * 3, [True, False, False]]


@pytest.mark.parametrize("shape", [(1, 16), (129, 200), (40, 1040), (300, 384), (0, 48)])
@pytest.mark.parametrize(("mode", "fp8"), [*itertools.product(MODES, (E4M3, E5M2))])
@pytest.mark.parametrize("name", ["gelu", "srelu", "swiglu", "glu", "clamped_swiglu"])
def test_quantized_output_is_the_output_quantized(name, mode, fp8, shape, device):
    """In one op as one after the other, in f32, on the CPU; forward and backward, with the bias gradient unchanged."""
    tokens, features = shape
    x = draw(tokens, width(name, features), dtype=torch.bfloat16, device=device, scale=2.0)
    dy = draw(tokens, features, dtype=torch.bfloat16, device=device)
    q = tail(mode, fp8, device, scale=30.0)
    forward, backward = (x, name, LIMIT, ALPHA), (dy, x, name, LIMIT, ALPHA)

    y32 = activation(*on_cpu(forward), *plain(torch.float32))[0]
    assert_quantized_alike(Quantized(*activation(*forward, *q)), Quantized(*quantize(y32, False, *on_cpu(q))[:4]), q, name)

    dx32, *_, expected_sum = activation_backward(*on_cpu(backward), True, *plain(torch.float32))
    *dx, column_sum = activation_backward(*backward, True, *q)
    assert_quantized_alike(Quantized(*dx), Quantized(*quantize(dx32, False, *on_cpu(q))[:4]), q, f"d {name}")
    if device == "cpu":
        assert_same_bits(column_sum, expected_sum)
    else:
        assert_close(column_sum, dx32.double().sum(0), x.dtype, what="bias gradient")


def test_expanded_gradient(device):
    """The gradient of a sum arrives with stride 0."""
    x = draw(17, 48, device=device)
    check(x, layout(x, "expanded") * 0 + 1, "gelu", bias_grad=True)
    check(x, torch.ones(1, 1, device=device).expand(17, 48), "gelu", bias_grad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 130, 2500])
@pytest.mark.parametrize(("name", "place"), [("gelu", "dy"), ("srelu", "x"), ("swiglu", "x"), ("clamped_swiglu", "x")])
def test_gradient_in_place(name, place, tokens, dtype, device):
    """Written over one of its inputs it is bit for bit what it is written elsewhere."""
    x = draw(tokens, width(name, 272), dtype=dtype, device=device)
    dy = draw(tokens, 272, dtype=dtype, device=device)
    for bias_grad in (False, True):
        expected, *_, expected_sum = activation_backward(dy, x, name, LIMIT, ALPHA, bias_grad, *plain(dtype))
        inputs = {"dy": dy.clone(), "x": x.clone()}
        out = inputs[place]
        column_sum = activation_backward_into(out, inputs["dy"], inputs["x"], name, LIMIT, ALPHA, bias_grad)
        assert_same_bits(out, expected)
        assert_same_bits(column_sum, expected_sum)
