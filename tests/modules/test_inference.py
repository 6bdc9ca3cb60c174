"""`InferenceParams`: attention to a cache is attention to the whole sequence, however its tokens came and wherever they lie."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch

import overdrive.pytorch as te
from tests.modules.attention_oracle import attend, hidden_by
from tests.numerics import assert_close, assert_same_bits

HEADS, GROUPS, DIM, VALUE_DIM = 4, 2, 16, 8
LENGTH, PAGE = 21, 4  # a last page that is not filled
MEMORY = {"contiguous": {}, "paged": {"is_paged": True, "page_size": PAGE, "total_num_pages": 14}}
STEPS = [
    {"a": 5, "b": 3, "c": 1},
    {"a": 1, "b": 1, "c": 1},
    {"c": 6, "d": 2, "a": 3},  # b has ended, d begins, a and c change places
    {"c": 1, "d": 1, "a": 1},
    {"a": 1, "c": 0, "d": 2, "e": 7},
    {"a": 1, "b": 2},  # another b
    {"b": 1, "a": 0},  # another order and no new page
]


def cache(device, dtype=torch.float32, memory="contiguous", **changes):
    sizes = {"max_batch_size": 4, "max_sequence_length": LENGTH, "num_heads_kv": GROUPS, "head_dim_k": DIM}
    return te.InferenceParams(**{**sizes, "dtype": dtype, "device": device, **MEMORY[memory], **changes})


def core(layout="bshd", mask_type="causal", value_dim=DIM, **options):
    dims = (DIM, value_dim)
    return te.DotProductAttention(HEADS, dims, GROUPS, qkv_format=layout, attn_mask_type=mask_type, layer_number=1, **options)


def tokens(device, dtype=torch.float32, batch=1, length=1, value_dim=DIM, layout="bshd"):
    """Random Q, K and V."""
    first = (batch, length) if layout == "bshd" else (length, batch)
    shapes = ((HEADS, DIM), (GROUPS, DIM), (GROUPS, value_dim))
    return [torch.randn(*first, *shape).to(device, dtype) for shape in shapes]


def batch_of(new, steps, layout, filler, spare=0):
    """The sequences' new tokens [tokens, ...] as one batch, `filler` in its padding and in `spare` tokens and rows more."""
    if layout == "thd":
        return torch.cat([*new, new[0].new_full((spare, *new[0].shape[1:]), filler)])
    length = max(steps.values()) + spare
    batch = torch.full((len(new) + spare, length, *new[0].shape[1:]), filler, dtype=new[0].dtype, device=new[0].device)
    for row, x in zip(batch, new):
        row[: len(x)] = x
    return batch if layout == "bshd" else batch.transpose(0, 1)


