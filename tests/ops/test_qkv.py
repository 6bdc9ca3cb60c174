"""ops.qkv: the gradient of a fused QKV product is the quantized [..., Q, K, V] put together by hand."""

from __future__ import annotations

import itertools

import pytest
import torch

from overdrive.ops.qkv import qkv_gradient
from overdrive.ops.quantize import Mode, Quantization, Quantized, quantize
from tests.numerics import E4M3, E5M2, assert_close, assert_same_bits
from tests.ops.quantized import MODES, on_cpu, tail

HEADS = [(4, 4, 16), (4, 2, 32), (6, 1, 8), (2, 1, 64), (8, 2, 128)]  # heads, groups, head dim


def by_hand(dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """[T, N], head by head: per group its query heads, its key, its value; or all queries, all keys, all values."""
    groups, share = dk.shape[2], dq.shape[2] // dk.shape[2]
    queries, keys, values = (list(t.flatten(0, 1).unbind(1)) for t in (dq, dk, dv))
    if not interleaved:
        return torch.cat(queries + keys + values, 1)
    per_group = [[*queries[g * share : (g + 1) * share], keys[g], values[g]] for g in range(groups)]
    return torch.cat([head for group in per_group for head in group], 1)


def draw_heads(outer, inner, heads, dim, dtype, device, order):
    """[outer, inner, heads, dim] whose memory lies in another order of the dimensions."""
    sizes = (outer, inner, heads, dim)
    back = [order.index(i) for i in range(4)]
    return torch.randn([sizes[i] for i in order]).to(device, dtype).permute(back)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 0, 2, 3), (0, 2, 1, 3), (3, 0, 1, 2)])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "groups", "dim"), HEADS)
@pytest.mark.parametrize("mode", [Mode.PLAIN, *MODES])
def test_gradient(mode, heads, groups, dim, interleaved, order, device):
    dtype = torch.bfloat16
    gradients = [draw_heads(3, 43, n, dim, dtype, device, order) for n in (heads, groups, groups)]
    q = Quantization(Mode.PLAIN, dtype) if mode == Mode.PLAIN else tail(mode, E5M2, device, scale=300.0)
    *out, bias_grad = qkv_gradient(*gradients, interleaved, True, *q)
    expected = by_hand(*on_cpu(tuple(gradients)), interleaved)
    for name, actual, reference in zip(Quantized._fields, out, quantize(expected, False, *on_cpu(q))):
        assert_same_bits(actual, reference, name)
    assert_close(bias_grad, expected.double().sum(0), dtype, what="bias_grad")


@pytest.mark.parametrize(("interleaved", "mode"), [*itertools.product((False, True), (Mode.PLAIN, Mode.CURRENT, Mode.BLOCK_1D))])
def test_no_tokens(interleaved, mode, device):
    gradients = [torch.empty(0, 5, n, 16, device=device) for n in (4, 2, 2)]
    q = Quantization(Mode.PLAIN, torch.float32) if mode == Mode.PLAIN else tail(mode, E4M3, device)
    data, *_, bias_grad = qkv_gradient(*gradients, interleaved, True, *q)
    assert data.shape == (0, 128)
    assert_same_bits(bias_grad, torch.zeros(128))
