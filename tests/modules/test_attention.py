"""DotProductAttention: values and gradients against float64, masks, dropout, every usable backend, the choice, bad inputs."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from overdrive.functional import attention_backends as backends
from overdrive.functional.attention_backends import BACKENDS, Case, _chosen, attention_backends
from overdrive.modules.attention import DotProductAttention
from tests.modules import attention_oracle as oracle
from tests.numerics import assert_close, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # of torch 2.11's own tracer

MASKS = ("no_mask", "causal", "causal_bottom_right", "padding", "padding_causal", "padding,causal", "arbitrary")
USABLE = [name for name, (usable, _) in attention_backends().items() if usable and name not in ("flex", "flash-varlen")]
"""flex, which only runs where it is asked for, and flash-varlen have their tests among those of the features that they are for."""


def draw(
    layout="sbhd", batch=2, queries=7, keys=None, heads=4, groups=None, dim=8, value_dim=None, dtype=torch.float32, device="cpu"
):
    """Q, K and V as a QKV product has them: slices of one tensor, which are not contiguous."""
    keys, groups, value_dim = keys or queries, groups or heads, value_dim or dim
    shapes = ((queries, heads, dim), (keys, groups, dim), (keys, groups, value_dim))
    tensors = []
    for length, count, width in shapes:
        lead = (length, batch) if layout == "sbhd" else (batch, length)
        wide = torch.randn(*lead, count * width + 16, dtype=dtype).to(device)
        tensors.append(wide[..., :-16].unflatten(-1, (count, width)).detach().requires_grad_())
    return tensors


def mask_for(mask_type: str, batch: int, queries: int, keys: int):
    if "padding" in mask_type:
        lengths = torch.tensor([keys, keys // 2, 0] * batch)[:batch]
        return (torch.arange(keys) >= lengths[:, None])[:, None, None]
    if mask_type == "arbitrary":
        mask = torch.rand(batch, 1, queries, keys) < 0.4
        mask[0, 0, 1] = True  # a query that sees nothing
        return mask
    return None


def check(layout, mask_type, dtype, device, depth=2, scale=None, **sizes):
    """One forward and backward of DotProductAttention against the oracle's."""
    q, k, v = draw(layout, dtype=dtype, device=device, **sizes)
    batch_dim, sequence_dim = layout.index("b"), layout.index("s")
    batch, queries, keys = q.shape[batch_dim], q.shape[sequence_dim], k.shape[sequence_dim]
    mask = mask_for(mask_type, batch, queries, keys)
    module = DotProductAttention(
        q.shape[2], (q.shape[3], v.shape[3]), k.shape[2], qkv_format=layout, attn_mask_type=mask_type, softmax_scale=scale
    )
    out = module(q, k, v, None if mask is None else mask.to(device))
    dout = torch.randn(out.shape, dtype=dtype).to(device)
    out.backward(dout)

    inputs = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    wide = oracle.attend(*(oracle.heads_first(x, layout) for x in inputs), oracle.hidden_by(mask_type, mask, queries, keys), scale)
    expected = oracle.heads_last(wide, layout)
    expected.backward(dout.cpu().double())
    for what, actual, want in (("out", out, expected), *zip("qkv", (q.grad, k.grad, v.grad), (x.grad for x in inputs))):
        assert_close(actual, want, dtype, what=what, depth=depth)
    return out


@pytest.mark.parametrize("mask_type", MASKS)
@pytest.mark.parametrize("layout", ["sbhd", "bshd"])
def test_masks(layout, mask_type, device):
    check(layout, mask_type, torch.float32, device, batch=3)