def rows_of(out, steps, layout):
    """What `out` says of each sequence and its padding, and of padding between and behind."""
    if layout == "thd":
        *rows, rest = out.split([*steps.values(), len(out) - sum(steps.values())])
        return rows, rest
    out = out if layout == "bshd" else out.transpose(0, 1)
    return out[: len(steps)], out[len(steps) :]


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("layout", ["bshd", "sbhd", "thd"])
@pytest.mark.parametrize("mask_type", ["causal", "padding_causal", "causal_bottom_right", "no_mask", "padding"])
@pytest.mark.parametrize(("dtype", "value_dim"), [(torch.float32, VALUE_DIM), (torch.float16, DIM), (torch.bfloat16, DIM)])
def test_ragged_sequences_that_come_grow_and_end(device, dtype, value_dim, mask_type, layout, memory):
    """Against attention in float64 over each whole sequence; what lies in the padding, NaN even, counts for nothing."""
    module, params = core(layout, mask_type, value_dim), cache(device, dtype, memory, head_dim_v=value_dim)
    past: dict = {}
    for index, steps in enumerate(STEPS):
        spare = index % 2 if len(steps) < 4 else 0
        params.pre_step(steps)
        new = {name: [x[0] for x in tokens(device, dtype, 1, count, value_dim)] for name, count in steps.items()}
        known = {name: [x[:0] for x in qkv] for name, qkv in new.items()} | {n: p for n, p in past.items() if n in steps}
        past = {name: [torch.cat(pair) for pair in zip(known[name], new[name])] for name in steps}
        assert params.get_seqlens_pre_step().tolist() == [len(known[name][0]) for name in steps]
        assert params.sequences == {name: len(past[name][0]) for name in steps}
        batch = [batch_of([new[name][i] for name in steps], steps, layout, math.nan, spare) for i in range(3)]
        out = module(*batch, inference_params=params)
        assert out.shape == (*batch[0].shape[:-2], HEADS * value_dim)
        rows, rest = rows_of(out, steps, layout)
        for row, (name, count) in zip(rows, steps.items()):
            if count:
                q, k, v = (x.cpu().double().transpose(0, 1)[None] for x in past[name])
                q = q[:, :, -count:]
                hidden = hidden_by("causal_bottom_right" if "causal" in mask_type else "no_mask", None, count, k.shape[2])
                expected = attend(q, k, v, hidden)[0].transpose(0, 1).flatten(1)
                assert_close(row[:count], expected, dtype, what=f"step {index}, sequence {name}", depth=2)
            assert not row[count:].any(), "padding gives zeros"
        assert not rest.any()


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("layout", ["bshd", "sbhd", "thd"])
@pytest.mark.parametrize("rotary", [None, "one", "pair"])
@pytest.mark.parametrize("split", [[9], [1] * 9, [4, 1, 3, 1]])
def test_layers_with_a_cache_are_layers_without(device, split, rotary, layout, memory):
    """Prefill, decode and both mixed give what the layers give for the whole sequence, each from where it is."""
    size, dtype = HEADS * DIM, torch.float32
    options = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "params_dtype": dtype, "device": device}
    layers = [
        te.TransformerLayer(size, 2 * size, HEADS, GROUPS, layer_number=i, attn_input_format=layout, **options) for i in (1, 2)
    ]
    freqs = None if rotary is None else te.RotaryPositionEmbedding(DIM)(LENGTH).to(device)
    freqs = (freqs, freqs.clone()) if rotary == "pair" else freqs
    x, lead = torch.randn(2, 12, size, device=device), 3  # the second sequence is three tokens ahead

    def run(x, params):
        shape, call = x.shape, {"inference_params": params, "rotary_pos_emb": freqs}
        if layout == "thd":
            ends = torch.arange(len(x) + 1, dtype=torch.int32, device=device) * x.shape[1]
            call |= {} if params else {"cu_seqlens_q": ends, "cu_seqlens_kv": ends}
        x = {"bshd": x, "sbhd": x.transpose(0, 1), "thd": x.flatten(0, 1)}[layout]
        for layer in layers:
            x = layer(x, **call)
        return x.transpose(0, 1) if layout == "sbhd" else x.view(shape)

    params, done = cache(device, dtype, memory), 0
    with torch.no_grad():
        expected = run(x, None)
        params.pre_step({1: lead})
        run(x[1:, :lead], params)
        for count in split:
            params.pre_step({0: count, 1: count})
            out = run(torch.stack((x[0, done : done + count], x[1, lead + done : lead + done + count])), params)
            want = torch.stack((expected[0, done : done + count], expected[1, lead + done : lead + done + count]))
            assert_close(out, want.double().cpu(), dtype, depth=16)
            done += count


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("mask_type", ["padding_causal", "no_mask"])
def test_prompts_of_one_length_need_no_mask(device, mask_type, memory, monkeypatch):
    """They attend to themselves, as a call without a cache; with others, padding or a past they attend to the cache."""
    module, bare, params = (
        core(mask_type=mask_type),
        core(mask_type=mask_type.removeprefix("padding_")),
        cache(device, memory=memory),
    )
    masks, made = [], te.InferenceParams.mask
    monkeypatch.setattr(te.InferenceParams, "mask", lambda *args: masks.append(1) or made(*args))
    q, k, v = tokens(device, batch=2, length=6)
    params.pre_step({"a": 6, "b": 6})
    assert_same_bits(module(q, k, v, inference_params=params), bare(q, k, v))
    assert_same_bits(params.convert_paged_to_nonpaged(1)[0][:, :6], k)
    assert not masks
    for steps in ({"a": 6, "c": 6}, {"d": 6, "e": 5}, {"f": 6}):  # a past, padding, a row of padding
        params.pre_step(steps)
        out = module(q, k, v, inference_params=params)
        whole = [index for index, (name, count) in enumerate(steps.items()) if name != "a" and count == 6]
        assert_close(out[whole], bare(q, k, v)[whole].double().cpu(), torch.float32)
        assert masks.pop()


