"""ops.norm: LayerNorm and RMSNorm against float64 and torch.autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from overdrive.ops.norm import norm, norm_backward
from overdrive.ops.quantize import Mode, Quantized, quantize
from overdrive.ops.scaling import arena, tenant_id
from overdrive.recipe import DelayedScaling
from overdrive.scaling.arena import SlotRange
from tests.numerics import E4M3, E5M2, LAYOUTS, assert_close, assert_same_bits, draw, layout
from tests.ops.quantized import MODES, assert_quantized_alike, on_cpu, tail

EPS = 1e-5
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((1, 16), (7, 96), (16, 200), (129, 1024), (33, 4096), (2, 16384))
KINDS = tuple(itertools.product((False, True), repeat=2))  # (rms, zero_centered)


def plain(dtype: torch.dtype) -> tuple:
    return (Mode.PLAIN, dtype, None, None, 0, -1, False, True, False)


def draw_inputs(tokens, features, dtype, rms, device, kind="contiguous"):
    """(x with a mean and a size of its own, gamma, beta)."""
    x = layout((draw(tokens, features) * 3 + 2).to(device, dtype), kind)
    return x, draw(features, dtype=dtype, device=device), None if rms else draw(features, dtype=dtype, device=device)


def formula(x, gamma, beta, zero_centered, rms):
    """float64 (y, mean, rstd)."""
    mean = torch.zeros_like(x[:, :1]) if rms else x.mean(1, keepdim=True)
    rstd = 1 / ((x - mean).pow(2).mean(1, keepdim=True) + EPS).sqrt()
    y = (x - mean) * rstd * (gamma + 1 if zero_centered else gamma)
    return y if beta is None else y + beta, mean.squeeze(1), rstd.squeeze(1)


def to64(*tensors):
    return tuple(None if t is None else t.detach().cpu().double().requires_grad_() for t in tensors)


def check_forward_and_backward(tokens, features, dtype, rms, zero_centered, device, kind="contiguous", residual=False, sm_margin=0):
    x, gamma, beta = draw_inputs(tokens, features, dtype, rms, device, kind)
    y, *nothing, mean, rstd = norm(x, gamma, beta, EPS, zero_centered, rms, sm_margin, *plain(dtype))
    x64, gamma64, beta64 = to64(x, gamma, beta)
    y64, mean64, rstd64 = formula(x64, gamma64, beta64, zero_centered, rms)
    assert all(t.numel() == 0 for t in nothing)
    assert y.dtype == dtype
    assert_close(y, y64.detach(), dtype, what="y")
    assert_close(mean, mean64.detach(), torch.float32, what="mean")
    assert_close(rstd, rstd64.detach(), torch.float32, what="rstd")

    dy = draw(tokens, features, dtype=dtype, device=device, kind=kind)
    dresidual = draw(tokens, features, dtype=dtype, device=device, kind=kind) if residual else None
    dx, dgamma, dbeta = norm_backward(dy, x, gamma, mean, rstd, dresidual, zero_centered, rms, sm_margin)
    y64.backward(to64(dy)[0])
    expected = x64.grad if dresidual is None else x64.grad + to64(dresidual)[0]
    assert {t.dtype for t in (dx, dgamma, *([] if rms else [dbeta]))} == {dtype}
    assert dx.is_contiguous()
    assert_close(dx, expected.detach(), dtype, what="dx")
    assert_close(dgamma, gamma64.grad, dtype, what="dgamma")
    if rms:
        assert dbeta.numel() == 0
    else:
        assert_close(dbeta, beta64.grad, dtype, what="dbeta")


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("rms", "zero_centered"), KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(shape, dtype, rms, zero_centered, residual, device):
    check_forward_and_backward(*shape, dtype, rms, zero_centered, device, residual=residual)


@given(
    tokens=st.integers(1, 140),
    features=st.integers(16, 300),  # with few, dx is what rounding leaves of a difference
    dtype=st.sampled_from(DTYPES),
    kinds=st.sampled_from(KINDS),
    kind=st.sampled_from(LAYOUTS),
    residual=st.booleans(),
    sm_margin=st.sampled_from([0, 8, 1000]),
    seed=st.integers(0, 2**31),
)
def test_anything(tokens, features, dtype, kinds, kind, residual, sm_margin, seed, device):
    torch.manual_seed(seed)
    check_forward_and_backward(tokens, features, dtype, *kinds, device, kind, residual, sm_margin)


@pytest.mark.parametrize(("rms", "zero_centered"), KINDS)
@pytest.mark.parametrize("shape", [(1, 16), (129, 200), (40, 1040)])
@pytest.mark.parametrize("col", [False, True])
@pytest.mark.parametrize(("mode", "fp8"), [*itertools.product(MODES, (E4M3, E5M2))])
def test_quantized_output_is_the_output_quantized(mode, fp8, col, shape, rms, zero_centered, device):
    """Norm and quantization in one op give what they give one after the other, in f32, on the CPU."""
    x, gamma, beta = draw_inputs(*shape, torch.bfloat16, rms, device)
    arguments, q = (x, gamma, beta, EPS, zero_centered, rms, 0), tail(mode, fp8, device, scale=60.0, col=col)
    *out, mean, rstd = norm(*arguments, *q)
    y32, *_, cpu_mean, cpu_rstd = norm(*on_cpu(arguments), *plain(torch.float32))
    assert_quantized_alike(Quantized(*out), Quantized(*quantize(y32, False, *on_cpu(q))[:4]), q, "norm")
    torch.testing.assert_close((mean.cpu(), rstd.cpu()), (cpu_mean, cpu_rstd), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("col", [False, True])
@pytest.mark.parametrize("tokens", [0, 37])
def test_the_amax_is_recorded(tokens, col, device):
    """The largest output of all rows, in the slot and for the tenant; nothing where there are no rows."""
    x, gamma, beta = draw_inputs(tokens, 272, torch.bfloat16, False, device)
    own, state = SlotRange(1, x.device), arena(x.device)
    before, at, tenant = state.amax.clone(), own.start + 3, tenant_id(DelayedScaling(), None)
    scales = torch.ones(state.capacity, device=device)
    q = (Mode.DELAYED, E4M3, scales, own.indices(x.device), 3, tenant, False, True, col)
    norm(x, gamma, beta, EPS, False, False, 0, *q)
    if tokens:
        y32, *_ = norm(*on_cpu((x, gamma, beta)), EPS, False, False, 0, *plain(torch.float32))
        torch.testing.assert_close(state.amax[at].cpu(), y32.abs().amax(), rtol=2e-6, atol=0)
        assert state.owner[at] == tenant
        before[at] = state.amax[at]
    assert_same_bits(state.amax, before)


@pytest.mark.parametrize("col", [False, True])
@pytest.mark.parametrize("mode", [Mode.PLAIN, *MODES])
def test_no_tokens(mode, col, device):
    x, gamma, beta = draw_inputs(0, 48, torch.float32, False, device)
    q = plain(torch.float32) if mode == Mode.PLAIN else tail(mode, E4M3, device, col=col)
    out = norm(x, gamma, beta, EPS, False, False, 0, *q)
    assert out[0].shape == (0, 48)
    assert out[4].shape == out[5].shape == (0,)
    dx, dgamma, dbeta = norm_backward(x, x, gamma, *out[4:], None, False, False, 0)
    assert dx.shape == (0, 48)
    for gradient in (dgamma, dbeta):
        assert_same_bits(gradient, torch.zeros(48))


@pytest.mark.parametrize("rms", [False, True])
def test_a_far_mean_does_not_cancel(rms, device):
    """Variance is taken around the mean: a mean of 1000 spreads costs no accuracy that f32 has."""
    x = draw(16, 512, device=device) + 1000
    gamma = torch.ones(512, device=device)
    y, *_ = norm(x, gamma, None, EPS, False, rms, 0, *plain(torch.float32))
    expected = formula(x.cpu().double(), 1.0, None, False, rms)[0]
    error = (y.cpu().double() - expected).norm() / expected.norm()
    assert error < 5e-5  # one ulp of 1000 against a spread of 1


def test_constant_rows_and_zeros(device):
    x = torch.tensor([[0.0] * 64, [5.0] * 64], device=device)
    gamma = torch.ones(64, device=device)
    y, *_, rstd = norm(x, gamma, None, EPS, False, False, 0, *plain(torch.float32))
    assert_same_bits(y, torch.zeros(2, 64))
    assert_close(rstd, torch.full((2,), EPS**-0.5, dtype=torch.float64), torch.float32)
    dx, *_ = norm_backward(torch.ones_like(x), x, gamma, x.mean(1), rstd, None, False, False, 0)
    assert_same_bits(dx, torch.zeros(2, 64))


def test_nan_stays_in_its_row(device):
    x, gamma, beta = draw_inputs(5, 40, torch.float32, False, device)
    x[3, 7] = torch.nan
    y = norm(x, gamma, beta, EPS, False, False, 0, *plain(torch.float32))[0]
    assert y.isnan().all(1).tolist() == [False, False, False, True, False]
    assert y.isnan().any(1).tolist() == [False, False, False, True, False]