@pytest.mark.parametrize("mask_type", ["causal", "padding", "arbitrary"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, mask_type, device):
    check("sbhd", mask_type, dtype, device, queries=65, dim=64, heads=2, batch=3)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mask_type", ["causal", "padding_causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_heads(dtype, mask_type, groups, device):
    check("bshd", mask_type, dtype, device, heads=4, groups=groups, dim=16, queries=17)


@pytest.mark.parametrize(
    "sizes", [{"queries": 1}, {"batch": 1}, {"dim": 5}, {"heads": 1, "dim": 3}, {"dim": 8, "value_dim": 16}, {"dim": 160}]
)
def test_odd_shapes(sizes, device):
    for layout in ("sbhd", "bshd"):
        check(layout, "causal", torch.bfloat16, device, **sizes)


@pytest.mark.parametrize("mask_type", ["no_mask", "causal", "causal_bottom_right", "arbitrary"])
def test_more_keys_than_queries(mask_type, device):
    check("bshd", mask_type, torch.float32, device, queries=5, keys=9)
    check("sbhd", mask_type, torch.float32, device, queries=9, keys=5)  # bottom right: the first rows see nothing


def test_scale(device):
    check("sbhd", "no_mask", torch.float32, device, scale=0.7)


@pytest.mark.parametrize("shape", [(0, 2), (3, 0)])
def test_no_tokens(shape, device):
    q, k, v = (torch.randn(*shape, 4, 8, device=device, requires_grad=True) for _ in range(3))
    out = DotProductAttention(4, 8)(q, k, v)
    out.sum().backward()
    assert out.shape == (*shape, 32)
    assert q.grad.shape == q.shape


def test_strides_that_kernels_refuse(device):
    q, k, v = (torch.randn(2, 4, 8, 6, device=device).permute(3, 0, 1, 2) for _ in range(3))
    expanded = torch.randn(1, 4, 8, device=device).expand(6, 2, 4, 8)
    for tensors in ((q, k, v), (expanded,) * 3):
        expected = oracle.attend(*(oracle.heads_first(x.double(), "sbhd") for x in tensors))
        out = DotProductAttention(4, 8, attn_mask_type="no_mask")(*tensors)
        assert_close(out, oracle.heads_last(expected, "sbhd").cpu(), torch.float32, depth=2)


def test_output_is_a_view_of_what_the_kernel_wrote(device):
    for layout in ("sbhd", "bshd"):
        q, k, v = draw(layout, dim=64, queries=128, dtype=torch.bfloat16, device=device)
        out = DotProductAttention(4, 64, qkv_format=layout)(q, k, v)
        assert out.grad_fn is not None
        if device == "cuda":
            names = []
            node = out.grad_fn
            while node is not None and "Attention" not in node.name():
                names.append(node.name())
                node = node.next_functions[0][0]
            assert not any("Clone" in name or "Copy" in name for name in names), names


def test_padded_queries_give_zeros_and_pass_no_gradient(device):
    q, k, v = draw("bshd", device=device)
    mask = torch.zeros(2, 1, 1, 7, dtype=torch.bool, device=device)
    mask[1, ..., 4:] = True
    mask[0] = True
    out = DotProductAttention(4, 8, qkv_format="bshd", attn_mask_type="padding")(q, k, v, mask)
    out.sum().backward()
    assert not out[1, 4:].any()
    assert not out[0].any()
    assert out[1, :4].all()
    for grad in (q.grad, k.grad, v.grad):
        assert grad.isfinite().all()
        assert not grad[0].any()
        assert not grad[1, 4:].any()


def test_per_call_overrides(device):
    q, k, v = draw("sbhd", device=device)
    module = DotProductAttention(4, 8, attn_mask_type="causal")
    expected = DotProductAttention(4, 8, attn_mask_type="no_mask", qkv_format="bshd")(q, k, v)
    assert torch.equal(module(q, k, v, attn_mask_type="no_mask", qkv_format="bshd"), expected)
    assert torch.equal(module(q, k, v, window_size=(-1, 0)), module(q, k, v))


def test_pair_of_padding_masks(device):
    q, k, v = draw("bshd", queries=5, keys=9, device=device)
    masks = tuple(torch.rand(2, 1, 1, n) < 0.3 for n in (5, 9))
    out = DotProductAttention(4, 8, qkv_format="bshd", attn_mask_type="padding")(q, k, v, tuple(m.to(device) for m in masks))
    inputs = [oracle.heads_first(x.detach().cpu().double(), "bshd") for x in (q, k, v)]
    expected = oracle.heads_last(oracle.attend(*inputs, oracle.hidden_by("padding", masks, 5, 9)), "bshd")
    assert_close(out, expected, torch.float32, depth=2)


def test_torch_autocast_decides_the_dtype(device):
    q, k, v = draw(device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert DotProductAttention(4, 8)(q, k, v).dtype == torch.bfloat16


# --- dropout ------------------------------------------------------------------------------------------------------------


def probabilities(p: float, device: str, seed: int, dtype=torch.bfloat16):
    """(dropped probabilities [B, H, S, T] of uniform attention over 64 keys, V's gradient, the output's gradient)."""
    q = torch.zeros(4, 64, 8, 64, dtype=dtype, device=device)
    v = torch.eye(64, dtype=dtype, device=device)[None, :, None].expand(4, 64, 8, 64).clone().requires_grad_()
    torch.manual_seed(seed)
    out = DotProductAttention(8, 64, attention_dropout=p, qkv_format="bshd", attn_mask_type="no_mask")(q, q, v).unflatten(
        -1, (8, 64)
    )
    dout = torch.randn(out.shape, device=device, dtype=dtype)
    out.backward(dout)
    return out.transpose(1, 2), v.grad.transpose(1, 2), dout.transpose(1, 2)


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5])
def test_dropout_statistics_and_gradient(p, device):
    dropped, dv, dout = probabilities(p, device, 0)
    share = (dropped == 0).double().mean().item()
    assert abs(share - p) < 5e-3
    kept = dropped[dropped != 0].double()
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (64 * (1 - p))), rtol=8e-3, atol=0)
    assert relative_error(dv, dropped.double().transpose(-1, -2) @ dout.double()) < 1e-2