@pytest.mark.parametrize("memory", MEMORY)
def test_nothing_of_an_ended_sequence_is_left(device, memory):
    """Not even its NaNs, which a probability of 0 would not take away."""
    module, params = core(), cache(device, memory=memory)
    q, k, v = tokens(device, batch=4, length=13)
    params.pre_step(dict.fromkeys(range(4 if memory == "contiguous" else 3), 13))
    count = len(params.sequences)
    module(q[:count], *(torch.full_like(x[:count], math.nan) for x in (k, v)), inference_params=params)
    params.pre_step({"next": 2})
    out = module(*(x[:1, :2] for x in (q, k, v)), inference_params=params)
    assert_same_bits(out, module(*(x[:1, :2] for x in (q, k, v)), inference_params=_fresh(device, memory)))
    params.reset()
    assert params.sequences == {}
    params.pre_step({"next": 2})
    assert_same_bits(out, module(*(x[:1, :2] for x in (q, k, v)), inference_params=params))


@pytest.mark.parametrize("memory", MEMORY)
def test_a_sequence_that_is_nan_spoils_no_other(device, memory):
    module, params = core(), cache(device, memory=memory)
    q, k, v = tokens(device, batch=3, length=2)
    bad = torch.full_like(k[:1], math.nan)
    params.pre_step({"ended": 1, "bad": 2})
    module(q[:2], *(torch.cat((x[:1], bad)) for x in (k, v)), inference_params=params)
    params.pre_step({"bad": 2})
    module(q[:1], bad, bad, inference_params=params)
    params.pre_step({"next": 2, "bad": 2, "last": 2})
    out = module(q, *(torch.cat((x[:1], bad, x[2:])) for x in (k, v)), inference_params=params)
    clean = cache(device, memory=memory)
    clean.pre_step({"next": 2, "bad": 2, "last": 2})
    expected = module(q, k, v, inference_params=clean)
    assert_same_bits(out[::2], expected[::2])
    assert out[1].isnan().all()


def _fresh(device, memory):
    params = cache(device, memory=memory)
    params.pre_step({"next": 2})
    return params


def test_what_step_returns(device):
    _, k, v = tokens(device, batch=2, length=6)
    for memory in MEMORY:
        params = cache(device, memory=memory)
        params.pre_step({"a": 6, "b": 2})
        keys, values, table = params.step(7, k, v, "bshd")
        if memory == "paged":
            assert keys.shape == values.shape == (14, PAGE, GROUPS, DIM)
            assert table.tolist() == [[0, 1, 0, 0, 0, 0], [2, 2, 2, 2, 2, 2]]
            assert_same_bits(keys[[0, 1]].flatten(0, 1)[:6], k[0])
        else:
            assert keys.shape == values.shape == (4, LENGTH, GROUPS, DIM)
            assert table is None
            assert_same_bits(values[0, :6], v[0])
        packed = [torch.cat((x[0], x[1, :2], x[1, 2:] * math.nan)) for x in (k, v)]  # tokens of no sequence behind
        pages = params.step(8, *packed, "thd")
        flat_keys, flat_values = params.convert_paged_to_nonpaged(8)
        assert_same_bits(pages[0], keys)
        assert_same_bits(pages[1], values)
        assert_same_bits(flat_keys[0, :6], k[0])
        assert_same_bits(flat_values[1, :2], v[1, :2])


