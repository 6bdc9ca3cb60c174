"""DotProductAttention's features with each other: every pair of values of any two, values and gradients against float64."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from overdrive.functional import attention, flash_varlen
from overdrive.functional import attention_backends as backends
from overdrive.functional.attention import default_slopes, reference_attention
from overdrive.functional.flex import flex
from overdrive.modules.attention import DotProductAttention
from tests.modules import attention_oracle as oracle
from tests.numerics import assert_close, relative_error

FEATURES = {
    "layout": ("sbhd", "bshd", "thd", "thd padded", "thd longer"),
    "mask": (
        "no_mask",
        "causal",
        "causal_bottom_right",
        "padding",
        "padding_causal",
        "padding,causal",
        "padding_causal_bottom_right",
        "arbitrary",
    ),
    "window": (None, (2, 0), (2, 1), (3, -1), (-1, 1), (0, 0)),
    "bottom_right": (None, True, False),
    "bias": ("no_bias", "pre_scale_bias", "post_scale_bias", "shared bias", "frozen bias", "alibi", "slopes", "batch slopes"),
    "softmax": ("vanilla", "off-by-one", "learnable"),
    "groups": (4, 2, 1),
    "dims": ((8, 8), (5, 3), (16, 24)),
    "sizes": ((7, 7), (5, 9), (9, 5)),
    "lengths from": ("mask", "cu_seqlens"),
    "said": ("module", "call"),
    "max_logit": (False, True),
    "checkpoint": (False, True),
    "scale": (None, 0.3),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
}
BATCH, HEADS = 3, 4


def impossible(case: dict) -> bool:
    """What has no meaning, even where only some features are chosen yet."""
    mask, window = case.get("mask", ""), case.get("window")
    if mask == "arbitrary" and case.get("layout", "").startswith("thd"):
        return True
    return "causal" in mask and window is not None and window[1] > 0


def covering(features: dict, seed: int = 0) -> list[dict]:
    """Cases in which every possible pair of values of any two features meets, greedily few."""
    draw, names = random.Random(seed), list(features)
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x in features[a]
        for y in features[b]
        if not impossible({a: x, b: y})
    }
    cases = []
    while missing:
        first, second = min(missing, key=repr)
        case = dict([first, second])
        for name in draw.sample(names, len(names)):
            if name not in case:
                options = [value for value in features[name] if not impossible({**case, name: value})]
                case[name] = max(options, key=lambda value: sum(covers({**case, name: value}, names, missing)))
        case = {name: case[name] for name in names}
        missing -= set(itertools.combinations(case.items(), 2))
        cases.append(case)
    return cases


def covers(case: dict, names: list[str], missing: set):
    known = [(name, case[name]) for name in names if name in case]
    return (pair in missing for pair in itertools.combinations(known, 2))


CASES = covering(FEATURES)


def test_every_pair_is_covered():
    met = {frozenset(pair) for case in CASES for pair in itertools.combinations(case.items(), 2)}
    for (a, xs), (b, ys) in itertools.combinations(FEATURES.items(), 2):
        for x, y in itertools.product(xs, ys):
            assert impossible({a: x, b: y}) or frozenset(((a, x), (b, y))) in met


class Trial:
    """Random inputs of one case, what the oracle makes of them and what the module does."""

    def __init__(self, case: dict, device: str) -> None:
        self.case, self.device = case, device
        self.packed = case["layout"].startswith("thd")
        self.padding = "padding" in case["mask"] or self.packed
        queries, keys = case["sizes"]
        self.queries, self.keys = queries, keys
        self.lengths = (
            [(queries, keys - 2), (queries // 2, keys), (0 if queries == keys else 3, 0 if queries == keys else 4)]
            if self.padding
            else [(queries, keys)] * BATCH
        )
        if self.padding and queries == keys:
            self.lengths = [(queries, keys), (queries // 2, keys // 2), (0, 0)]
        self.arbitrary = torch.rand(BATCH, 1, queries, keys) < 0.4
        self.arbitrary[0, 0, 1] = True  # a query that sees nothing
        self._draw_bias()
        (dim, value_dim), groups = case["dims"], case["groups"]
        shapes = ((queries, HEADS, dim), (keys, groups, dim), (keys, groups, value_dim))
        self.padded = [torch.randn(BATCH, *shape).to(case["dtype"]) for shape in shapes]  # [B, L, heads, channels]
        self.offset = torch.randn(HEADS) if case["softmax"] == "learnable" else torch.zeros(HEADS)
        self.dout = torch.randn(BATCH, queries, HEADS * value_dim).to(case["dtype"])

    def _draw_bias(self) -> None:
        kind, (queries, keys) = self.case["bias"], (self.queries, self.keys)
        self.bias, self.slopes = None, None
        if kind.endswith("bias") and kind != "no_bias":
            lead = {"shared bias": (1, 1), "frozen bias": (1, HEADS)}.get(kind, (BATCH, HEADS))
            self.bias = torch.randn(*lead, queries, keys)
        elif kind.endswith("slopes"):
            self.slopes = torch.rand(*((BATCH,) if kind == "batch slopes" else ()), HEADS)

    def places(self, side: int) -> list[torch.Tensor]:
        """Where each sequence's tokens lie among the packed ones."""
        gap = 2 if self.case["layout"] == "thd padded" else 0
        starts = [0, *itertools.accumulate(pair[side] + gap for pair in self.lengths)]
        return [torch.arange(start, start + pair[side]) for start, pair in zip(starts, self.lengths)]

    def arranged(self, x: torch.Tensor, side: int) -> torch.Tensor:
        """[B, L, ...] in the case's layout."""
        if not self.packed:
            return x.transpose(0, 1).contiguous() if self.case["layout"] == "sbhd" else x.clone()
        gap, spare = {"thd": (0, 0), "thd padded": (2, 2), "thd longer": (0, 3)}[self.case["layout"]]
        total = sum(pair[side] + gap for pair in self.lengths) + spare
        out = torch.randn(total, *x.shape[2:]).to(x.dtype)  # what lies between sequences counts for nothing
        for b, where in enumerate(self.places(side)):
            out[where] = x[b, : len(where)]
        return out

    def gathered(self, x: torch.Tensor, side: int) -> torch.Tensor:
        """The case's layout -> [B, L, ...], zeros where there is no token."""
        if not self.packed:
            return x.transpose(0, 1) if self.case["layout"] == "sbhd" else x
        out = x.new_zeros(BATCH, (self.queries, self.keys)[side], *x.shape[1:])
        for b, where in enumerate(self.places(side)):
            out[b, : len(where)] = x[where.to(x.device)]
        return out

    def expected(self):
        """Output [B, S, H * E], largest scores and gradients in float64."""
        case = self.case
        leaves = [x.double().requires_grad_() for x in self.padded]
        bias = None if self.bias is None else self.bias.double().requires_grad_()
        offset = self.offset.double().requires_grad_()
        bottom_right = case["bottom_right"]
        if bottom_right is None:
            bottom_right = case["mask"] not in ("causal", "padding_causal", "padding,causal")
        outs, largest = [], [-math.inf] * HEADS
        for b, (queries, keys) in enumerate(self.lengths):
            alibi = oracle.slopes(HEADS) if case["bias"] == "alibi" else None
            if self.slopes is not None:
                alibi = self.slopes.double().expand(BATCH, HEADS)[b]
            out, most = oracle.one_sequence(
                leaves[0][b, :queries],
                leaves[1][b, :keys],
                leaves[2][b, :keys],
                causal="causal" in case["mask"],
                window=case["window"] or (-1, -1),
                bottom_right=bottom_right,
                hidden=self.arbitrary[b].expand(HEADS, -1, -1) if case["mask"] == "arbitrary" else None,
                bias=None if bias is None else bias.expand(BATCH, HEADS, -1, -1)[b],
                pre=case["bias"] == "pre_scale_bias",
                alibi=alibi,
                offset=None if case["softmax"] == "vanilla" else offset,
                scale=case["scale"],
            )
            largest = [max(pair) for pair in zip(largest, most)]
            outs.append(torch.nn.functional.pad(out.flatten(1), (0, 0, 0, self.queries - queries)))
        out = torch.stack(outs)
        wanted = [*leaves, *([] if bias is None else [bias]), *([offset] if case["softmax"] == "learnable" else [])]
        live = torch.arange(self.queries) < torch.tensor([queries for queries, _ in self.lengths])[:, None]
        gradients = torch.autograd.grad(out, wanted, self.dout.double() * live[..., None], materialize_grads=True)
        return out, largest, gradients

    def arguments(self) -> tuple[dict, dict]:
        """What the module is built with, and what the call says."""
        case, bias = self.case, self.case["bias"]
        said = {"qkv_format": case["layout"].split()[0], "attn_mask_type": case["mask"], "window_size": case["window"]}
        said["bottom_right_diagonal"] = case["bottom_right"]
        fixed = {"softmax_scale": case["scale"], "softmax_type": case["softmax"], "return_max_logit": case["max_logit"]}
        fixed["attention_type"] = "self" if self.queries == self.keys else "cross"
        call: dict = {"checkpoint_core_attention": case["checkpoint"]}
        if bias != "no_bias":
            kind = {"shared bias": "post_scale_bias", "frozen bias": "post_scale_bias"}.get(bias, bias)
            call["core_attention_bias_type"] = "alibi" if "slopes" in bias else kind
        if self.slopes is not None:
            call["alibi_slopes"] = self.slopes.to(self.device)
        offsets = [
            torch.tensor([0, *itertools.accumulate(pair[side] for pair in self.lengths)], dtype=torch.int32, device=self.device)
            for side in (0, 1)
        ]
        if self.packed:
            call["cu_seqlens_q"], call["cu_seqlens_kv"] = offsets
            if case["lengths from"] == "mask":  # whose longest sequence is then what the tensors say
                longest = [max(pair[side] for pair in self.lengths) for side in (0, 1)]
                assert longest == [self.queries, self.keys]
            else:
                call["max_seqlen_q"], call["max_seqlen_kv"] = self.queries, self.keys
            if case["layout"] == "thd padded":
                call["pad_between_seqs"] = True
                for name, offset in zip(("cu_seqlens_q_padded", "cu_seqlens_kv_padded"), offsets):
                    call[name] = offset + 2 * torch.arange(BATCH + 1, dtype=torch.int32, device=self.device)
        elif self.padding and case["lengths from"] == "cu_seqlens":
            call["cu_seqlens_q"], call["cu_seqlens_kv"] = offsets
        elif self.padding:
            masks = [
                (torch.arange(length) >= torch.tensor([pair[side] for pair in self.lengths])[:, None])[:, None, None].to(
                    self.device
                )
                for side, length in ((0, self.queries), (1, self.keys))
            ]
            call["attention_mask"] = masks[0] if self.queries == self.keys else tuple(masks)
        elif case["mask"] == "arbitrary":
            call["attention_mask"] = self.arbitrary.to(self.device)
        if case["said"] == "call":
            return fixed, {**said, **call}
        return {**said, **fixed}, call

    def module(self, **fixed) -> DotProductAttention:
        module = DotProductAttention(HEADS, self.case["dims"], self.case["groups"], **fixed).to(self.device)
        if self.case["softmax"] == "learnable":
            with torch.no_grad():
                module.softmax_offset.copy_(self.offset)
        return module

    def check(self) -> str:
        """Checks output and gradients; the backend that explain names."""
        fixed, call = self.arguments()
        module, dtype = self.module(**fixed), self.case["dtype"]
        inputs = [self.arranged(x, min(side, 1)).to(self.device).requires_grad_() for side, x in enumerate(self.padded)]
        bias = None
        if self.bias is not None:
            bias = self.bias.to(self.device).requires_grad_(self.case["bias"] != "frozen bias")
            call["core_attention_bias"] = bias
        out = module(*inputs, **call)
        largest = None
        if self.case["max_logit"]:
            out, largest = out
        dout = self.arranged(self.dout, 0).to(self.device)
        learned = [] if self.case["softmax"] != "learnable" else [module.softmax_offset]
        wanted = [*inputs, *([bias] if bias is not None and bias.requires_grad else []), *learned]
        gradients = torch.autograd.grad(out, wanted, dout)

        expected, most, exact = self.expected()
        if self.case["bias"] == "frozen bias":
            exact = [*exact[:3], *exact[4:]]
        depth = 4 if self.device == "cpu" else 8  # kernels with biases recompute the scores in backward
        assert_close(self.gathered(out, 0), expected, dtype, what="out", depth=depth)
        if self.packed:
            assert torch.count_nonzero(out) == torch.count_nonzero(self.gathered(out, 0))  # zeros between the sequences
        for index, (name, actual, want) in enumerate(zip(("dq", "dk", "dv", "dbias or doffset", "doffset"), gradients, exact)):
            if index < 3:
                gathered = self.gathered(actual, min(index, 1))
                assert not self.packed or torch.count_nonzero(actual) == torch.count_nonzero(gathered)
                actual = gathered
            assert_close(actual, want, dtype, what=name, depth=depth)
        if largest is not None:
            assert largest.dtype == torch.float32
            assert not largest.requires_grad
            assert relative_error(largest, torch.tensor(most)) < 1e-5
        decision = module.explain(*inputs, **{name: value for name, value in call.items() if name != "checkpoint_core_attention"})
        assert decision.backend not in decision.passed_over
        return decision.backend


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_pairs(case, device):
    torch.manual_seed(0)
    Trial(case, device).check()


