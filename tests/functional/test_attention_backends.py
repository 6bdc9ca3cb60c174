"""The attention ops of flash-attn-4, gradients of Q, K and V that come back as one matrix, and when that backend is chosen."""

from __future__ import annotations

import itertools

import pytest
import torch

from overdrive.functional import attention_backends as backends
from overdrive.functional import qkv
from overdrive.functional.attention import FlashAttention4, split_qkv
from overdrive.functional.attention_backends import attention_backends
from overdrive.functional.qkv import QKVLayout, outputs_of, whole_gradient
from overdrive.modules.attention import DotProductAttention
from overdrive.modules.layernorm_linear import LayerNormLinear
from overdrive.ops.attention import attention_backward, attention_forward, places_in_one_matrix, views_at
from overdrive.scaling.autocast import autocast
from tests.modules import attention_oracle as oracle
from tests.numerics import RECIPES, assert_close, assert_same_bits, observe

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own

USABLE, WHY_NOT = attention_backends()["flash-attn-4"]
LAYOUTS = [QKVLayout(4, 4, 64, True), QKVLayout(4, 4, 64, False), QKVLayout(4, 2, 64, False), QKVLayout(4, 1, 64, True)]


@pytest.fixture(autouse=True)
def _installed(device):
    if device == "cuda" and not USABLE:
        pytest.skip(WHY_NOT)


def heads_first(x: torch.Tensor, layout: str) -> torch.Tensor:
    return x.permute((0, 2, 1, 3) if layout == "bshd" else (1, 2, 0, 3))


def draw(layout, batch, queries, keys, heads, groups, dim, value_dim, dtype, device) -> list[torch.Tensor]:
    """Q, K and V as leaves [B, H, S, D], each a slice of something wider."""
    tensors = []
    for length, count, width in ((queries, heads, dim), (keys, groups, dim), (keys, groups, value_dim)):
        lead = (batch, length) if layout == "bshd" else (length, batch)
        wide = torch.randn(*lead, count * width + 16).to(device, dtype)
        tensors.append(heads_first(wide[..., :-16].unflatten(-1, (count, width)), layout).detach().requires_grad_())
    return tensors