def test_memory_is_allocated_once_and_outlives_inference_mode(device):
    module, params = core(), cache(device)
    params.allocate_memory(1)
    q, k, v = tokens(device)
    with torch.inference_mode():
        params.pre_step({0: 1})
        first, _, _ = params.step(1, k, v, "bshd")
    params.pre_step({0: 1})
    module(q, k, v, inference_params=params)
    params.reset()
    params.pre_step({0: 1})
    again, _, _ = params.step(1, k, v, "bshd")
    assert first.data_ptr() == again.data_ptr()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda params: pickle.loads(pickle.dumps(params))], ids=["deepcopy", "pickle"])
def test_a_copy_has_lengths_of_its_own(device, copied):
    params = cache(device)
    params.pre_step({"a": 3})
    assert params.get_seqlens_pre_step().tolist() == [0]
    other = copied(params)
    other.pre_step({"a": 1})
    assert other.get_seqlens_pre_step().tolist() == [3]
    assert params.get_seqlens_pre_step().tolist() == [0]


def test_pages_are_shared_and_come_back(device):
    """14 pages hold no four sequences of 21 tokens, yet a long one beside short ones, and the next after it."""
    params = cache(device, memory="paged")
    for name in ("first", "second", "third"):
        params.pre_step({name: 21, "short": 4, "other": 1})
        assert params.sequences[name] == 21
        params.pre_step({})


def test_under_autocast_the_cache_is_of_its_dtype(device):
    params = cache(device, torch.bfloat16)
    params.pre_step({0: 3})
    with torch.autocast(device, torch.bfloat16):
        out = core()(*tokens(device, length=3), inference_params=params)
    assert out.dtype == torch.bfloat16


class Model(torch.nn.Module):
    """Tokens to logits, through layers of packed sequences."""

    def __init__(self, device, **options):
        super().__init__()
        size = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "device": device, "attn_input_format": "thd", **options}
        self.embedding = torch.nn.Embedding(64, HEADS * DIM, device=device)
        self.layers = torch.nn.ModuleList(
            te.TransformerLayer(HEADS * DIM, 128, HEADS, GROUPS, layer_number=i, **size) for i in (1, 2)
        )
        self.head = torch.nn.Linear(HEADS * DIM, 64, bias=False, device=device)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.2)
        self.freqs = te.RotaryPositionEmbedding(DIM)(LENGTH).to(device)

    def forward(self, sequences, **call):
        """The last logits of each of `sequences`, lists of tokens."""
        x = self.embedding(torch.tensor([*itertools.chain(*sequences)], device=self.embedding.weight.device))
        for layer in self.layers:
            x = layer(x, rotary_pos_emb=self.freqs, **call)
        ends = torch.tensor([len(tokens) for tokens in sequences]).cumsum(0)
        return self.head(x[ends - 1])


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("decoder", [False, True])
def test_packed_generation_gives_the_tokens_of_no_cache(device, decoder, memory):
    """Ragged prompts in one prefill, then a token of each; sequences end and begin on the way."""
    model = Model(device, **({"layer_type": "decoder"} if decoder else {})).eval()
    encoded = {name: torch.randn(length, HEADS * DIM, device=device) for name, length in zip("abcd", (3, 1, 4, 2))}

    def bounds(lengths):
        return torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)

    def call_of(batch, params):
        queries = bounds([len(tokens) for tokens in batch.values()])
        if not decoder:
            return {"inference_params": params} if params else {"cu_seqlens_q": queries, "cu_seqlens_kv": queries}
        keys = [encoded[name] for name in batch]
        lengths = {"cu_seqlens_q": queries, "cu_seqlens_kv": bounds([len(x) for x in keys])}
        return {"inference_params": params, "encoder_output": torch.cat(keys), **lengths}

    prompts = {name: torch.randint(64, (length,)).tolist() for name, length in zip("abcd", (5, 1, 9, 2))}
    params, whole = cache(device, memory=memory), {name: prompts[name] for name in "abc"}
    new = dict(whole)
    with torch.no_grad():
        for step in range(9):
            if step == 3:  # b ends, d begins in the same step in which the others add a token
                del whole["b"], new["b"]
                whole["d"] = new["d"] = prompts["d"]
            params.pre_step({name: len(tokens) for name, tokens in new.items()})
            cached = model(list(new.values()), **call_of(new, params)).argmax(-1).tolist()
            uncached = model(list(whole.values()), **call_of(whole, None)).argmax(-1).tolist()
            assert cached == uncached, f"step {step}"
            new = {name: [token] for name, token in zip(whole, cached)}
            whole = {name: whole[name] + new[name] for name in whole}
    pairs = {pair for tokens in whole.values() for pair in itertools.pairwise(tokens)}
    assert len(pairs) > len({first for first, _ in pairs}), "the next token is not a matter of the last one alone"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*Online softmax.*")  # torch.compile's own