COMPILED = {
    "window": {"mask": "causal", "window": (2, 0)},
    "padding and window": {"mask": "padding_causal_bottom_right", "window": (2, 0)},
    "alibi": {"bias": "alibi", "mask": "causal"},
    "bias": {"bias": "pre_scale_bias", "mask": "arbitrary"},
    "softmax": {"softmax": "learnable", "max_logit": True},
    "packed": {"layout": "thd", "mask": "padding_causal", "lengths from": "cu_seqlens", "bias": "batch slopes"},
    "packed with padding": {"layout": "thd padded", "mask": "padding", "lengths from": "cu_seqlens", "sizes": (5, 9)},
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("features", COMPILED)
def test_compiles_to_one_graph_with_the_same_numbers(features, device):
    torch.compiler.reset()
    torch.manual_seed(0)
    plain = {name: values[0] for name, values in FEATURES.items()}
    trial = Trial({**plain, **COMPILED[features]}, device)
    fixed, call = trial.arguments()
    module = trial.module(**fixed)
    if trial.bias is not None:
        call["core_attention_bias"] = trial.bias.to(device)
    results = []
    inputs = [trial.arranged(x, min(side, 1)).to(device).requires_grad_() for side, x in enumerate(trial.padded)]
    for function in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        out = function(*inputs, **call)
        out, *largest = out if trial.case["max_logit"] else (out,)
        gradients = torch.autograd.grad(out, inputs, torch.ones_like(out))
        results.append((out, *largest, *gradients))
    for actual, want in zip(*results):
        assert_close(actual, want.detach().cpu().double(), torch.float32)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_call_must_say_the_longest_sequence(device):
    torch.compiler.reset()
    q = torch.randn(7, 4, 8, device=device)
    bounds = torch.tensor([0, 3, 7], dtype=torch.int32, device=device)
    module = torch.compile(DotProductAttention(4, 8, qkv_format="thd"), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"max_seqlen_q must be given under torch.compile"):
        module(q, q, q, cu_seqlens_q=bounds, cu_seqlens_kv=bounds)


def test_state_of_the_learned_offset(device):
    module = DotProductAttention(4, 8, softmax_type="learnable")
    state = module.state_dict()
    assert list(state) == ["softmax_offset"]
    assert state["softmax_offset"].shape == (4,)
    assert state["softmax_offset"].dtype == torch.float32
    assert not state["softmax_offset"].any()
    assert DotProductAttention(4, 8, softmax_type="off-by-one").state_dict() == {}
    assert DotProductAttention(4, 8).state_dict() == {}


def test_slopes_of_published_sizes():
    assert default_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    for heads in (1, 4, 6, 12, 20):
        torch.testing.assert_close(default_slopes(heads), torch.tensor(oracle.slopes(heads)))


@pytest.mark.parametrize(("mask", "per_call"), [("causal", {"window_size": (2, 0)}), ("no_mask", {"window_size": (1, 2)})])
def test_window_of_the_call_replaces_the_modules(mask, per_call, device):
    q, k, v = (torch.randn(7, 2, 4, 8, device=device) for _ in range(3))
    module = DotProductAttention(4, 8, attn_mask_type=mask, window_size=(5, 0))
    assert torch.equal(module(q, k, v, **per_call), DotProductAttention(4, 8, attn_mask_type=mask, **per_call)(q, k, v))
    other = "causal" if mask == "no_mask" else "no_mask"
    expected = DotProductAttention(4, 8, attn_mask_type=other, window_size=(5, 0))(q, k, v)
    assert torch.equal(module(q, k, v, attn_mask_type=other), expected)


def test_packed_sequences_equal_each_alone(device):
    """Whatever lies in the other sequences."""
    q, k, v = (torch.randn(12, 4, 8, device=device) for _ in range(3))
    bounds = torch.tensor([0, 3, 3, 12], dtype=torch.int32, device=device)
    packed = DotProductAttention(4, 8, qkv_format="thd", attn_mask_type="padding_causal")
    out = packed(q, k, v, cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    alone = DotProductAttention(4, 8, qkv_format="bshd")
    for part in (slice(0, 3), slice(3, 12)):
        want = alone(*(x[None, part] for x in (q, k, v)))[0]
        assert_close(out[part], want.cpu().double(), torch.float32, depth=2)


def test_largest_logits_of_nothing(device):
    module = DotProductAttention(4, 8, attn_mask_type="padding", return_max_logit=True)
    q = torch.randn(3, 2, 4, 8, device=device)
    out, largest = module(q, q, q, torch.ones(2, 1, 1, 3, dtype=torch.bool, device=device))
    assert not out.any()
    assert torch.equal(largest.cpu(), torch.full((4,), -math.inf))
    out, largest = module(q[:0], q[:0], q[:0], torch.ones(2, 1, 1, 0, dtype=torch.bool, device=device))
    assert out.shape == (0, 2, 32)
    assert torch.equal(largest.cpu(), torch.full((4,), -math.inf))


def test_dropout_of_the_reference(device):
    """Where no backend can: kept probabilities are scaled up, and the seed repeats them."""
    v = torch.eye(64, device=device)[None, :, None].expand(8, 64, 8, 64)
    q = torch.zeros(8, 64, 8, 64, device=device)
    module = DotProductAttention(
        8, 64, attention_dropout=0.25, qkv_format="bshd", attn_mask_type="no_mask", softmax_type="off-by-one"
    )
    torch.manual_seed(0)
    dropped = module(q, q, v)
    torch.manual_seed(0)
    assert torch.equal(dropped, module(q, q, v))
    assert abs((dropped == 0).double().mean().item() - 0.25) < 5e-3
    kept = dropped[dropped != 0].double()
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (65 * 0.75)), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"core_attention_bias_type": "alibi"}, None),
        ({"core_attention_bias_type": "post_scale_bias", "core_attention_bias": torch.zeros(1, 1, 7, 7)}, None),
        (
            {"core_attention_bias_type": "post_scale_bias", "core_attention_bias": torch.zeros(1, 1, 7, 7, requires_grad=True)},
            "gives no gradient for the bias",
        ),
        ({"window_size": (2, 0)}, None),
    ],
)
def test_explained_on_cpu(arguments, reason):
    q, k, v = (torch.randn(7, 2, 4, 8) for _ in range(3))
    decision = DotProductAttention(4, 8).explain(q, k, v, **arguments)
    assert decision.backend == ("cpu" if reason is None else "math")
    assert decision.passed_over.get("cpu") == reason
    module = DotProductAttention(4, 8, return_max_logit=True, softmax_type="off-by-one").to("cpu")
    decision = module.explain(q, k, v, **arguments)
    assert decision.backend == "reference"
    assert decision.passed_over["math"] == "has the vanilla softmax only"


