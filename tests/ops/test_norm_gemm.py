"""ops.norm_gemm against float64, and against norm and gemm one after the other."""

from __future__ import annotations

import itertools

import pytest
import torch

from overdrive.ops.gemm import gemm
from overdrive.ops.norm import norm
from overdrive.ops.norm_gemm import norm_gemm
from overdrive.ops.quantize import Mode
from tests.numerics import LAYOUTS, TOLERANCES, assert_close, assert_same_bits, draw, layout, relative_error
from tests.ops.test_norm import DTYPES, EPS, KINDS, formula, plain, to64

SHAPES = (  # tokens, inputs, outputs: every number of tokens that a program may own, more than one, rows that end within a tile
    (1, 16, 1),
    (1, 4096, 300),
    (2, 4100, 130),
    (3, 1000, 64),
    (7, 96, 33),
    (8, 1024, 257),
    (16, 768, 128),
    (17, 4096, 160),
    (32, 2048, 96),
    (70, 272, 200),
)


def draw_arguments(tokens, inputs, outputs, dtype, rms, device, bias=True, kind="contiguous"):
    """(x with a mean and a size of its own, gamma, beta, weight, bias)."""
    x = layout((draw(tokens, inputs) * 3 + 2).to(device, dtype), kind)
    gamma, beta = (draw(inputs, dtype=dtype, device=device) for _ in range(2))
    weight = draw(outputs, inputs, dtype=dtype, device=device, kind=kind)
    return x, gamma, None if rms else beta, weight, draw(outputs, dtype=dtype, device=device) if bias else None


def separately(x, gamma, beta, weight, bias, eps, zero_centered, rms):
    """The norm and the product as two ops; on a GPU summed in f32 throughout, which cuBLAS does for a result in f32."""
    y, *_ = norm(x, gamma, beta, eps, zero_centered, rms, 0, *plain(x.dtype))
    if not x.is_cuda:
        return gemm(y, weight, None, None, bias, x.dtype, Mode.PLAIN, Mode.PLAIN, False)
    out = gemm(y, weight, None, None, None, torch.float32, Mode.PLAIN, Mode.PLAIN, False)
    return (out if bias is None else out + bias.float()).to(x.dtype)


def check(arguments, rms, zero_centered):
    x = arguments[0]
    y = norm_gemm(*arguments, EPS, zero_centered, rms)
    assert (y.dtype, y.is_contiguous()) == (x.dtype, True)
    x64, gamma64, beta64, weight64, bias64 = to64(*arguments)
    y64 = formula(x64, gamma64, beta64, zero_centered, rms)[0] @ weight64.t()
    assert_close(y, (y64 if bias64 is None else y64 + bias64).detach(), x.dtype, what="y", depth=2)
    apart = separately(*arguments, EPS, zero_centered, rms)
    if y.is_cuda:
        assert relative_error(y, apart) <= TOLERANCES[x.dtype, "plain"] / 4  # sums in another order, rounded
    else:
        assert_same_bits(y, apart)


@pytest.mark.parametrize(("rms", "zero_centered"), KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers(shape, dtype, rms, zero_centered, device):
    check(draw_arguments(*shape, dtype, rms, device), rms, zero_centered)


@pytest.mark.parametrize(("beta", "bias"), [*itertools.product((False, True), repeat=2)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_without_beta_or_bias(dtype, beta, bias, device):
    x, gamma, own_beta, *rest = draw_arguments(5, 512, 48, dtype, False, device, bias)
    check((x, gamma, own_beta if beta else None, *rest), False, False)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 4, 20])
def test_layouts(tokens, kind, device):
    check(draw_arguments(tokens, 400, 72, torch.bfloat16, False, device, kind=kind), False, False)


@pytest.mark.parametrize("rms", [False, True])
def test_parameters_of_a_norm_kept_in_float32(rms, device):
    x, gamma, beta, *rest = draw_arguments(3, 1024, 80, torch.bfloat16, rms, device)
    check((x, gamma.float(), None if beta is None else beta.float(), *rest), rms, False)


@pytest.mark.parametrize(("tokens", "outputs"), [(0, 48), (3, 0)])
def test_nothing_to_compute(tokens, outputs, device):
    arguments = draw_arguments(tokens, 64, outputs, torch.bfloat16, False, device)
    assert norm_gemm(*arguments, EPS, False, False).shape == (tokens, outputs)


@pytest.mark.parametrize("tokens", [1, 16, 32])
@pytest.mark.parametrize("rms", [False, True])
def test_a_far_mean_does_not_cancel(rms, tokens, device):
    """A mean of 250 spreads, and a first value that is farther still, leave the accuracy that the input's dtype has."""
    x = draw(tokens, 4096) + 250
    x[:, 0] = -3000
    x, weight = x.to(device, torch.float16), draw(48, 4096, dtype=torch.float16, device=device)
    check((x, torch.ones(4096, dtype=torch.float16, device=device), None, weight, None), rms, False)


def test_nan_stays_in_its_row(device):
    arguments = draw_arguments(5, 160, 40, torch.bfloat16, False, device)
    arguments[0][3, 7] = torch.nan
    y = norm_gemm(*arguments, EPS, False, False)
    assert y.isnan().all(1).tolist() == y.isnan().any(1).tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("tokens", [1, 6, 16])
def test_twice_the_same_bits(tokens, device):
    arguments = draw_arguments(tokens, 2048, 320, torch.bfloat16, False, device)
    assert_same_bits(norm_gemm(*arguments, EPS, False, False), norm_gemm(*arguments, EPS, False, False))