def check(layout, causal, dtype, device, queries=70, keys=None, heads=4, groups=4, dim=64, value_dim=None, batch=2) -> None:
    """The ops' output, statistics and gradients against float64."""
    keys, value_dim = keys or queries, value_dim or dim
    tensors = draw(layout, batch, queries, keys, heads, groups, dim, value_dim, dtype, device)
    hidden = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1) if causal else None
    exact = [x.detach().cpu().double().requires_grad_() for x in tensors]
    expected = oracle.attend(*exact, hidden, scale=0.11)
    scores = exact[0] @ exact[1].repeat_interleave(heads // groups, 1).mT * 0.11
    lse = scores.masked_fill(hidden if hidden is not None else torch.tensor(False), -torch.inf).logsumexp(-1)

    out = FlashAttention4.apply(*tensors, causal, 0.11)
    assert out.transpose(1, 2).is_contiguous() if layout == "bshd" else out.permute(2, 0, 1, 3).is_contiguous()
    dout = torch.randn(out.transpose(1, 2).shape, dtype=dtype).transpose(1, 2)
    gradients = torch.autograd.grad(out, tensors, dout.to(device))
    assert_close(out, expected.detach(), dtype, what="out", depth=2)
    assert_close(attention_forward(*tensors, causal, 0.11)[1], lse.detach(), dtype, what="lse")
    for name, actual, want in zip("qkv", gradients, torch.autograd.grad(expected, exact, dout.double())):
        assert_close(actual, want, dtype, what=f"d{name}", depth=2)


@pytest.mark.parametrize("layout", ["sbhd", "bshd"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_values_and_gradients(dim, dtype, groups, causal, layout, device):
    check(layout, causal, dtype, device, groups=groups, dim=dim)


@pytest.mark.parametrize("sizes", [(1, 1), (1, 300), (127, 129), (128, 128), (257, 257), (129, 1000), (300, 64)])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths(causal, sizes, device):
    queries, keys = sizes
    if causal and queries > keys:
        queries = keys
    for layout, groups in (("sbhd", 4), ("bshd", 2)):
        check(layout, causal, torch.bfloat16, device, queries=queries, keys=keys, groups=groups)


@pytest.mark.parametrize("dim", [32, 96, 160, 192, 224])
def test_head_dims(dim, device):
    for causal, groups in ((False, 4), (True, 2)):
        check("sbhd", causal, torch.bfloat16, device, queries=150, dim=dim, groups=groups)


# --- gradients as one matrix --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [(5, 3), (5, 1), (1, 3), (1, 1)])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradients_of_one_product_are_one_matrix(layout, batch_first, tokens, device):
    features = (layout.heads + 2 * layout.groups) * layout.head_dim
    product = torch.randn(*tokens, features).to(device, torch.bfloat16).requires_grad_()
    parts = outputs_of(product, layout)
    views = [heads_first(x, "bshd" if batch_first else "sbhd") for x in parts]
    assert places_in_one_matrix(*views)
    out = FlashAttention4.apply(*views, True, 0.1)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, parts, dout)
    whole = whole_gradient(*gradients, layout)
    assert whole is not None
    assert whole.shape == (tokens[0] * tokens[1], features)
    separate = [x.detach().clone() for x in views]
    assert not places_in_one_matrix(*separate)
    expected = attention_backward(dout, *separate, *attention_forward(*separate, True, 0.1), True, 0.1, [])
    for part, want in zip(outputs_of(whole.view(*tokens, features), layout), expected):
        assert_same_bits(heads_first(part, "bshd" if batch_first else "sbhd"), want)


def matrix_views(layout: QKVLayout, outer=4, inner=3, dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    features = (layout.heads + 2 * layout.groups) * layout.head_dim
    return outputs_of(torch.randn(outer, inner, features, dtype=dtype), layout)


def elsewhere(x: torch.Tensor) -> torch.Tensor:
    """x, in the same place of another storage."""
    return x._base.clone().as_strided(x.shape, x.stride(), x.storage_offset())


WRONG = {
    "a copy of K": lambda q, k, v: (q, k.clone(), v),
    "K and V exchanged": lambda q, k, v: (q, v, k),
    "V twice": lambda q, k, v: (q, v, v),
    "K twice": lambda q, k, v: (q, k, k),
    "K of another matrix": lambda q, k, v: (q, elsewhere(k), v),
    "V of another matrix": lambda q, k, v: (q, k, elsewhere(v)),
    "one channel": lambda q, k, v: (q[..., :1].expand_as(q), k, v),
    "every other token": lambda q, k, v: (q[::2], k[::2], v[::2]),
    "tokens of another order": lambda q, k, v: (q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)),
    "K a token later": lambda q, k, v: (q[:-1], k[1:], v[:-1]),
    "fewer channels": lambda q, k, v: (q[..., :-1], k[..., :-1], v[..., :-1]),
    "fewer heads": lambda q, k, v: (q[..., :-1, :], k, v),
    "fewer tokens in K": lambda q, k, v: (q, k[:-1], v),
    "expanded": lambda q, k, v: (q[:1].expand_as(q), k, v),
    "another dtype": lambda q, k, v: (q, k, v.view(torch.int32)),
}


@pytest.mark.parametrize("layout", [QKVLayout(4, 4, 8, True), QKVLayout(4, 2, 8, False)], ids=str)
def test_the_views_of_one_matrix_are_recognised(layout):
    parts = matrix_views(layout)
    whole = whole_gradient(*parts, layout)
    assert whole is not None
    for part, again in zip(parts, outputs_of(whole.view(4, 3, -1), layout)):
        assert torch.equal(part, again)
    offset = whole_gradient(*(x[1:] for x in parts), layout)  # a matrix within a storage
    assert offset is not None
    assert torch.equal(offset, whole[3:])


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("layout", [QKVLayout(4, 4, 8, True), QKVLayout(4, 4, 8, False)], ids=str)
def test_what_is_no_matrix_of_that_layout_is_gathered(layout, what):
    assert whole_gradient(*WRONG[what](*matrix_views(layout)), layout) is None
    other = QKVLayout(4, 4, 8, not layout.interleaved)
    assert whole_gradient(*matrix_views(other), layout) is None


def test_heads_of_interleaved_groups_have_no_stride():
    """Q is a copy there."""
    layout = QKVLayout(4, 2, 8, True)
    parts = matrix_views(layout)
    assert whole_gradient(*parts, layout) is None
    assert not places_in_one_matrix(*(heads_first(x, "sbhd") for x in parts))


@pytest.mark.parametrize("what", sorted({*WRONG} - {"K and V exchanged", "tokens of another order"}))
@pytest.mark.parametrize("layout", [QKVLayout(4, 4, 8, True), QKVLayout(4, 2, 8, False)], ids=str)
def test_what_fills_no_matrix(layout, what):
    parts = WRONG[what](*matrix_views(layout))
    for order in ("sbhd", "bshd"):
        assert not places_in_one_matrix(*(heads_first(x, order) for x in parts))


def test_what_fills_a_matrix_is_covered_once():
    for layout, order in itertools.product(LAYOUTS, ("sbhd", "bshd")):
        views = [heads_first(x, order) for x in matrix_views(layout)]
        assert places_in_one_matrix(*views)
        flat = torch.zeros(sum(x.numel() for x in views))
        for view in views_at(places_in_one_matrix(*views), flat, *(x.shape for x in views)):
            view += 1
        assert torch.equal(flat, torch.ones_like(flat))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[2]], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_layer_backward_without_a_gather(bias, layout, recipe, device, monkeypatch):
    """The same gradients as with one, bit for bit; with two uses of Q, whose gradients are added up, the gather is back."""
    features = (layout.heads + 2 * layout.groups) * layout.head_dim
    module = LayerNormLinear(32, features, bias=bias, params_dtype=torch.bfloat16, device=device)
    x = torch.randn(16, 2, 32).to(device, torch.bfloat16).requires_grad_()
    dout = torch.randn(2, layout.heads, 16, layout.head_dim).to(device, torch.bfloat16)
    gathers = []
    observe(monkeypatch, qkv, "qkv_gradient", lambda *_: gathers.append(1))
    results = []
    for how in ("whole", "gathered", "used twice"):
        with autocast(enabled=recipe != "plain", recipe=RECIPES[recipe]):
            parts = module.forward_qkv(x, layout)
        views = [heads_first(part, "sbhd") for part in parts]
        out = FlashAttention4.apply(*(view * 1 for view in views) if how == "gathered" else views, True, 0.1)
        if how == "used twice":
            out = out + views[0]
        module.zero_grad()
        gradient = torch.autograd.grad(out, (x, *module.parameters()), dout)
        results.append(gradient)
        assert len(gathers) == ("whole", "gathered", "used twice").index(how)
    for whole, gathered, twice in zip(*results):
        if recipe == "plain" and whole.dim() == 1:  # column sums in another order
            assert_close(whole, gathered.cpu().double(), torch.bfloat16)
        elif recipe != "delayed":  # whose scales move from step to step
            assert_same_bits(whole, gathered)
            assert not torch.equal(whole, twice)
        assert whole.isfinite().all()


def test_replaced_gradients_are_gathered(device):
    layout = LAYOUTS[0]
    module = LayerNormLinear(32, 768, params_dtype=torch.bfloat16, device=device)
    x = torch.randn(16, 2, 32).to(device, torch.bfloat16).requires_grad_()
    results = []
    for hooked in (False, True):
        parts = module.forward_qkv(x, layout)
        if hooked:
            parts[1].register_hook(lambda gradient: gradient * 2)
        out = FlashAttention4.apply(*(heads_first(part, "sbhd") for part in parts), False, 0.1)
        results.append(torch.autograd.grad(out, module.weight, torch.ones_like(out))[0].unflatten(0, (4, 3, 64)))
    plain, doubled = results
    assert_same_bits(plain[:, 0], doubled[:, 0])
    assert_same_bits(plain[:, 1] * 2, doubled[:, 1])


def test_saved_tensors_moved_elsewhere(device):
    """Offloading Q, K and V separately only costs the gather."""
    layout = LAYOUTS[0]
    product = torch.randn(16, 2, 768).to(device, torch.bfloat16).requires_grad_()
    results = []
    for hooks in (None, torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x)):
        parts = split_qkv(product, 4, 4, 64, True)
        views = [heads_first(x, "sbhd") for x in parts]
        if hooks is None:
            out = FlashAttention4.apply(*views, True, 0.1)
        else:
            with hooks:
                out = FlashAttention4.apply(*views, True, 0.1)
        gradients = torch.autograd.grad(out, parts, torch.ones_like(out))
        assert (whole_gradient(*gradients, layout) is None) == (hooks is not None)
        results.append(gradients)
    for a, b in zip(*results):
        assert_same_bits(a, b)