def test_forced_backend_that_lacks_the_softmax_says_so(device, monkeypatch):
    monkeypatch.setenv("OVERDRIVE_ATTENTION", "math")
    q = torch.randn(7, 2, 4, 8, device=device)
    with pytest.raises(ValueError, match="OVERDRIVE_ATTENTION=math cannot run this attention: has the vanilla softmax only"):
        DotProductAttention(4, 8, softmax_type="learnable").to(device)(q, q, q)
    with pytest.raises(ValueError, match="does not give the largest logit"):
        DotProductAttention(4, 8, return_max_logit=True)(q, q, q)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize("mask", [None, "causal", "tensor"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("with_offset", [False, True])
def test_flex_is_the_reference(mask, biased, with_offset, device):
    """On the CPU torch's dense form of it."""
    q, k, v = (torch.randn(2, heads, 70, 16, device=device) for heads in (4, 2, 2))
    bias = torch.randn(1, 4, 70, 70, device=device) if biased else None
    offset = torch.randn(4, device=device) if with_offset else None
    hidden = None
    if mask == "tensor":
        hidden = torch.rand(2, 1, 70, 70, device=device) < 0.6
        hidden[..., 0] = True
    want, _ = reference_attention(*(x.double() for x in (q, k, v)), hidden, mask == "causal", 0.0, 0.3, bias, offset)
    assert_close(flex(q, k, v, hidden, mask == "causal", 0.3, bias, offset), want.cpu(), torch.float32, depth=4)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("layout", ["thd", "thd padded"])
@pytest.mark.parametrize("softmax", ["vanilla", "learnable"])
@pytest.mark.parametrize(
    ("mask", "window", "bottom_right"),
    [
        ("no_mask", None, None),
        ("padding", (2, 1), None),
        ("padding", (2, 1), False),
        ("padding_causal", None, None),
        ("padding_causal", (3, 0), True),
        ("padding_causal_bottom_right", None, None),
    ],
)
@pytest.mark.parametrize("sizes", [(7, 7), (5, 9), (9, 5)])
def test_flex_takes_packed_sequences_as_they_lie(sizes, mask, window, bottom_right, softmax, layout, device, monkeypatch):
    """On the CPU torch's dense form of it, which the table does not offer there, and forward only."""
    seen = []
    monkeypatch.setitem(backends.BY_NAME, "flex", backends.BY_NAME["flex"]._replace(devices=("cpu", "cuda")))
    monkeypatch.setattr(attention, "flex", lambda query, *rest: (seen.append(query.shape), flex(query, *rest))[1])
    monkeypatch.setenv("OVERDRIVE_ATTENTION", "flex")
    backends._chosen.cache_clear()
    plain = {name: values[0] for name, values in FEATURES.items()}
    said = {"layout": layout, "mask": mask, "window": window, "bottom_right": bottom_right, "softmax": softmax, "sizes": sizes}
    trial = Trial({**plain, **said, "dims": (16, 16), "dtype": torch.float32}, device)
    fixed, call = trial.arguments()
    inputs = [trial.arranged(x, min(side, 1)).to(device) for side, x in enumerate(trial.padded)]
    try:
        with torch.no_grad():
            out = trial.module(**fixed)(*inputs, **call)
    finally:
        backends._chosen.cache_clear()
    assert seen == [(1, HEADS, len(inputs[0]), 16)]
    assert_close(trial.gathered(out, 0), trial.expected()[0].detach(), torch.float32, depth=4)
    assert torch.count_nonzero(out) == torch.count_nonzero(trial.gathered(out, 0))  # zeros between the sequences


def test_flex_runs_only_on_request(device):
    q = torch.randn(7, 2, 4, 16, device=device)
    why = DotProductAttention(4, 16).explain(q, q, q, window_size=(2, 0)).passed_over["flex"]
    assert why == ("runs only where OVERDRIVE_ATTENTION forces it" if device == "cuda" else "runs on cuda only, not on cpu")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TensorFloat32 tensor cores:UserWarning")  # torch.compile's own
@pytest.mark.parametrize("case", [case for case in CASES if min(case["dims"]) >= 16 and not case["max_logit"]], ids=str)
def test_pairs_on_flex(case, device, monkeypatch):
    monkeypatch.setenv("OVERDRIVE_ATTENTION", "flex")
    torch.manual_seed(0)
    Trial(case, device).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["pre_scale_bias", "post_scale_bias"])
@pytest.mark.parametrize("mask", ["no_mask", "causal", "padding_causal"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("lead", "queries", "keys", "groups"),
    [((1, 1), 64, 64, 4), ((3, 4), 70, 70, 2), ((1, 4), 33, 100, 4), ((3, 1), 100, 33, 1), ((3, 4, 1), 7, 40, 4)],
)
def test_biases_in_the_dtype_of_q(lead, queries, keys, groups, frozen, mask, kind, dtype, device):
    """Which torch's memory-efficient kernels take, also a slice of something."""
    torch.manual_seed(0)
    shapes = ((3, queries, 4, 16), (3, keys, groups, 16), (3, keys, groups, 16), (*lead[:2], *(lead[2:] or (queries,)), keys + 3))
    drawn = [torch.randn(shape).to(dtype) for shape in shapes]
    exact = [x.double().requires_grad_() for x in (*drawn[:3], drawn[3][..., 3:])]
    *inputs, wide = (x.to(device) for x in drawn)
    inputs = [x.requires_grad_() for x in inputs]
    added = wide[..., 3:].detach().requires_grad_(not frozen)
    lengths = torch.tensor([min(queries, keys), 5, 1])
    call = {"core_attention_bias_type": kind, "core_attention_bias": added}
    padding = None
    if mask.startswith("padding"):
        padding = [(torch.arange(length) >= lengths[:, None])[:, None, None].to(device) for length in (queries, keys)]
        call["attention_mask"] = tuple(padding)
    module = DotProductAttention(4, 16, groups, qkv_format="bshd", attn_mask_type=mask)
    assert device == "cpu" or module.explain(*inputs, **call).backend == "efficient"
    out = module(*inputs, **call)
    dout = torch.randn(out.shape, dtype=dtype)
    wanted = [*inputs, *([] if frozen else [added])]
    gradients = torch.autograd.grad(out, wanted, dout.to(device))

    scale = 16**-0.5
    hidden = torch.zeros(3, 1, queries, keys, dtype=torch.bool)
    if mask != "no_mask":
        hidden = hidden | torch.ones(queries, keys, dtype=torch.bool).triu(1)
    dead = torch.zeros(3, 1, queries, 1, dtype=torch.bool)
    if padding is not None:
        hidden = hidden | padding[1].cpu()
        dead = padding[0].cpu().transpose(2, 3)
    heads = [x.transpose(1, 2) for x in exact[:3]]
    heads[1:] = [x.repeat_interleave(4 // groups, 1) for x in heads[1:]]
    scores = heads[0] @ heads[1].mT * scale + exact[3] * (scale if kind == "pre_scale_bias" else 1)
    want = (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ heads[2]).masked_fill(dead, 0.0).transpose(1, 2).flatten(2)
    expected = torch.autograd.grad(want, exact[: len(wanted)], dout.double())
    assert_close(out, want.detach(), dtype, what="out", depth=4)
    for name, actual, gradient in zip(("dq", "dk", "dv", "dbias"), gradients, expected):
        assert_close(actual, gradient, dtype, what=name, depth=4)


# --- packed sequences as they lie ---------------------------------------------------------------------------------------

VARLEN_FEATURES = {
    **FEATURES,
    "layout": ("thd", "thd padded", "thd longer"),
    "mask": tuple(mask for mask in FEATURES["mask"] if mask != "arbitrary"),
    "window": (*FEATURES["window"], (1, 12), (70, 0), (9, 90)),
    "bias": ("no_bias",),
    "softmax": ("vanilla",),
    "dims": ((8, 8), (24, 24), (64, 64), (136, 136)),
    "sizes": (*FEATURES["sizes"], (150, 150), (130, 300), (300, 130)),
    "max_logit": (False,),
    "dtype": (torch.bfloat16, torch.float16),
}
VARLEN_CASES = covering(VARLEN_FEATURES)


def at_the_end(case: dict) -> bool:
    """Whether the mask's diagonal, if it has one, ends with the last query and key of each sequence."""
    bottom_right = case["mask"] not in ("causal", "padding_causal", "padding,causal")
    if case["bottom_right"] is not None:
        bottom_right = case["bottom_right"]
    queries, keys = case["sizes"]
    return bottom_right or queries == keys or ("causal" not in case["mask"] and case["window"] is None)


def poison(device: str) -> None:
    """NaN in the memory that is allocated next."""
    for _ in range(2):
        dirty = [torch.full((2**size,), torch.nan, device=device) for size in range(8, 22) for _ in range(8)]
        del dirty


@pytest.mark.gpu
@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("case", VARLEN_CASES, ids=range(len(VARLEN_CASES)))
def test_pairs_on_varlen(case, forced, device, monkeypatch):
    if forced:
        monkeypatch.setenv("OVERDRIVE_ATTENTION", "flash-varlen")
    torch.manual_seed(0)
    poison(device)
    if forced and not at_the_end(case):
        with pytest.raises(ValueError, match="has the diagonal of a mask end with the last query and key"):
            Trial(case, device).check()
    else:
        assert (Trial(case, device).check() == "flash-varlen") == at_the_end(case)


class Imitation(torch.autograd.Function):
    """varlen_attn in plain PyTorch, NaN in what its kernels leave unwritten."""

    @staticmethod
    def parts(offsets_q, offsets_kv):
        return zip(*([slice(*pair) for pair in itertools.pairwise(offsets.tolist())] for offsets in (offsets_q, offsets_kv)))

    @staticmethod
    def attend(query, key, value, scale, left, right):
        queries, keys = query.shape[0], key.shape[0]
        key, value = (x.double().repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        places = torch.arange(queries)[:, None] + keys - queries
        hidden = (torch.arange(keys) > places + right) | (torch.arange(keys) < places - left)
        scores = torch.einsum("qhd,khd->hqk", query.double(), key) * scale
        dead = hidden.all(-1, keepdim=True)
        probabilities = scores.masked_fill(hidden & ~dead, -torch.inf).softmax(-1).masked_fill(dead, 0.0)
        return torch.einsum("hqk,khd->qhd", probabilities, value).to(query.dtype)

    @staticmethod
    def forward(ctx, query, key, value, offsets_q, offsets_kv, most_q, most_kv, scale, window):
        left, right = (-1 if reach >= most_kv else reach for reach in window)  # the kernels' own rule
        if max(left, right) >= 0:
            left, right = (most_kv if reach < 0 else reach for reach in (left, right))
        else:
            left = right = 10**6
        ctx.save_for_backward(query, key, value, offsets_q, offsets_kv)
        ctx.rest = (most_q, most_kv, scale, left, right)
        out = torch.full_like(query, torch.nan)
        for part_q, part_kv in Imitation.parts(offsets_q, offsets_kv):
            one = Imitation.attend(query[part_q], key[part_kv], value[part_kv], scale, left, right)
            out[part_q][:most_q] = one[:most_q]
        return out

    @staticmethod
    def backward(ctx, dout):
        *inputs, offsets_q, offsets_kv = ctx.saved_tensors
        most_q, most_kv, *rest = ctx.rest
        gradients = [torch.full_like(x, torch.nan) for x in inputs]
        for part_q, part_kv in Imitation.parts(offsets_q, offsets_kv):
            leaves = [x[part].detach().requires_grad_() for x, part in zip(inputs, (part_q, part_kv, part_kv))]
            with torch.enable_grad():
                out = Imitation.attend(*leaves, *rest)
            for gradient, one, part, most in zip(
                gradients,
                torch.autograd.grad(out, leaves, dout[part_q]),
                (part_q, part_kv, part_kv),
                (most_q, most_kv, most_kv),
            ):
                gradient[part][:most] = one[:most]
        return *gradients, *(None for _ in range(6))


@pytest.fixture
def imitated(device, monkeypatch):
    """flash-varlen forced, its kernels imitated on the CPU; what these were called with."""
    if device != "cpu":
        pytest.skip("the kernels themselves run")
    calls = []

    def imitation(query, key, value, offsets_q, offsets_kv, most_q, most_kv, *, scale, window_size, enable_gqa=False):
        tensors = (query, key, value)
        assert all(x.stride(2) == 1 and x.stride(0) % 8 == x.stride(1) % 8 == x.storage_offset() % 8 == 0 for x in tensors)
        assert offsets_q.dtype == offsets_kv.dtype == torch.int32
        assert offsets_q.is_contiguous()
        assert offsets_kv.is_contiguous()
        assert most_q > 1 or query.shape[1] == key.shape[1]  # where the kernels count on a query for every sequence
        calls.append((offsets_q.tolist(), offsets_kv.tolist(), most_q, most_kv, window_size))
        return Imitation.apply(*tensors, offsets_q, offsets_kv, most_q, most_kv, scale, window_size)

    backend = backends.BY_NAME["flash-varlen"]._replace(devices=("cpu",), capabilities=())
    monkeypatch.setitem(backends.BY_NAME, "flash-varlen", backend)
    monkeypatch.setattr(backends, "BACKENDS", tuple(backends.BY_NAME.values()))
    monkeypatch.setattr(flash_varlen, "varlen_attn", imitation)
    monkeypatch.setenv("OVERDRIVE_ATTENTION", "flash-varlen")
    backends._chosen.cache_clear()
    yield calls
    backends._chosen.cache_clear()


@pytest.mark.parametrize("case", VARLEN_CASES, ids=range(len(VARLEN_CASES)))
def test_pairs_around_varlen(case, imitated, device):
    torch.manual_seed(0)
    if at_the_end(case):
        assert Trial(case, device).check() == "flash-varlen"
        assert imitated
    else:
        with pytest.raises(ValueError, match="has the diagonal of a mask end with the last query and key"):
            Trial(case, device).check()


def thd(tokens, keys, device, groups=4):
    """Q, K and V of so many tokens as leaves."""
    shapes = ((tokens, 4, 8), (keys, groups, 8), (keys, groups, 8))
    return [torch.randn(shape).to(device, torch.bfloat16).requires_grad_() for shape in shapes]


def offsets(*values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


@pytest.mark.parametrize(
    ("mask", "window", "padded", "call"),
    [
        ("padding", None, None, ([0, 3, 7], [0, 3, 7], 4, 4, (-1, -1))),
        ("padding_causal", None, None, ([0, 3, 7], [0, 3, 7], 4, 4, (-1, 0))),
        ("padding_causal_bottom_right", (2, 0), None, ([0, 3, 7], [0, 3, 7], 4, 4, (2, 0))),
        ("padding_causal", None, (0, 5, 11), ([0, 3, 5, 9], [0, 3, 5, 9], 4, 4, (-1, 0))),
        ("padding_causal", None, (0, 3, 7), ([0, 3, 7], [0, 3, 7], 4, 4, (-1, 0))),
    ],
)
def test_what_the_varlen_kernels_are_told(mask, window, padded, call, imitated):
    q, k, v = thd(7 if padded is None else padded[-1], 7 if padded is None else padded[-1], "cpu")
    said = {} if padded is None else {"cu_seqlens_q_padded": offsets(*padded), "cu_seqlens_kv_padded": offsets(*padded)}
    module = DotProductAttention(4, 8, qkv_format="thd", attn_mask_type=mask, window_size=window)
    module(q, k, v, cu_seqlens_q=offsets(0, 3, 7), cu_seqlens_kv=offsets(0, 3, 7), **said)
    assert imitated == [call]


@pytest.mark.parametrize(("right", "most"), [(0, 6), (1, 10)])
def test_windows_that_look_ahead_reach_before_the_first_key(right, most, imitated):
    module = DotProductAttention(4, 8, qkv_format="thd", attn_mask_type="padding" if right else "causal", window_size=(1, right))
    said = {"cu_seqlens_q": offsets(0, 4, 7), "cu_seqlens_kv": offsets(0, 1, 7)}
    module(*thd(7, 7, "cpu"), **said, bottom_right_diagonal=True)
    assert imitated[0][3:] == (most, (1, right))


@pytest.mark.parametrize("groups", [4, 1])
def test_sequences_of_one_query_or_none(groups, device, request, monkeypatch):
    """With as many tokens as sequences, though not one in each."""
    if device == "cpu":
        request.getfixturevalue("imitated")
    q, k, v = thd(3, 5, device, groups)
    bounds = {"cu_seqlens_q": offsets(0, 1, 1, 2, device=device), "cu_seqlens_kv": offsets(0, 2, 5, 5, device=device)}
    module = DotProductAttention(4, 8, groups, qkv_format="thd", attn_mask_type="padding")
    out = module(q, k, v, **bounds)
    gradients = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    monkeypatch.delenv("OVERDRIVE_ATTENTION", raising=False)
    alone = DotProductAttention(4, 8, groups, qkv_format="bshd", attn_mask_type="no_mask")
    exact = [x.detach().cpu().float().requires_grad_() for x in (q, k, v)]
    want = alone(exact[0][None, :1], exact[1][None, :2], exact[2][None, :2])[0]
    assert_close(out[:1], want.detach().double(), torch.bfloat16, depth=2)
    assert not out[1:].any()
    expected = torch.autograd.grad(want, exact, torch.ones_like(want), allow_unused=True)
    for actual, gradient in zip(gradients, expected):
        assert_close(actual, gradient.double(), torch.bfloat16, depth=2)


def test_unaligned_tensors_are_copied_for_the_varlen_kernels(imitated):
    q, k, v = (torch.randn(7, 4 * 8 + 3, dtype=torch.bfloat16)[:, 3:].unflatten(1, (4, 8)) for _ in range(3))
    bounds = offsets(0, 7)
    DotProductAttention(4, 8, qkv_format="thd")(q, k, v, cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    assert len(imitated) == 1


def test_what_varlen_does_not_take(imitated, monkeypatch):
    q, k, v = thd(7, 7, "cpu")
    bounds = {"cu_seqlens_q": offsets(0, 3, 7), "cu_seqlens_kv": offsets(0, 3, 7)}
    unlike = {"cu_seqlens_q": offsets(0, 3, 7), "cu_seqlens_kv": offsets(0, 2, 7)}
    module = DotProductAttention(4, 8, qkv_format="thd")
    assert module.explain(q, k, v, **bounds).backend == "flash-varlen"
    for call, options, reason in (
        (unlike, {}, "has the diagonal of a mask end"),
        (bounds, {"core_attention_bias_type": "alibi"}, "takes packed sequences only"),
        ({}, {"qkv_format": "bshd"}, "takes packed sequences only"),
    ):
        inputs = [x[None] for x in (q, k, v)] if not call else (q, k, v)
        with pytest.raises(ValueError, match=f"OVERDRIVE_ATTENTION=flash-varlen cannot run this attention: {reason}"):
            module(*inputs, **call, **options)
        with monkeypatch.context() as unforced:
            unforced.delenv("OVERDRIVE_ATTENTION")
            assert reason in module.explain(*inputs, **call, **options).passed_over["flash-varlen"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("padded", [False, True])
def test_varlen_compiles_as_one_graph(padded, imitated, monkeypatch):
    """As far as no kernel is needed: torch's op and its gradient are in the graphs."""
    monkeypatch.setattr(flash_varlen, "varlen_attn", torch.nn.attention.varlen.varlen_attn)
    torch.compiler.reset()
    ops = []

    def capture(graph, _):
        ops.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        values = [node.meta["val"] if isinstance(node, torch.fx.Node) else node for node in output.args[0]]

        def run(arguments):
            arguments.clear()
            return [torch.zeros(x.shape, dtype=x.dtype) if isinstance(x, torch.Tensor) else x for x in values]

        run._boxed_call = True
        return run

    bounds, starts = offsets(0, 3, 7), offsets(0, 4, 8)
    said = {"cu_seqlens_q_padded": starts, "cu_seqlens_kv_padded": starts} if padded else {}
    said |= {"cu_seqlens_q": bounds, "cu_seqlens_kv": bounds, "max_seqlen_q": 4, "max_seqlen_kv": 4}
    module = DotProductAttention(4, 8, 2, qkv_format="thd")
    compiled = torch.compile(module, fullgraph=True, backend=aot_autograd(fw_compiler=capture))
    compiled(*thd(9, 9, "cpu", 2), **said).sum().backward()
    forward, backward = ops
    assert any("_varlen_attn" in op for op in forward)
    assert any("_varlen_attn_backward" in op for op in backward)
    assert any("where" in op for op in forward)  # the offsets cannot be read
    assert any("where" in op for op in backward)


def packed_calls(device):
    """Arguments with padding between sequences, behind them, and without."""
    bounds = offsets(0, 30, 30, 100, device=device)
    said = {"cu_seqlens_q": bounds, "cu_seqlens_kv": bounds, "max_seqlen_q": 70, "max_seqlen_kv": 70}
    padded = offsets(0, 32, 40, 120, device=device)
    return [(said, 100), (said, 128), (said | {"cu_seqlens_q_padded": padded, "cu_seqlens_kv_padded": padded}, 128)]


@pytest.mark.gpu
@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("how", ["graph", "compiled"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
def test_varlen_where_no_offsets_can_be_read(how, index, device, monkeypatch):
    monkeypatch.setenv("OVERDRIVE_ATTENTION", "flash-varlen")
    torch.compiler.reset()
    said, tokens = packed_calls(device)[index]
    module = DotProductAttention(4, 8, 2, qkv_format="thd")
    inputs = thd(tokens, tokens, device, 2)
    dout = torch.randn(tokens, 32, device=device, dtype=torch.bfloat16)

    def step(call):
        out = call(*inputs, **said)
        return out.detach(), *torch.autograd.grad(out, inputs, dout)

    expected = step(module)
    if how == "compiled":
        actual = step(torch.compile(module, fullgraph=True, backend="aot_eager"))
    else:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(module)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            actual = step(module)
        graph.replay()
    outside = (expected[0] == 0).all(-1)
    for a, b in zip(actual, expected):
        assert_close(a, b.cpu().double(), torch.bfloat16)
        assert not a[outside].any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("what", ["padding", "arbitrary", "bias", "alibi", "lengths"])
def test_compiles_with_every_size_traced(what, device):
    """Checks of shapes hold for sizes that the compiler keeps symbolic, and one graph serves other sizes."""
    torch.compiler.reset()
    mask_type = {"padding": "padding", "arbitrary": "arbitrary", "lengths": "padding"}.get(what, "no_mask")
    module = DotProductAttention(4, 16, num_gqa_groups=2, attn_mask_type=mask_type)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, length in ((2, 7), (3, 9)):
        q, k, v = (torch.randn(length, batch, heads, 16, device=device) for heads in (4, 2, 2))
        sizes = {"padding": (batch, 1, 1, length), "arbitrary": (batch, 1, length, length)}
        call = {"attention_mask": torch.rand(sizes[what], device=device) < 0.3} if what in sizes else {}
        if what == "bias":
            bias = torch.randn(batch, 1, length, length, device=device)
            call = {"core_attention_bias_type": "post_scale_bias", "core_attention_bias": bias}
        elif what == "alibi":
            call = {"core_attention_bias_type": "alibi", "alibi_slopes": torch.rand(batch, 4, device=device)}
        elif what == "lengths":
            offsets = torch.arange(batch + 1, dtype=torch.int32, device=device) * (length - 2)
            call = {"cu_seqlens_q": offsets, "cu_seqlens_kv": offsets, "max_seqlen_q": length, "max_seqlen_kv": length}
        assert_close(compiled(q, k, v, **call), module(q, k, v, **call).double().cpu(), torch.float32, depth=2)