@pytest.mark.parametrize("layout", ["bshd", "thd"])
def test_a_compiled_layer_decodes_without_recompiling(layout, device):
    """One graph for the prompt, one for all tokens after it."""
    options = {"layer_number": 1, "attn_input_format": layout, "hidden_dropout": 0.0, "attention_dropout": 0.0, "device": device}
    layer = te.TransformerLayer(HEADS * DIM, 128, HEADS, GROUPS, **options).eval()
    torch._dynamo.reset()
    compiled, x = torch.compile(layer, fullgraph=True), torch.randn(2, 16, HEADS * DIM, device=device)
    freqs, params, expected = te.RotaryPositionEmbedding(DIM)(LENGTH).to(device), cache(device), cache(device)
    params.allocate_memory(1)
    with torch.no_grad():
        for index, (done, count) in enumerate([(0, 4), *((4 + i, 1) for i in range(12))]):
            for cached in (params, expected):
                cached.pre_step({"a": count, "b": count})
            new = x[:, done : done + count] if layout == "bshd" else x[:, done : done + count].flatten(0, 1)
            want = layer(new, inference_params=expected, rotary_pos_emb=freqs)
            with torch._dynamo.config.patch(error_on_recompile=index > 1):
                out = compiled(new, inference_params=params, rotary_pos_emb=freqs)
            assert_close(out, want.double().cpu(), torch.float32, depth=8)


# --- bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "steps", "message"),
    [
        ("contiguous", {"a": 6}, "overflows: sequence 'a' has 16 tokens and step_dict adds 6, over max_sequence_length=21"),
        ("paged", {"a": 5, "b": 21, "c": 9}, "overflows: .* need 15 pages of 4 tokens, there are total_num_pages=14"),
        ("contiguous", dict.fromkeys("abcde", 1), "step_dict has 5 sequences, .*max_batch_size=4"),
        ("contiguous", {"a": -1}, r"step_dict\['a'\] must be a number of new tokens from 0 to max_ctx_len=16, got -1"),
        ("contiguous", {"a": 1.0}, r"step_dict\['a'\] must be a number .* got 1.0"),
        ("contiguous", {"b": 17}, "from 0 to max_ctx_len=16, got 17"),
    ],
)
def test_a_cache_that_overflows_says_so_and_stays_as_it_was(device, memory, steps, message):
    params = cache(device, memory=memory, max_ctx_len=21 if "b" in steps and memory == "paged" else 16)
    params.pre_step({"a": 16})
    with pytest.raises(ValueError, match=message):
        params.pre_step(steps)
    assert params.sequences == {"a": 16}
    params.pre_step({"a": 5})
    assert params.get_seqlens_pre_step().tolist() == [16]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"max_batch_size": 0}, ValueError, "max_batch_size must be at least 1"),
        ({"max_sequence_length": 2.5}, TypeError, "max_sequence_length must be an int"),
        ({"num_heads_kv": 0}, ValueError, "num_heads_kv must be at least 1"),
        ({"head_dim_v": -1}, ValueError, "head_dim_v must be at least 1"),
        ({"max_ctx_len": 0}, ValueError, "max_ctx_len must be at least 1"),
        ({"dtype": torch.int32}, TypeError, "dtype must be a floating-point torch.dtype, got torch.int32"),
        ({"is_paged": True, "page_size": 4}, TypeError, "total_num_pages must be an int, got NoneType"),
        ({"is_paged": True, "total_num_pages": 4}, TypeError, "page_size must be an int, got NoneType"),
        ({"page_size": 4}, ValueError, "page_size=4 goes with is_paged=True"),
        ({"qkv_format": "bhsd"}, ValueError, "qkv_format must be one of 'sbhd', 'bshd'"),
        ({"custom_cache_manager": object()}, NotImplementedError, "custom_cache_manager"),
    ],
)
def test_bad_constructor_arguments(device, changes, error, message):
    with pytest.raises(error, match=message):
        cache(device, **changes)