def test_dropout_repeats_with_the_seed_and_only_then(device):
    first, *_ = probabilities(0.25, device, 1)
    assert torch.equal(first, probabilities(0.25, device, 1)[0])
    assert not torch.equal(first, probabilities(0.25, device, 2)[0])


def test_no_dropout_in_evaluation(device):
    q, k, v = draw(device=device)
    module = DotProductAttention(4, 8, attention_dropout=0.5)
    assert not torch.equal(module(q, k, v), module(q, k, v))
    module.eval()
    assert torch.equal(module(q, k, v), DotProductAttention(4, 8)(q, k, v))


@pytest.mark.parametrize("mask_type", ["causal", "padding"])
def test_checkpointed_core_attention_changes_no_bit(mask_type, device):
    q, k, v = draw(device=device, dim=64)
    mask = None if mask_type == "causal" else mask_for(mask_type, 2, 7, 7).to(device)
    module = DotProductAttention(4, 64, attention_dropout=0.5, attn_mask_type=mask_type)
    results = []
    for keep in (False, True):
        torch.manual_seed(3)
        out = module(q, k, v, mask, checkpoint_core_attention=keep)
        results.append((out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_rng_tracker_is_entered(device):
    entered = []

    class Tracker:
        def fork(self):
            entered.append(True)
            return torch.random.fork_rng(devices=[])

    q, k, v = draw(device=device)
    DotProductAttention(4, 8, get_rng_state_tracker=Tracker)(q, k, v)
    assert entered == [True]


# --- backends -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", USABLE)
def test_each_backend(name, device, monkeypatch):
    monkeypatch.setenv("OVERDRIVE_ATTENTION", name)
    backend = next(backend for backend in BACKENDS if backend.name == name)
    dtype = torch.bfloat16
    for mask_type in ("no_mask", "causal", *(("padding", "arbitrary") if "tensor" in backend.masks else ())):
        for layout in ("sbhd", "bshd"):
            for groups in (4, 2):
                check(layout, mask_type, dtype, device, queries=70, dim=64, heads=4, groups=groups, batch=2)


@pytest.mark.parametrize("name", USABLE)
def test_each_backend_drops(name, device, monkeypatch):
    monkeypatch.setenv("OVERDRIVE_ATTENTION", name)
    if not next(backend for backend in BACKENDS if backend.name == name).dropout:
        with pytest.raises(ValueError, match=f"OVERDRIVE_ATTENTION={name} cannot run this attention: has no dropout"):
            probabilities(0.1, device, 0)
        return
    for p in (0.1, 0.25):
        dropped, dv, dout = probabilities(p, device, 0)
        assert abs((dropped == 0).double().mean().item() - p) < 5e-3
        assert relative_error(dv, dropped.double().transpose(-1, -2) @ dout.double()) < 1e-2


def test_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("OVERDRIVE_ATTENTION", "fastest")
    with pytest.raises(ValueError, match=r"OVERDRIVE_ATTENTION must be one of .*cudnn.*got 'fastest'"):
        DotProductAttention(4, 8)(*draw())


def test_forced_backend_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setenv("OVERDRIVE_ATTENTION", "flash-attn-4")
    with pytest.raises(ValueError, match="OVERDRIVE_ATTENTION=flash-attn-4 cannot run this attention: runs on cuda only"):
        DotProductAttention(4, 8)(*draw())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_forced_backend_that_torch_refuses_says_why(monkeypatch):
    monkeypatch.setenv("OVERDRIVE_ATTENTION", "cudnn")
    q, k, v = draw(device="cuda", dim=12, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"OVERDRIVE_ATTENTION=cudnn cannot run this attention: .*multiple of 8"):
        DotProductAttention(4, 12)(q, k, v)


def test_explanation_names_every_backend(device):
    q, k, v = draw(device=device, dim=64, dtype=torch.bfloat16)
    decision = DotProductAttention(4, 64).explain(q, k, v)
    assert {decision.backend, *decision.passed_over} == {backend.name for backend in BACKENDS}
    assert all(decision.passed_over.values())
    assert str(decision).startswith(f"attention runs on {decision.backend}\n")
    assert decision.backend in (("flash-attn-4", "cudnn", "flash") if device == "cuda" else ("cpu",))


def test_forced_backend_is_explained(device, monkeypatch):
    monkeypatch.setenv("OVERDRIVE_ATTENTION", "math")
    decision = DotProductAttention(4, 8).explain(*draw(device=device))
    assert decision.backend == "math"
    assert "OVERDRIVE_ATTENTION=math" in decision.passed_over["cpu" if device == "cpu" else "efficient"]


def test_doctor_gets_a_reason_for_each_missing_backend():
    for usable, reason in attention_backends().values():
        assert usable == (reason == "")
    assert attention_backends()["math"] == (True, "")


@pytest.mark.parametrize(
    ("change", "best"),
    [
        ({}, "cudnn"),
        ({"dropout": "any"}, "cudnn"),
        ({"mask": "tensor", "dropout": "any"}, "cudnn"),
        ({"head_dim": 512, "value_dim": 512, "mask": "tensor"}, "efficient"),
        ({"dtype": torch.float32}, "efficient"),
        ({"head_dim": 512, "value_dim": 512}, "efficient"),
        ({"dtype": torch.float64}, "math"),
        ({"device": "cpu"}, "cpu"),
        ({"device": "cpu", "dropout": "any"}, "math"),
    ],
)
def test_preferences_on_hopper(change, best, monkeypatch):
    def usable(backend, device):
        return "" if device in backend.devices and not backend.package else "elsewhere"

    monkeypatch.setattr(backends, "_machine_refusal", usable)
    monkeypatch.setattr(backends, "_capability", lambda: (9, 0))
    case = Case("cuda", torch.bfloat16, "causal", "none", 128, 128, False, "large")._replace(**change)
    assert _chosen.__wrapped__("", case).names[0] == best
    grouped = _chosen.__wrapped__("", case._replace(grouped=True))
    assert grouped.repeat == (best == "efficient")


def test_blackwell_rounds_dropout(monkeypatch):
    monkeypatch.setattr(
        backends, "_machine_refusal", lambda backend, device: "" if backend.name in ("cudnn", "flash") else "elsewhere"
    )
    monkeypatch.setattr(backends, "_capability", lambda: (10, 0))
    case = Case("cuda", torch.bfloat16, "causal", "any", 128, 128, False, "large")
    assert _chosen.__wrapped__("", case).names[0] == "flash"
    assert _chosen.__wrapped__("", case._replace(dropout="sixteenths")).names[0] == "cudnn"


# --- torch.compile ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_type", ["causal", "padding"])
@pytest.mark.parametrize("keep", [False, True])
def test_compiles_to_the_same_bits(mask_type, keep, device):
    module = DotProductAttention(4, 64, 2, attn_mask_type=mask_type)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    mask = None if mask_type == "causal" else mask_for(mask_type, 2, 7, 7).to(device)
    inputs = draw(device=device, dim=64, groups=2, dtype=torch.bfloat16)
    results = []
    for call in (module, compiled):
        out = call(*inputs, mask, checkpoint_core_attention=keep)
        results.append((out, *torch.autograd.grad(out, inputs, torch.ones_like(out))))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("mask_type", ["causal", "padding"])
def test_compiled_code_uses_the_backend_that_was_explained(mask_type, device):
    kernels = set()

    def capture(graph, _):
        kernels.update(str(node.target) for node in graph.graph.nodes if "attention" in str(node.target))
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    module = DotProductAttention(4, 64, attn_mask_type=mask_type)
    compiled = torch.compile(module, fullgraph=True, backend=aot_autograd(fw_compiler=capture))
    for length in (64, 80, 96):  # the second makes the length symbolic
        q, k, v = draw(device=device, queries=length, dim=64, dtype=torch.bfloat16)
        mask = None if mask_type == "causal" else mask_for(mask_type, 2, length, length).to(device)
        assert torch.equal(compiled(q, k, v, mask), module(q, k, v, mask))
        backend = module.explain(q, k, v, mask).backend
    name = {"cpu": "flash_attention_for_cpu", "cudnn": "cudnn_attention"}[backend]
    assert {kernel.split(".")[1] for kernel in kernels if "backward" not in kernel} == {f"_scaled_dot_product_{name}"}


# --- bad inputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_gqa_groups": 3}, ValueError, "num_attention_heads=4 must be a multiple of num_gqa_groups=3"),
        ({"num_gqa_groups": 0}, ValueError, "num_gqa_groups must be at least 1"),
        ({"kv_channels": 0}, ValueError, "kv_channels must be at least 1"),
        ({"attn_mask_type": "diagonal"}, ValueError, "attn_mask_type must be one of 'no_mask'.*got 'diagonal'"),
        ({"qkv_format": "bhsd"}, ValueError, "qkv_format must be one of 'sbhd', 'bshd', 'thd'; got 'bhsd'"),
        ({"attention_dropout": 1.5}, ValueError, "attention_dropout must be a probability"),
        ({"attention_dropout": -0.1}, ValueError, "attention_dropout must be a probability"),
        ({"window_size": (128, 1)}, ValueError, r"window_size=\(128, 1\) looks ahead, which attn_mask_type='causal' forbids"),
        ({"window_size": (-1, 0), "attn_mask_type": "no_mask"}, ValueError, r"window_size=\(-1, 0\) means a causal mask"),
        ({"window_size": 128}, ValueError, "window_size must be a pair .*got 128"),
        ({"window_size": (4,)}, ValueError, "window_size must be a pair"),
        ({"window_size": (4.0, 0)}, ValueError, "window_size must be a pair"),
        ({"window_size": (-2, 0)}, ValueError, "window_size must be a pair"),
        ({"softmax_type": "off_by_one"}, ValueError, "softmax_type must be one of 'vanilla', 'off-by-one', 'learnable'"),
        ({"attention_type": "other"}, ValueError, "attention_type must be one of"),
        ({"tp_size": 2}, NotImplementedError, "tp_size=2"),
        ({"sequence_parallel": True}, NotImplementedError, "sequence_parallel"),
        ({"cp_group": object()}, NotImplementedError, "cp_group"),
        ({"cp_comm_type": "a2a"}, NotImplementedError, "cp_comm_type"),
    ],
)
def test_bad_constructor_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        DotProductAttention(**{"num_attention_heads": 4, "kv_channels": 8, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fp8_output": True}, "fp8_output"),
        ({"num_splits": 2}, "num_splits=2"),
    ],
)
def test_what_is_not_built_yet_is_named(arguments, message):
    with pytest.raises(NotImplementedError, match=message):
        DotProductAttention(4, 8)(*draw(), **arguments)