# --- surroundings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_compiles_to_the_same_bits(causal, device):
    product = torch.randn(40, 2, 768).to(device, torch.bfloat16).requires_grad_()

    def call(product):
        views = (x.permute(1, 2, 0, 3) for x in split_qkv(product, 4, 4, 64, True))
        return FlashAttention4.apply(*views, causal, 0.1).permute(2, 0, 1, 3).flatten(2)

    results = []
    for run in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        out = run(product)
        results.append((out, *torch.autograd.grad(out, product, torch.ones_like(out))))
    for a, b in zip(*results):
        assert_same_bits(a, b)


@pytest.mark.gpu
def test_compiled_module_chooses_and_traces_it(device, monkeypatch):
    monkeypatch.setenv("OVERDRIVE_ATTENTION", "flash-attn-4")
    module = DotProductAttention(4, 64, 2)
    compiled = torch.compile(module, fullgraph=True)
    for length in (64, 80, 200):  # the second makes the length symbolic
        views = draw("sbhd", 2, length, length, 4, 2, 64, 64, torch.bfloat16, device)
        inputs = [x.permute(2, 0, 1, 3).detach().requires_grad_() for x in views]
        results = []
        for call in (compiled, module):
            out = call(*inputs)
            results.append((out, *torch.autograd.grad(out, inputs, torch.ones_like(out))))
        for a, b in zip(*results):
            assert_close(a, b.detach().cpu().double(), torch.bfloat16)