@pytest.mark.parametrize(
    ("batch", "length", "dtype", "heads", "error", "message"),
    [
        (5, 2, torch.float32, GROUPS, ValueError, "the batch has 5 sequences; .* up to max_batch_size=4"),
        (1, 2, torch.float32, GROUPS, ValueError, "the batch has 1 sequences; it must have the 2 that pre_step"),
        (2, 1, torch.float32, GROUPS, ValueError, "sequence with 2 new tokens, the batch has 1"),
        (2, 2, torch.bfloat16, GROUPS, TypeError, "new_k is torch.bfloat16 on .* dtype=torch.float32"),
        (2, 2, torch.float32, 1, ValueError, r"new_k must be \[b, s, num_heads_kv=2, 16\].*got \[2, 2, 1, 16\]"),
    ],
)
def test_new_tokens_that_do_not_fit(device, batch, length, dtype, heads, error, message):
    params = cache(device)
    params.pre_step({"a": 2, "b": 1})
    module = te.DotProductAttention(HEADS, DIM, heads, qkv_format="bshd", layer_number=1)
    q, k, v = tokens(device, dtype, batch, length)
    with pytest.raises(error, match=message):
        module(q, k[:, :, :heads], v[:, :, :heads], inference_params=params)
    assert_same_bits(params.step(1, *tokens(device, batch=2, length=2)[1:], "bshd")[0][2:], torch.zeros(2, LENGTH, GROUPS, DIM))


def test_packed_tokens_that_do_not_fit(device):
    params, module = cache(device), core("thd")
    params.pre_step({"a": 2, "b": 3})
    q, k, v = (x[0] for x in tokens(device, length=5))
    with pytest.raises(ValueError, match="pre_step was told of 5 new tokens, there are 4 packed ones"):
        module(q[:4], k[:4], v[:4], inference_params=params)
    with pytest.raises(ValueError, match=r"new_v must be \[t, num_heads_kv=2, 16\], as the cache was made; got \[4, 2, 16\]"):
        params.step(1, k, v[:4], "thd")
    with pytest.raises(ValueError, match="query_layer and key_layer must have as many tokens with inference_params, got 4 and 5"):
        module(q[:4], k, v, inference_params=params)
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    with pytest.raises(NotImplementedError, match=r"inference_params with cu_seqlens_\*.*pre_step says how long"):
        module(q, k, v, cu_seqlens_q=bounds, cu_seqlens_kv=bounds, inference_params=params)
    module(q, k, v, inference_params=params)


