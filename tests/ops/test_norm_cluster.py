"""ops.norm and ops.residual_norm, delayed scaling, both layouts: shapes that one launch of clusters serves on a Hopper GPU."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch

from overdrive.ops.gemm import dequantize
from overdrive.ops.norm import norm
from overdrive.ops.quantize import Mode, Quantized, quantize
from overdrive.ops.residual import residual_norm
from overdrive.ops.scaling import arena, tenant_id
from overdrive.recipe import DelayedScaling
from overdrive.scaling.arena import SlotRange
from tests.numerics import E4M3, E5M2, assert_close, assert_same_bits, draw, layout
from tests.ops.quantized import assert_quantized_alike, on_cpu, tail
from tests.ops.test_norm import EPS, KINDS, draw_inputs, formula, plain, to64

BF16, FP16 = torch.bfloat16, torch.float16
SCALE = 16.0  # saturates nothing


@pytest.fixture
def one_launch(monkeypatch, device, gemm_epilogues):
    """A context: within it, a GPU serves so many norms with one launch."""
    served = []
    if device == "cuda":
        from overdrive.kernels import norm_cluster

        kernel = norm_cluster.norm_quantized

        def counted(*arguments):
            out = kernel(*arguments)
            served.extend([out] if out is not None else [])
            return out

        monkeypatch.setattr(norm_cluster, "norm_quantized", counted)

    @contextlib.contextmanager
    def expected(times=1):
        served.clear()
        yield
        assert len(served) == (times if device == "cuda" else 0)

    return expected


def check_numbers(x, gamma, beta, zero_centered, rms, q):
    """Both layouts and the statistics, against float64."""
    *out, mean, rstd = norm(x, gamma, beta, EPS, zero_centered, rms, 0, *q)
    out = Quantized(*out)
    assert_same_bits(out.data_t, out.data.t().contiguous(), "transposed")
    x64, gamma64, beta64 = to64(x, gamma, beta)
    y64, mean64, rstd64 = formula(x64, gamma64, beta64, zero_centered, rms)
    assert_close(mean, mean64.detach(), torch.float32, what="mean")
    assert_close(rstd, rstd64.detach(), torch.float32, what="rstd")
    assert_close(dequantize(out.data, out.scale_inv, q.mode)[: x.shape[0]], y64.detach(), q.dtype, what="y")
    return out


def check(x, gamma, beta, zero_centered, rms, q):
    """The same, and byte by byte against the f32 reference."""
    out = check_numbers(x, gamma, beta, zero_centered, rms, q)
    y32, *_ = norm(*on_cpu((x, gamma, beta)), EPS, zero_centered, rms, 0, *plain(torch.float32))
    assert_quantized_alike(out, Quantized(*quantize(y32, False, *on_cpu(q))[:4]), q)


@pytest.mark.parametrize(("rms", "zero_centered"), KINDS)
@pytest.mark.parametrize(("dtype", "fp8"), [*itertools.product((BF16, FP16), (E4M3, E5M2))])
@pytest.mark.parametrize("shape", [(32, 2048), (96, 4096), (32, 5120), (64, 8192)])
def test_numbers(shape, dtype, fp8, rms, zero_centered, device, one_launch):
    x, gamma, beta = draw_inputs(*shape, dtype, rms, device)
    with one_launch():
        check(x, gamma, beta, zero_centered, rms, tail(Mode.DELAYED, fp8, device, scale=SCALE))


@pytest.mark.parametrize("features", [2560, 3072, 3584, 6144, 7168])
def test_other_widths(features, device, one_launch):
    x, gamma, beta = draw_inputs(64, features, BF16, False, device)
    with one_launch():
        check(x, gamma, beta, False, False, tail(Mode.DELAYED, E4M3, device, scale=SCALE))


@pytest.mark.parametrize("dtype", [torch.float32, FP16])
def test_parameters_of_another_dtype(dtype, device, one_launch):
    x, *_ = draw_inputs(32, 2048, BF16, False, device)
    gamma, beta = (torch.nn.Parameter(draw(2049, dtype=dtype, device=device)[1:]) for _ in range(2))  # aligned to an element
    q = tail(Mode.DELAYED, E4M3, device, scale=SCALE)
    with one_launch(2), torch.no_grad():
        check(x, gamma, beta, False, False, q)
        check(x, gamma, None, True, False, q)


def recording(device, tenant):
    """(Quantization, the slot it records in)"""
    own, state = SlotRange(1, torch.device(device)), arena(torch.device(device))
    q = tail(Mode.DELAYED, E4M3, device)
    scales = torch.full((state.capacity,), SCALE, device=device)
    return q._replace(scales=scales, slots=own.indices(torch.device(device)), slot=3, tenant=tenant), own.start + 3


@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize("tokens", [32, 96, 8192])
def test_the_amax_is_recorded(tokens, records, device, one_launch):
    x, gamma, beta = draw_inputs(tokens, 2048, BF16, False, device)
    x[tokens - 9, 2047], gamma[2047] = -20, 3  # the largest, of the last block
    tenant = tenant_id(DelayedScaling(), None)
    q, at = recording(device, tenant if records else -1)
    state = arena(x.device)
    before, owner = state.amax.clone(), state.owner.clone()
    with one_launch():
        check(x, gamma, beta, False, False, q)
    if records:
        y32, *_ = norm(*on_cpu((x, gamma, beta)), EPS, False, False, 0, *plain(torch.float32))
        torch.testing.assert_close(state.amax[at].cpu(), y32.abs().amax(), rtol=2e-6, atol=0)
        before[at], owner[at] = state.amax[at], tenant
    assert_same_bits(state.amax, before)
    assert_same_bits(state.owner, owner)


@pytest.mark.parametrize("row", [0, 63])
@pytest.mark.parametrize("rms", [False, True])
def test_nan_reaches_the_amax_and_stays_in_its_row(rms, row, device, one_launch):
    x, gamma, beta = draw_inputs(64, 4096, BF16, rms, device)
    x[row, 4095] = torch.nan
    q, at = recording(device, tenant_id(DelayedScaling(), None))
    with one_launch():
        out = Quantized(*norm(x, gamma, beta, EPS, False, rms, 0, *q)[:4])
    assert arena(x.device).amax[at].isnan()
    wrong = torch.arange(64, device=device) == row
    assert_same_bits(out.data.float().isnan().all(1), wrong)
    assert_same_bits(out.data.float().isnan().any(1), wrong)
    assert_same_bits(out.data_t, out.data.t().contiguous())


@pytest.mark.parametrize(("rms", "zero_centered"), KINDS)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("shape", [(32, 2048), (96, 4096), (64, 8192)])
def test_the_norm_of_a_sum(shape, dtype, rms, zero_centered, device, one_launch):
    """The sum is rounded, and normalized as it is then."""
    x, gamma, beta = draw_inputs(*shape, dtype, rms, device)
    residual = draw(*shape, dtype=dtype, device=device)
    q = tail(Mode.DELAYED, E4M3, device, scale=SCALE)
    with one_launch(2):
        total, *found = residual_norm(x, None, residual, 0.0, None, gamma, beta, EPS, zero_centered, rms, 0, *q)
        expected = norm(total, gamma, beta, EPS, zero_centered, rms, 0, *q)
    assert_same_bits(total, (x.float() + residual.float()).to(dtype))
    for a, b in zip(found, expected, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("case", ["bias", "dropout", "another dtype", "sliced"])
def test_other_sums_take_two(case, device, one_launch):
    x, gamma, beta = draw_inputs(32, 2048, BF16, False, device)
    residual = draw(32, 2048, dtype=FP16 if case == "another dtype" else BF16, device=device)
    residual = layout(residual, "sliced") if case == "sliced" else residual
    bias = draw(2048, dtype=BF16, device=device) if case == "bias" else None
    p, seed = (0.5, torch.tensor([3], device=device)) if case == "dropout" else (0.0, None)
    q = tail(Mode.DELAYED, E4M3, device, scale=SCALE)
    arguments = (x, bias, residual, p, seed, gamma, beta, EPS, False, False, 0)
    with one_launch(0):
        _, *found = residual_norm(*arguments, *q)
    _, *expected = residual_norm(*on_cpu(arguments), *on_cpu(q))
    assert_quantized_alike(Quantized(*found[:4]), Quantized(*expected[:4]), q)


@pytest.mark.parametrize("features", [4096, 5120])
def test_twice_the_same_bits(features, device, one_launch):
    x, gamma, beta = draw_inputs(1024, features, BF16, False, device)
    q = tail(Mode.DELAYED, E4M3, device, scale=SCALE)
    with one_launch(2):
        first, second = (norm(x, gamma, beta, EPS, False, False, 0, *q) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("apart", [0, 500])
def test_a_far_mean_does_not_cancel(apart, device, one_launch):
    """A mean of 250 spreads, and blocks of columns whose means are as far from each other."""
    x = draw(32, 4096) + 250
    x[:, 1024:2048] -= apart
    with one_launch():
        gamma = torch.ones(4096, device=device)
        check_numbers(x.to(device, FP16), gamma, None, False, False, tail(Mode.DELAYED, E4M3, device, scale=SCALE))


def test_constant_rows(device, one_launch):
    x = torch.full((32, 4096), 5.0, dtype=BF16, device=device)
    q = tail(Mode.DELAYED, E4M3, device, scale=SCALE)
    with one_launch():
        data, *_, rstd = norm(x, torch.ones(4096, dtype=BF16, device=device), None, EPS, False, False, 0, *q)
    assert not data.float().any()
    assert_close(rstd, torch.full((32,), EPS**-0.5, dtype=torch.float64), torch.float32)


@pytest.mark.parametrize(
    ("tokens", "features", "dtype", "kind", "sm_margin"),
    [
        (40, 2048, BF16, "contiguous", 0),
        (32, 1024, BF16, "contiguous", 0),
        (32, 2176, BF16, "contiguous", 0),
        (32, 10240, BF16, "contiguous", 0),
        (32, 2048, torch.float32, "contiguous", 0),
        (32, 2048, BF16, "sliced", 0),
        (32, 2048, BF16, "contiguous", 8),
    ],
)
def test_the_rest_takes_two(tokens, features, dtype, kind, sm_margin, device, one_launch):
    x, gamma, beta = draw_inputs(tokens, features, dtype, False, device)
    q, arguments = tail(Mode.DELAYED, E4M3, device, scale=SCALE), (gamma, beta, EPS, False, False, sm_margin)
    with one_launch(0):
        out = norm(layout(x, kind), *arguments, *q)
    expected = norm(*on_cpu((x, *arguments)), *on_cpu(q))
    assert_quantized_alike(Quantized(*out[:4]), Quantized(*expected[:4]), q)
