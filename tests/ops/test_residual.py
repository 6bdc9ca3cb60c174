"""ops.residual: the sum against float64, the dropout mask by its statistics, the fused norm against norm."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from overdrive.ops.norm import norm
from overdrive.ops.quantize import Mode, Quantized, quantize
from overdrive.ops.residual import dropout_scale, residual_add, residual_backward, residual_norm
from tests.numerics import E4M3, LAYOUTS, assert_close, assert_same_bits, draw
from tests.ops.quantized import MODES, assert_quantized_alike, on_cpu, tail

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def seed_of(value: int, device: str) -> torch.Tensor:
    return torch.tensor([value], device=device)


def mask(rows: int, cols: int, p: float, seed: torch.Tensor) -> torch.Tensor:
    """What an op multiplies by, read off the gradient of ones."""
    return residual_backward(torch.ones(rows, cols, device=seed.device), p, seed, False)[0].cpu()


@given(
    dtype=st.sampled_from(DTYPES),
    tokens=st.integers(0, 140),
    features=st.integers(1, 300),
    kinds=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    with_bias=st.booleans(),
    p=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_forward_and_backward(dtype, tokens, features, kinds, with_bias, p, seed, device):
    torch.manual_seed(seed % 2**31)
    x, residual = (draw(tokens, features, dtype=dtype, device=device, kind=kind) for kind in kinds)
    bias = draw(features, dtype=dtype, device=device) if with_bias else None
    drop = seed_of(seed, device) if p else None
    factor = mask(tokens, features, p, drop).double() if p else 1.0
    out = residual_add(x, bias, residual, p, drop)
    value = x.cpu().double() + (bias.cpu().double() if with_bias else 0.0)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_close(out, residual.cpu().double() + value * factor, dtype)

    dout = draw(tokens, features, dtype=dtype, device=device, kind=kinds[0])
    dx, dbias = residual_backward(dout, p, drop, with_bias)
    assert dx.is_contiguous()
    assert_close(dx, dout.cpu().double() * factor, dtype, what="dx")
    assert dbias.numel() == (features if with_bias else 0)
    if with_bias:
        assert_close(dbias, (dout.cpu().double() * factor).sum(0), dtype, what="dbias")


def test_without_dropout_the_gradient_is_a_copy(device):
    dout = draw(5, 8, device=device)
    dx, _ = residual_backward(dout, 0.0, None, False)
    assert_same_bits(dx, dout)
    assert dx.data_ptr() != dout.data_ptr()


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(512, 2048), (4096, 256), (1, 2**20)])
def test_keep_rate_and_scale(p, shape, device):
    m = mask(*shape, p, seed_of(1234, device))
    assert set(m.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}
    sigma = (p * (1 - p) / m.numel()) ** 0.5
    assert abs((m == 0).double().mean() - p) < 5 * sigma


def test_no_element_knows_of_another(device):
    """Correlation of the mask with itself shifted by rows and columns, and of rows' and columns' sums, is noise."""
    m = mask(1024, 1024, 0.5, seed_of(99, device)).double() - 1
    for rows, cols in itertools.product((0, 1, 2, 3, 4, 16, 64, 128, 512), repeat=2):
        if (rows, cols) != (0, 0):
            product = (m * m.roll((rows, cols), (0, 1))).mean()
            assert abs(product) < 5 / 1024, f"shifted by {rows}, {cols}: correlation {product:.4f}"
    for dim in (0, 1):
        spread = m.mean(dim).std() * 1024**0.5
        assert 0.85 < spread < 1.15, f"sums over dim {dim} spread {spread:.2f} times as far as chance has them"


@pytest.mark.parametrize("other", [1, 2, 1 << 7, 1 << 31, 1 << 32, 1 << 62, -1, 12345])
def test_seeds_differ(other, device):
    """No row of one seed's mask knows of any row of the other's."""
    a, b = (mask(256, 1024, 0.5, seed_of(seed, device)).double() - 1 for seed in (0, other))
    assert (a @ b.t() / 1024).abs().max() < 6 / 32


def test_no_row_is_another_shifted(device):
    """The largest correlation of a row with another, at any shift, is what chance leaves."""
    m = mask(300, 4096, 0.5, seed_of(3, device)).double() - 1
    spectrum = torch.fft.rfft(m)
    for row in range(0, 300, 37):
        product = torch.fft.irfft(spectrum * spectrum[row].conj()) / 4096
        product[row, 0] = 0
        assert product.abs().max() < 7 / 64, f"row {row}"


def test_p_counts_in_steps(device):
    """p is rounded to a multiple of 2**-16: less than half a step drops nothing, all but that everything."""
    seed = seed_of(11, device)
    assert (mask(64, 4096, 2**-18, seed) != 0).all()
    assert (mask(64, 4096, 1 - 2**-18, seed) == 0).all()
    assert 0 < (mask(512, 4096, 2**-16, seed) == 0).sum() < 100  # 32 expected


@pytest.mark.parametrize("seed", [0, 7, -1, 2**40 + 3, 2**63 - 1])
def test_same_mask_everywhere(seed, device):
    """Forward, backward, the fused op and the reference on the CPU draw one mask."""
    p, drop = 0.3, seed_of(seed, device)
    expected = dropout_scale(130, 200, p, seed_of(seed, "cpu"))
    ones, zeros, gamma = (fill(*shape, device=device) for fill, shape in
                          ((torch.ones, (130, 200)), (torch.zeros, (130, 200)), (torch.ones, (200,))))  # fmt: skip
    assert_same_bits(mask(130, 200, p, drop), expected)
    assert_same_bits(residual_add(ones, None, zeros, p, drop), expected)
    q = (Mode.PLAIN, torch.float32, None, None, 0, -1, False, True, False)
    assert_same_bits(residual_norm(ones, None, zeros, p, drop, gamma, None, 1e-5, False, True, 0, *q)[0], expected)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize(("rms", "zero_centered", "with_bias"), [*itertools.product((False, True), repeat=3)])
@pytest.mark.parametrize(("mode", "col"), [(Mode.PLAIN, False), (Mode.DELAYED, False), *((mode, True) for mode in MODES)])
@pytest.mark.parametrize("shape", [(0, 48), (1, 16), (129, 200), (17, 4096)])
def test_norm_of_the_sum(shape, mode, col, rms, zero_centered, with_bias, p, device):
    """residual_norm is residual_add, rounded, then norm: its parts one after the other on the CPU."""
    dtype, cols = torch.bfloat16, shape[1]
    x, residual = (draw(*shape, dtype=dtype, device=device) for _ in range(2))
    gamma, bias = (draw(cols, dtype=dtype, device=device) for _ in range(2))
    sums = (x, bias if with_bias else None, residual, p, seed_of(5, device) if p else None)
    parameters = (gamma, None if rms else draw(cols, dtype=dtype, device=device), 1e-5, zero_centered, rms, 3)
    q = (
        (Mode.PLAIN, dtype, None, None, 0, -1, False, True, False)
        if mode == Mode.PLAIN
        else tail(mode, E4M3, device, scale=60.0, col=col)
    )
    out, *quantized, mean, rstd = residual_norm(*sums, *parameters, *q)

    expected = residual_add(*on_cpu(sums))
    if device == "cpu":
        assert_same_bits(out, expected, "sum")
    else:  # one rounding less where product and sum are fused
        assert_close(out, expected.double(), dtype, what="sum")
        assert (out.cpu() != expected).sum() <= max(2, 0.01 * out.numel())
    expected = out.cpu()
    plain = (Mode.PLAIN, torch.float32, None, None, 0, -1, False, True, False)
    y32, *_, expected_mean, expected_rstd = norm(expected, *on_cpu(parameters), *plain)
    torch.testing.assert_close((mean.cpu(), rstd.cpu()), (expected_mean, expected_rstd), rtol=2e-6, atol=2e-6)
    if mode == Mode.PLAIN:
        assert_close(quantized[0], y32.double(), dtype)
    else:
        assert_quantized_alike(Quantized(*quantized), Quantized(*quantize(y32, False, *on_cpu(q))[:4]), q, "norm of the sum")


def test_mixed_dtypes(device):
    """The sum keeps the residual's dtype, f32 beside bf16 branches."""
    x, residual = draw(9, 32, dtype=torch.bfloat16, device=device), draw(9, 32, device=device)
    out = residual_add(x, None, residual, 0.0, None)
    assert out.dtype == torch.float32
    assert_close(out, x.cpu().double() + residual.cpu().double(), torch.float32)
