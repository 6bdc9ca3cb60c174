"""ops.column_sum against float64."""

from __future__ import annotations

import pytest
import torch

from overdrive.ops.column_sum import column_sum
from tests.numerics import LAYOUTS, assert_close, assert_same_bits, draw

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(x: torch.Tensor) -> None:
    out = column_sum(x)
    assert (out.dtype, out.is_contiguous()) == (x.dtype, True)
    assert_close(out, x.cpu().double().sum(0), x.dtype)
    assert_same_bits(column_sum(x), out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 16), (1, 7), (33, 200), (127, 256), (2048, 2048), (4099, 1032), (1500, 3001), (70000, 64)])
def test_shapes(shape, dtype, device):
    check(draw(*shape, dtype=dtype, device=device) + 0.5)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts(kind, device):
    check(draw(2100, 2064, dtype=torch.bfloat16, device=device, kind=kind) + 0)
    check(draw(2100, 2064, dtype=torch.bfloat16, device=device, kind=kind))


def test_sums_are_not_rounded_on_the_way(device):
    x = torch.full((2**16, 128), 1.0, dtype=torch.float16, device=device)
    x[2**15 :] = -1.0
    x[0] = 4096  # beyond 2048 float16 knows even numbers only
    assert (column_sum(x) == 4096).all()  # 4095, rounded once
