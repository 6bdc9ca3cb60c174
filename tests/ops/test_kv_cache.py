"""ops.attend_cached against float64, every place that a sequence has not being NaN, and the cache after it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overdrive.ops.kv_cache import attend_cached
from tests.modules.attention_oracle import attend, hidden_by
from tests.numerics import assert_close, assert_same_bits

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def expected(query, past, new, step, causal, scale):
    """Of one sequence, [S, H, D] and (keys, values) [.., G, D]: (out [S, H * E] in float64, keys, values)."""
    key, value = (torch.cat((old, x[:step])) for old, x in zip(past, new))
    out = torch.zeros(query.shape[0], query.shape[1] * value.shape[2], dtype=torch.float64)
    if step:
        q, k, v = (x.cpu().double().transpose(0, 1)[None] for x in (query[:step], key, value))
        hidden = hidden_by("causal_bottom_right" if causal else "no_mask", None, step, len(key))
        out[:step] = attend(q, k, v, hidden, scale)[0].transpose(0, 1).flatten(1)
    return out, key, value


@settings(max_examples=30)  # a GPU compiles a kernel or two for each
@given(
    dtype=st.sampled_from(DTYPES),
    batch=st.integers(1, 4),
    new=st.integers(1, 4),
    groups=st.integers(1, 3),
    share=st.integers(1, 4),
    dims=st.tuples(*(st.sampled_from((8, 16, 40, 64, 128)),) * 2),
    paging=st.sampled_from(((4, 5), (16, 12), (300, 1))),
    batch_first=st.booleans(),
    causal=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_new_tokens_attend_to_their_sequence_and_are_kept(
    device, dtype, batch, new, groups, share, dims, paging, batch_first, causal, seed
):
    torch.manual_seed(seed)
    (page_size, pages), heads, scale = paging, groups * share, 0.7 * dims[0] ** -0.5
    table = torch.randperm(batch * pages).view(pages, batch).t().int()
    steps = torch.randint(0, new + 1, (batch,), dtype=torch.int32)
    starts = torch.randint(0, page_size * pages - new + 1, (batch,), dtype=torch.int32)
    first = (batch, new) if batch_first else (new, batch)
    query, *news = (  # parts of one product
        x.to(device, dtype).unflatten(2, (-1, width))
        for x, width in zip(
            torch.randn(*first, heads * dims[0] + groups * sum(dims)).split(
                [heads * dims[0], groups * dims[0], groups * dims[1]], 2
            ),
            (dims[0], *dims),
        )
    )
    caches = [torch.full((batch * pages * page_size + 1, groups, width), math.nan, dtype=dtype, device=device) for width in dims]
    past = [[torch.randn(start, groups, width).to(device, dtype) for width in dims] for start in starts.tolist()]
    rows = [(table[b, :, None] * page_size + torch.arange(page_size)).flatten().to(device) for b in range(batch)]
    for b, held in enumerate(past):
        for cache, x in zip(caches, held):
            cache[rows[b][: len(x)]] = x
    by_sequence = [x if batch_first else x.transpose(0, 1) for x in (query, *news)]
    for x in by_sequence:  # NaN in the padding
        x.masked_fill_((torch.arange(new) >= steps[:, None])[:, :, None, None].to(device), math.nan)
    held = (starts.to(device), steps.to(device), table.to(device), page_size)
    out = attend_cached(query, *news, *caches, *held, batch_first, causal, scale)
    assert out.shape == (*first, heads * dims[1])
    assert out.is_contiguous()
    for b, step in enumerate(steps.tolist()):
        q, *added = (x[b] for x in by_sequence)
        want, *kept = expected(q, past[b], added, step, causal, scale)
        assert_close((out if batch_first else out.transpose(0, 1))[b], want, dtype, depth=2)
        for cache, x in zip(caches, kept):
            assert_same_bits(cache[rows[b][: len(x)]], x)
            assert cache[rows[b][len(x) :]].isnan().all()


@pytest.mark.parametrize(("batch", "length"), [(1, 1000), (3, 257), (70, 130)])
def test_shares_of_keys_are_put_together(device, batch, length):
    """Few sequences are shared among programs, many are not; shares may be empty, or have all that weighs."""
    dtype, starts = torch.bfloat16, torch.randint(0, length, (batch,), dtype=torch.int32, device=device)
    query, key, value = (torch.randn(batch, 1, count, 64).to(device, dtype) for count in (8, 2, 2))
    caches = [torch.randn(batch * length + 1, 2, 64).to(device, dtype) for _ in range(2)]
    caches[0][3 : 3 + length // 2] *= 20
    table = torch.arange(batch, dtype=torch.int32, device=device)[:, None]
    past = [[cache[b * length : b * length + start] for cache in caches] for b, start in enumerate(starts.tolist())]
    wants = [expected(query[b], past[b], (key[b], value[b]), 1, True, 0.125)[0] for b in range(batch)]
    out = attend_cached(query, key, value, *caches, starts, torch.ones_like(starts), table, length, True, True, 0.125)
    for row, want in zip(out, wants):
        assert_close(row, want, dtype, depth=2)


@pytest.mark.parametrize("shape", [(0, 1), (2, 0)])
def test_nothing_new(device, shape):
    query, counts = torch.ones(*shape, 2, 16, device=device), torch.zeros(shape[0], dtype=torch.int32, device=device)
    cache = torch.ones(9, 2, 16, device=device)
    assert (
        attend_cached(query, query, query, cache, cache.clone(), counts, counts, counts[:, None], 4, True, True, 1.0).numel() == 0
    )