def test_calls_that_make_no_sense(device):
    q, k, v = tokens(device)
    params = cache(device)
    params.pre_step({0: 1})
    with pytest.raises(TypeError, match="inference_params must be an InferenceParams, got object"):
        core()(q, k, v, inference_params=object())
    attention = te.MultiheadAttention(HEADS * DIM, HEADS, device=device, layer_number=1)
    x, angles = torch.randn(1, 1, HEADS * DIM, device=device), te.RotaryPositionEmbedding(DIM)(4).to(device)
    with pytest.raises(TypeError, match="inference_params must be an InferenceParams, got object"):
        attention(x, inference_params=object(), rotary_pos_emb=angles)
    with pytest.raises(ValueError, match=r"inference_params .* no layer_number"):
        te.DotProductAttention(HEADS, DIM, GROUPS, qkv_format="bshd")(q, k, v, inference_params=params)
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
    with pytest.raises(ValueError, match="attention_mask came, but inference_params"):
        core(mask_type="padding")(q, k, v, mask, inference_params=params)
    with pytest.raises(NotImplementedError, match="inference_params with such a mask"):
        core(mask_type="arbitrary")(q, k, v, inference_params=params)
    with pytest.raises(RuntimeError, match="inference_params is for inference, but gradients are on"):
        core()(q.clone().requires_grad_(), k, v, inference_params=params)
    with pytest.raises(RuntimeError, match="inference_params is for inference, but dropout is on"):
        core(attention_dropout=0.5)(q, k, v, inference_params=params)
    with pytest.raises(ValueError, match="qkv_format must be one of 'sbhd', 'bshd', 'thd'; got 'bhsd'"):
        params.step(1, k, v, "bhsd")
    core()(q, k, v, inference_params=params)
    with pytest.raises(RuntimeError, match=r"layer_number=1 has appended .* call pre_step before each forward"):
        core()(q, k, v, inference_params=params)


def test_angles_must_reach_the_longest_sequence(device):
    attention = te.MultiheadAttention(
        HEADS * DIM, HEADS, num_gqa_groups=GROUPS, attention_dropout=0.0, layer_number=1, qkv_format="bshd", device=device
    )
    freqs, params = te.RotaryPositionEmbedding(DIM)(8).to(device), cache(device)
    params.pre_step({"a": 8})
    with torch.no_grad():
        attention(torch.randn(1, 8, HEADS * DIM, device=device), inference_params=params, rotary_pos_emb=freqs)
        params.pre_step({"a": 1})
        with pytest.raises(ValueError, match="rotary_pos_emb has 8 positions, the sequence 9"):
            attention(torch.randn(1, 1, HEADS * DIM, device=device), inference_params=params, rotary_pos_emb=freqs)


# --- on the GPU ---------------------------------------------------------------------------------------------------------


def _decoder(dtype, layout):
    options = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "params_dtype": dtype, "attn_input_format": layout}
    return [te.TransformerLayer(HEADS * DIM, 128, HEADS, GROUPS, layer_number=i, **options).eval() for i in (1, 2)]


def _decode(layers, x, params, freqs):
    for layer in layers:
        x = layer(x, inference_params=params, rotary_pos_emb=freqs)
    return x


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("layout", ["bshd", "thd"])
def test_decoding_waits_for_nothing_and_replays_as_a_graph(layout, memory):
    """Sequences of different lengths, the same ones throughout; a replay after pre_step is the next step."""
    layers, dtype = _decoder(torch.bfloat16, layout), torch.bfloat16
    freqs = te.RotaryPositionEmbedding(DIM)(LENGTH).cuda()
    eager, graphed = (cache("cuda", dtype, memory) for _ in range(2))
    x = torch.randn(10, 3, 5, HEADS * DIM).to("cuda", dtype)
    prompts = x[0] if layout == "bshd" else torch.cat((x[0, 0], x[0, 1, :2], x[0, 2, :3]))
    x = x[:, :, :1] if layout == "bshd" else x[:, :, 0]
    one_each, static = dict.fromkeys("abc", 1), torch.empty_like(x[0])
    with torch.inference_mode():
        for params in (eager, graphed):
            params.pre_step({"a": 5, "b": 2, "c": 3})
            _decode(layers, prompts, params, freqs)
            params.pre_step(one_each)
            _decode(layers, x[1], params, freqs)
        graph = torch.cuda.CUDAGraph()
        graphed.pre_step(dict.fromkeys("abc", 0))
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            out = _decode(layers, static, graphed, freqs)
        for index in range(2, 10):
            try:
                torch.cuda.set_sync_debug_mode("error")
                eager.pre_step(one_each)
                expected = _decode(layers, x[index], eager, freqs)
                graphed.pre_step(one_each)
                static.copy_(x[index])
                graph.replay()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert_same_bits(out, expected, f"step {index}")
