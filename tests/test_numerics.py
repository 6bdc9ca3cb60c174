"""The tests' own measures can fail: NaN never passes, shapes count, layouts keep values."""

from __future__ import annotations

import math

import pytest
import torch

from tests.numerics import E4M3, E5M2, LAYOUTS, TOLERANCES, assert_close, assert_same_bits, bits, draw, layout, relative_error

ONES = torch.ones(4, 4, dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "recipe"), TOLERANCES)
def test_tolerance_is_where_it_says(dtype, recipe):
    tolerance = TOLERANCES[dtype, recipe]
    assert_close(ONES * (1 + 0.9 * tolerance), ONES, dtype, recipe)
    with pytest.raises(AssertionError, match=r"that: relative error .* not finite, worst at \[0, 0\]"):
        assert_close(ONES * (1 + 1.1 * tolerance), ONES, dtype, recipe, "that")
    assert_close(ONES * (1 + 1.1 * tolerance), ONES, dtype, recipe, depth=2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_nothing_odd_passes(bad, side):
    pair = [ONES.clone(), ONES.clone()]
    pair[side][2, 1] = bad
    with pytest.raises(AssertionError):
        assert_close(*pair, torch.bfloat16)


def test_odd_on_both_sides_does_not_pass_either():
    bad = ONES * math.nan
    with pytest.raises(AssertionError):
        assert_close(bad, bad, torch.bfloat16)


def test_zero_is_compared_absolutely():
    assert_close(ONES * 0, ONES * 0, torch.float32)
    with pytest.raises(AssertionError):
        assert_close(ONES * 1e-3, ONES * 0, torch.float32)
    assert relative_error(torch.empty(0, 3), torch.empty(0, 3)) == 0


def test_shapes_and_precision_of_the_expected_value_count():
    with pytest.raises(AssertionError, match="shape"):
        assert_close(ONES[:1], ONES, torch.float32)
    with pytest.raises(AssertionError, match="float64"):
        assert_close(ONES, ONES.float(), torch.float32)


def test_bits():
    for dtype in (E4M3, E5M2, torch.bfloat16, torch.float32):
        x = torch.tensor([0.0, -0.0, 1.0, math.nan]).to(dtype)
        assert len(bits(x).unique()) == 4, "signs of zero differ"
        assert_same_bits(x, x.clone())
        with pytest.raises(AssertionError, match=r"2 of 4 differ, first at \[0\]: 0.0, expected -0.0"):
            assert_same_bits(x, torch.tensor([-0.0, 0.0, 1.0, math.nan]).to(dtype))
    all_bytes = torch.arange(256, dtype=torch.uint8)
    assert_same_bits(all_bytes[0x7E:0x80].view(E5M2), all_bytes[0xFE:0xFF].view(E5M2).expand(2))  # NaNs of any payload
    with pytest.raises(AssertionError, match=r"torch\.float32"):
        assert_same_bits(torch.ones(1), torch.ones(1).bfloat16())


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 6), (0, 6), (1, 1)])
def test_layouts_keep_values(kind, shape):
    x = draw(*shape)
    expected = x[:1].expand_as(x) if kind == "expanded" else x
    assert_same_bits(layout(x, kind), expected)
    if shape == (5, 6):
        assert layout(x, kind).is_contiguous() == (kind in ("contiguous", "offset"))


@pytest.mark.gpu
def test_allocations_are_poisoned(device):
    x = torch.ones(3, device=device)
    assert x.new_empty(5).isnan().all()
    assert torch.empty(5, device=device).isnan().all()
    assert torch.empty_like(x).isnan().all()
    assert x.new_empty(5, dtype=E4M3).float().isnan().all()
    assert x.new_empty(5, dtype=E5M2).float().isnan().all()