def test_second_backward_is_refused(device):
    views = draw("sbhd", 2, 8, 8, 4, 4, 64, 64, torch.bfloat16, device)
    out = FlashAttention4.apply(*views, True, 0.1)
    (gradient,) = torch.autograd.grad(out, views[0], torch.ones_like(out).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.gpu
def test_deterministic_where_torch_is_told_to_be(device):
    for dim, groups, causal in ((64, 4, False), (128, 2, True), (128, 4, True)):
        views = draw("sbhd", 2, 1024, 1024, 4, groups, dim, dim, torch.bfloat16, device)
        out = FlashAttention4.apply(*views, causal, 0.1)
        dout = torch.randn_like(out)
        torch.use_deterministic_algorithms(True)
        try:
            first, *others = (torch.autograd.grad(out, views, dout, retain_graph=True) for _ in range(4))
        finally:
            torch.use_deterministic_algorithms(False)
        for other in others:
            for a, b in zip(first, other):
                assert_same_bits(a, b)


@pytest.mark.gpu
def test_as_a_cuda_graph(device):
    views = [x.detach() for x in draw("sbhd", 2, 300, 300, 4, 4, 64, 64, torch.bfloat16, device)]
    out, lse = attention_forward(*views, True, 0.1)
    dout = torch.randn_like(out)
    expected = attention_backward(dout, *views, out, lse, True, 0.1, [])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention_backward(dout, *views, *attention_forward(*views, True, 0.1), True, 0.1, [])
    graph.replay()
    for a, b in zip(captured, expected):
        assert_close(a, b.cpu().double(), torch.bfloat16)


@pytest.fixture
def hopper(monkeypatch):
    """A choice as on a Hopper GPU with flash-attn-4 installed."""
    monkeypatch.setattr(backends, "_machine_refusal", lambda backend, device: "" if device in backend.devices else "elsewhere")
    monkeypatch.setattr(backends, "_load_failure", lambda package: "")
    monkeypatch.setattr(backends, "_capability", lambda: (9, 0))
    case = backends.Case("cuda", torch.bfloat16, "causal", "none", 128, 128, False, "large")
    return lambda **change: backends._chosen.__wrapped__("", case._replace(**change)).names[0]


def test_flash_attn_4_is_chosen_where_it_is_faster(hopper):
    assert hopper() == hopper(mask="none") == hopper(grouped=True) == hopper(head_dim=64, value_dim=64) == "flash-attn-4"
    for change in ({"size": "small"}, {"dropout": "sixteenths"}, {"mask": "tensor"}, {"head_dim": 72, "value_dim": 72}):
        assert hopper(**change) == "cudnn", change
    assert hopper(dtype=torch.float32) == "efficient"


def test_a_backend_that_does_not_load_is_passed_over(hopper, monkeypatch):
    monkeypatch.setattr(backends, "_load_failure", lambda module: "does not load: OSError: libcute.so")
    assert hopper() == "cudnn"
    assert hopper(mask="tensor", packed="bottom-right") == "cudnn"


def test_what_does_not_load_says_so():
    assert backends._load_failure("overdrive.kernels.none").startswith("does not load: ModuleNotFoundError: No module named")


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [8, 72, 128, 256])
def test_flash_varlen_is_chosen_for_packed_sequences(hopper, dim, dtype, grouped, size):
    case = {"mask": "tensor", "dtype": dtype, "head_dim": dim, "value_dim": dim, "grouped": grouped, "size": size}
    assert hopper(**case, packed="bottom-right") == "flash-varlen"
    assert hopper(**case, packed="top-left") == hopper(**case) == "cudnn"