@pytest.mark.parametrize(
    ("mask", "mask_type", "error", "message"),
    [
        (None, "padding", ValueError, "attention_mask must be a bool tensor .*got None"),
        (None, "arbitrary", ValueError, "attention_mask must be a bool tensor"),
        (torch.zeros(2, 1, 1, 7), "padding", TypeError, "attention_mask must be bool .*torch.float32"),
        (
            torch.zeros(2, 1, 1, 6, dtype=torch.bool),
            "padding",
            ValueError,
            r"attention_mask must be \[batch, 1, 1, sequence\].*\[2, 1, 1, 6\]",
        ),
        (torch.zeros(2, 7, dtype=torch.bool), "padding_causal", ValueError, r"attention_mask must be \[batch, 1, 1, sequence\]"),
        (torch.zeros(3, 1, 7, 7, dtype=torch.bool), "arbitrary", ValueError, r"attention_mask must be .*got \[3, 1, 7, 7\]"),
    ],
)
def test_bad_masks(mask, mask_type, error, message):
    with pytest.raises(error, match=message):
        DotProductAttention(4, 8, attn_mask_type=mask_type)(*draw(), mask)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"window_size": (4, 4)}, ValueError, "window_size=.* forbids"),
        ({"core_attention_bias_type": "bias"}, ValueError, "core_attention_bias_type must be one of 'no_bias'"),
        ({"core_attention_bias_type": "post_scale_bias"}, ValueError, "core_attention_bias must be given with"),
        ({"core_attention_bias": torch.zeros(1, 4, 7, 7)}, ValueError, "core_attention_bias must be given with"),
        (
            {"core_attention_bias_type": "pre_scale_bias", "core_attention_bias": torch.zeros(3, 4, 7, 7)},
            ValueError,
            r"core_attention_bias must be \[1 or 2, 1 or 4 heads, 1 or 7 queries, 7 keys\], got \[3, 4, 7, 7\]",
        ),
        (
            {"core_attention_bias_type": "pre_scale_bias", "core_attention_bias": torch.zeros(1, 4, 7, 7, dtype=torch.int32)},
            TypeError,
            "core_attention_bias must be a floating-point tensor on cpu, got torch.int32",
        ),
        ({"alibi_slopes": torch.zeros(4)}, ValueError, "alibi_slopes need core_attention_bias_type='alibi'"),
        (
            {"core_attention_bias_type": "alibi", "alibi_slopes": torch.zeros(2)},
            ValueError,
            r"alibi_slopes must be \[4 heads\] or \[2, 4 heads\], got \[2\]",
        ),
        ({"max_seqlen_kv": 8}, ValueError, "max_seqlen_kv must be the sequence length 7"),
        ({"pad_between_seqs": True}, ValueError, "pad_between_seqs need qkv_format='thd'"),
        ({"cu_seqlens_q": torch.tensor([0, 1, 2], dtype=torch.int32)}, ValueError, "must be given both or neither"),
        (
            {"attn_mask_type": "padding", "cu_seqlens_q": [0, 1], "cu_seqlens_kv": [0, 1]},
            TypeError,
            "cu_seqlens_q must be an int32",
        ),
        ({"qkv_format": "thd"}, ValueError, r"query_layer must be \[t, 4 heads, 8 channels\], as qkv_format is 'thd'"),
    ],
)
def test_bad_calls(arguments, error, message):
    with pytest.raises(error, match=message):
        DotProductAttention(4, 8)(*draw(), **arguments)


