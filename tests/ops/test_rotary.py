"""ops.rotary: Q and K turned in one call are those turned by complex numbers, whatever their strides and positions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overdrive.ops.rotary import rotary
from tests.numerics import assert_close, assert_same_bits
from tests.rotary_oracle import frequencies, place_table, turned

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = ("product", "interleaved product", "heads first", "features stepped", "contiguous")


def parts(kind, outer, inner, heads, groups, dim, dtype, device):
    """Q [outer, inner, heads, dim] and K [.., groups, dim] lying as `kind` says, NaN between them."""
    if kind in ("product", "interleaved product"):
        each = 2 if kind == "interleaved product" and heads == groups else 1
        if each == 2:  # q and k of every head beside each other, v after them
            whole = torch.full((outer, inner, heads, 3, dim), math.nan, dtype=dtype, device=device)
            whole[..., :2, :] = torch.randn(outer, inner, heads, 2, dim).to(dtype)
            return whole[..., 0, :], whole[..., 1, :]
        whole = torch.full((outer, inner, (heads + 2 * groups) * dim), math.nan, dtype=dtype, device=device)
        whole[..., : (heads + groups) * dim] = torch.randn(outer, inner, (heads + groups) * dim).to(dtype)
        q, k, _ = whole.split([heads * dim, groups * dim, groups * dim], -1)
        return q.unflatten(-1, (heads, dim)), k.unflatten(-1, (groups, dim))
    drawn = [torch.randn(outer, inner, count, dim).to(device, dtype) for count in (heads, groups)]
    if kind == "heads first":
        return [x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) for x in drawn]
    if kind == "features stepped":
        return [torch.full((*x.shape[:3], 2 * dim), math.nan, dtype=dtype, device=device)[..., ::2].copy_(x) for x in drawn]
    return drawn


def bounds_of(length, sequences, spare):
    """cu_seqlens of so many sequences, some of them empty, which leave up to `spare` tokens over."""
    cuts = sorted(torch.randint(0, length + 1, (max(sequences - 1, 0),)).tolist())
    return [0, *cuts, max(length - spare, cuts[-1] if cuts else 0)] if sequences else [0]


@pytest.mark.parametrize("how", ["sbhd", "bshd", "thd"])
@settings(max_examples=15)  # a GPU compiles two kernels for each
@given(
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    length=st.integers(0, 70),
    batch=st.integers(1, 5),
    groups=st.integers(1, 5),
    share=st.integers(1, 9),
    half=st.integers(1, 40),
    rest=st.integers(0, 40),
    started=st.booleans(),
    interleaved=st.booleans(),
    transpose=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_against_complex_numbers(
    how, dtype, kind, length, batch, groups, share, half, rest, started, interleaved, transpose, seed, device
):
    torch.manual_seed(seed)
    outer, inner = {"sbhd": (length, batch), "bshd": (batch, length), "thd": (length, 1)}[how]
    q, k = parts(kind, outer, inner, groups * share, groups, 2 * half + rest, dtype, device)
    freqs = frequencies(length + 20, 2 * half, interleaved=interleaved)
    starts = torch.randint(0, 20, (batch,), dtype=torch.int32 if seed % 2 else torch.int64) if started else None
    bounds = bounds_of(length, batch, seed % 4) if how == "thd" else None
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=device)
    places = place_table(outer, inner, how == "bshd", None if starts is None else starts.tolist(), bounds)

    start_positions = None if starts is None else starts.to(device)
    arguments = (freqs.to(device), start_positions, cu_seqlens, interleaved, how == "bshd", transpose)
    out_q, out_k = rotary(q, k, *arguments)
    for name, x, out in (("q", q, out_q), ("k", k, out_k)):
        assert out.dtype == dtype
        assert out.is_contiguous()
        assert_close(out, turned(x.cpu(), freqs, places, interleaved, transpose), dtype, what=name)
        assert_same_bits(out[..., 2 * half :], x[..., 2 * half :], f"the rest of {name}")
    alone, nothing = rotary(q, None, *arguments)
    assert_same_bits(alone, out_q)
    assert nothing is None or nothing.numel() == 0


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_angles_of_a_pair_may_differ(interleaved, device):
    """Then it is no rotation, but still out = x cos + turned(x) sin; and transpose is its transposed matrix."""
    x, y = (torch.randn(3, 2, 5, 8, device=device) for _ in range(2))
    freqs = torch.randn(3, 1, 1, 6, device=device)
    rotate = [rotary(v, None, freqs, None, None, interleaved, False, flag)[0] for v, flag in ((x, False), (y, True))]
    pairs = [(0, 1), (2, 3), (4, 5)] if interleaved else [(0, 3), (1, 4), (2, 5)]
    expected, x64, angle = x.cpu().double(), x.cpu().double(), freqs.cpu().double()
    for a, b in pairs:
        expected[..., a] = x64[..., a] * angle[..., a].cos() - x64[..., b] * angle[..., a].sin()
        expected[..., b] = x64[..., b] * angle[..., b].cos() + x64[..., a] * angle[..., b].sin()
    assert_close(rotate[0], expected, torch.float32)
    forward, backward = (rotate[0].double() * y.double()).sum(), (x.double() * rotate[1].double()).sum()
    assert abs(forward - backward) < 1e-5


def test_far_positions(device):
    """Angles up to a million radians keep f32's accuracy: the sine is of the angle as rounded."""
    freqs = (torch.rand(64, 1, 1, 32) * 10.0 ** torch.arange(-2, 6).repeat_interleave(8)[:, None, None, None]).repeat(1, 1, 1, 2)
    x = torch.randn(64, 1, 3, 64)
    out, _ = rotary(x.to(device), None, freqs.to(device), None, None, False, False, False)
    for step in range(8):
        rows = slice(8 * step, 8 * step + 8)
        expected = turned(x[rows], freqs[rows], torch.arange(8)[:, None], False)
        assert_close(out[rows], expected, torch.float32, what=f"angles up to 1e{step - 2}")