@pytest.mark.parametrize(
    ("change", "reason", "best"),
    [
        ({"packed": ""}, "takes packed sequences only", "cudnn"),
        ({"packed": "top-left"}, "has the diagonal of a mask end with the last query and key of each sequence only", "cudnn"),
        ({"dropout": "sixteenths"}, "has no dropout", "cudnn"),
        ({"dtype": torch.float32}, "takes torch.float16, torch.bfloat16, not torch.float32", "efficient"),
        ({"head_dim": 12, "value_dim": 12}, "takes head dims that are multiples of 8, got 12 and 12", "cudnn"),
        ({"value_dim": 64}, "needs head dims of Q/K and V to be equal, got 128 and 64", "cudnn"),
        ({"head_dim": 264, "value_dim": 264}, "takes head dims up to 256, not 264", "efficient"),
        ({"offset": True}, "has the vanilla softmax only", "reference"),
        ({"max_logit": True}, "does not give the largest logit", "reference"),
    ],
)
def test_flash_varlen_is_refused(hopper, change, reason, best):
    change = {"mask": "tensor", "packed": "bottom-right", **change}
    case = backends.Case("cuda", torch.bfloat16, "causal", "none", 128, 128, False, "large")._replace(**change)
    assert backends._refusal(backends.BY_NAME["flash-varlen"], case) == reason
    assert hopper(**change) == best


@pytest.mark.parametrize(
    ("change", "best"),
    [
        ({"bias": "constant"}, "efficient"),
        ({"bias": "gradient"}, "efficient"),
        ({"bias": "gradient", "dtype": torch.float32, "grouped": True, "dropout": "any"}, "efficient"),
        ({"bias": "gradient alone"}, "math"),
        ({"bias": "constant", "wide_bias": True}, "math"),
        ({"bias": "gradient", "dtype": torch.float64}, "math"),
        ({"bias": "gradient", "offset": True}, "reference"),
    ],
)
def test_biases_on_hopper(hopper, change, best):
    for mask in ("none", "causal", "tensor"):
        assert hopper(mask=mask, **change) == best


def test_why_efficient_takes_no_bias(hopper):
    case = backends.Case("cuda", torch.bfloat16, "causal", "none", 128, 128, False, "large")
    efficient = backends.BY_NAME["efficient"]
    assert backends._refusal(efficient, case._replace(bias="gradient alone")) == "gives no gradient for the bias alone"
    wide = case._replace(bias="constant", wide_bias=True)
    assert backends._refusal(efficient, wide) == "takes a bias only in the dtype of Q, torch.bfloat16"


def test_flex_takes_packed_sequences_only_on_request(hopper):
    case = backends.Case("cuda", torch.bfloat16, "tensor", "none", 128, 128, False, "large")
    for packed in ("", "bottom-right", "top-left"):
        assert backends._chosen.__wrapped__("flex", case._replace(packed=packed)).names == ("flex",)


@pytest.mark.gpu
def test_small_attention_is_explained(device, monkeypatch):
    q, k, v = (torch.randn(64, 2, 4, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    module = DotProductAttention(4, 64)
    assert "more host time than it saves" in module.explain(q, k, v).passed_over["flash-attn-4"]
    monkeypatch.setenv("OVERDRIVE_ATTENTION", "flash-attn-4")
    assert module.explain(q, k, v).backend == "flash-attn-4"
    monkeypatch.delenv("OVERDRIVE_ATTENTION")
    assert module.explain(*(x.repeat(256, 1, 1, 1) for x in (q, k, v))).backend == "flash-attn-4"