def offsets(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cu_seqlens_q": None}, ValueError, "cu_seqlens_q and cu_seqlens_kv must be given with qkv_format='thd'"),
        ({"cu_seqlens_kv": None}, ValueError, "cu_seqlens_q and cu_seqlens_kv must be given with qkv_format='thd'"),
        ({"cu_seqlens_q": offsets(0, 5, 3)}, ValueError, r"cu_seqlens_q must start at 0 and never fall.*\[0, 5, 3\]"),
        ({"cu_seqlens_kv": offsets(1, 3, 7)}, ValueError, "cu_seqlens_kv must start at 0"),
        ({"cu_seqlens_q": offsets(0, 3, 7).long()}, TypeError, "cu_seqlens_q must be an int32 tensor .*torch.int64"),
        ({"cu_seqlens_kv": offsets(0, 3, 7).float()}, TypeError, "cu_seqlens_kv must be an int32 tensor .*torch.float32"),
        ({"cu_seqlens_q": offsets(0, 3, 8)}, ValueError, "cu_seqlens_q ends at 8, but there are 7 tokens"),
        ({"cu_seqlens_kv": offsets(0, 7)}, ValueError, r"cu_seqlens_kv must be \[2 \+ 1\]"),
        ({"cu_seqlens_q": offsets(0)}, ValueError, r"cu_seqlens_q must be \[batch \+ 1\]"),
        ({"cu_seqlens_q": offsets(0, 3, 7)[None]}, ValueError, r"cu_seqlens_q must be \[batch \+ 1\].*\[1, 3\]"),
        ({"max_seqlen_q": 3}, ValueError, "cu_seqlens_q has a sequence of 4 tokens, more than max_seqlen_q=3"),
        ({"max_seqlen_kv": 4.0}, ValueError, "max_seqlen_kv must be an int of at least 1, got 4.0"),
        ({"max_seqlen_kv": 0}, ValueError, "max_seqlen_kv must be an int of at least 1, got 0"),
        ({"pad_between_seqs": True}, ValueError, "pad_between_seqs=True needs cu_seqlens_q_padded and cu_seqlens_kv_padded"),
        ({"cu_seqlens_q_padded": offsets(0, 2, 7)}, ValueError, r"cu_seqlens_q_padded=\[0, 2, 7\] leaves some sequence less room"),
        ({"cu_seqlens_q_padded": offsets(0, 4, 8)}, ValueError, "cu_seqlens_q_padded ends at 8, but there are 7 tokens"),
        ({"cu_seqlens_kv_padded": offsets(0, 7)}, ValueError, r"cu_seqlens_kv_padded must be \[2 \+ 1\]"),
        ({"attn_mask_type": "arbitrary"}, ValueError, "attn_mask_type='arbitrary' cannot say anything of qkv_format='thd'"),
        ({"attention_mask": torch.zeros(2, 1, 1, 4, dtype=torch.bool)}, ValueError, "attention_mask .*qkv_format='thd'"),
    ],
)
def test_bad_packings(arguments, error, message):
    q, k, v = (torch.randn(7, 4, 8) for _ in range(3))
    call = {"cu_seqlens_q": offsets(0, 3, 7), "cu_seqlens_kv": offsets(0, 3, 7), **arguments}
    with pytest.raises(error, match=message):
        DotProductAttention(4, 8, qkv_format="thd", attn_mask_type="padding")(q, k, v, **call)