NOWHERE = [  # start_positions, cu_seqlens, which of 6 tokens in 2 sequences have no position in freqs of 6
    ([0, 1], None, [(5, 1)]),
    ([-1, 0], None, [(0, 0)]),
    ([2**31 - 6, 0], None, [(s, 0) for s in range(6)]),
    ([2**32, 0], None, [(s, 0) for s in range(6)]),
    (None, [0, 4, 3, 6], [(s, 0) for s in range(6)]),
    (None, [1, 6], [(s, 0) for s in range(6)]),
    (None, [-2, 6], [(s, 0) for s in range(6)]),
    ([4, 0], [0, 3, 6], [(2, 0)]),
]


@pytest.mark.parametrize(("starts", "bounds", "lost"), NOWHERE)
def test_a_position_that_is_not_there_gives_nan_and_no_other(starts, bounds, lost, device):
    x, freqs = torch.randn(6, 2 if bounds is None else 1, 3, 8, device=device), frequencies(6, 6).to(device)
    starts, bounds = (None if v is None else torch.tensor(v, dtype=dtype, device=device)
                      for v, dtype in ((starts, torch.int64), (bounds, torch.int32)))  # fmt: skip
    out, _ = rotary(x, None, freqs, starts, bounds, False, False, False)
    wrong = out.isnan().cpu()
    assert not wrong[..., 6:].any()
    assert torch.equal(wrong[..., :6].all(-1), wrong[..., :6].any(-1))
    assert [tuple(token) for token in wrong[..., 0].all(-1).nonzero().tolist()] == lost


@pytest.mark.parametrize("sequences", [0, 1, 1000])
def test_many_sequences_or_none(sequences, device):
    x, bounds = torch.randn(1100, 1, 2, 8, device=device), torch.arange(sequences + 1, dtype=torch.int32, device=device)
    out, _ = rotary(x, None, frequencies(2, 8).to(device), torch.ones_like(bounds[1:]), bounds, False, False, False)
    places = (torch.arange(1100) < sequences).long()[:, None]
    assert_close(out, turned(x.cpu(), frequencies(2, 8), places, False), torch.float32)