def test_offsets_changed_in_place_are_read_again(device):
    q, k, v = (torch.randn(7, 4, 8, device=device) for _ in range(3))
    bounds = offsets(0, 3, 7).to(device)
    module = DotProductAttention(4, 8, qkv_format="thd")
    module(q, k, v, cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    bounds[1] = 8
    with pytest.raises(ValueError, match="never fall"):
        module(q, k, v, cu_seqlens_q=bounds, cu_seqlens_kv=bounds)


def test_mismatched_inputs():
    module = DotProductAttention(4, 8, 2)
    q, k, v = draw(groups=2)
    with pytest.raises(ValueError, match=r"query_layer must be \[s, b, 4 heads, 8 channels\].*got \[7, 2, 4, 4\]"):
        module(q[..., :4], k, v)
    with pytest.raises(ValueError, match=r"key_layer must be .* 2 heads"):
        module(q, k[:, :, :1], v)
    with pytest.raises(ValueError, match="value_layer must be"):
        module(q, k, v[:, 0])
    with pytest.raises(ValueError, match="must agree in batch size"):
        module(q, k[:, :1], v[:, :1])
    with pytest.raises(ValueError, match="must agree in batch size"):
        module(q, k, v[:3])
    with pytest.raises(TypeError, match=r"one dtype and device.*torch.float16"):
        module(q, k.half(), v)
    with pytest.raises(ValueError, match="attn_mask_type must be one of"):
        module(q, k, v, attn_mask_type="causals")
