"""ops.gemm_epilogue: products with an activation, the gradient of one or a sum; against float64 and the separate ops."""

from __future__ import annotations

import pytest
import torch

from overdrive.ops.activation import ACTIVATIONS, activation, activation_backward
from overdrive.ops.gemm import gemm
from overdrive.ops.gemm_epilogue import gemm_activation, gemm_activation_backward, gemm_activation_quantized, gemm_add
from overdrive.ops.quantize import FP8_MAX, Mode, Quantization
from overdrive.ops.scaling import arena, tenant_id
from overdrive.recipe import DelayedScaling
from overdrive.scaling import support
from overdrive.scaling.arena import SlotRange
from tests.modules.layer_oracle import gelu
from tests.numerics import E4M3, E5M2, LAYOUTS, TOLERANCES, assert_close, assert_same_bits, bits, draw, relative_error
from tests.ops.quantized import quantized, tail
from tests.ops.test_norm import plain

HALVES = (torch.float16, torch.bfloat16)
SHAPES = (  # tokens, inputs, outputs; on a GPU tiles of 128 x 192 that are whole or not, in clusters that are whole or not
    (2, 64, 72),
    (7, 40, 24),
    (128, 64, 192),
    (129, 200, 200),
    (300, 136, 584),
    (513, 1024, 384),
)


pytestmark = pytest.mark.usefixtures("gemm_epilogues")


def slope(x64: torch.Tensor) -> torch.Tensor:
    leaf = x64.clone().requires_grad_()
    return torch.autograd.grad(gelu(leaf).sum(), leaf)[0]


def draw_forward(shape, dtype, device, bias=True, kind="contiguous"):
    tokens, inputs, outputs = shape
    x = draw(tokens, inputs, dtype=dtype, device=device, kind=kind)
    weight = draw(outputs, inputs, dtype=dtype, device=device, kind=kind, scale=inputs**-0.5)
    return x, weight, draw(outputs, dtype=dtype, device=device) if bias else None


def draw_backward(shape, dtype, device, kind="contiguous"):
    tokens, inputs, outputs = shape
    dy = draw(tokens, inputs, dtype=dtype, device=device, kind=kind)
    weight = draw(inputs, outputs, dtype=dtype, device=device, kind=kind, scale=inputs**-0.5)
    return dy, weight, draw(tokens, outputs, dtype=dtype, device=device)


def to64(*tensors):
    return [None if t is None else t.cpu().double() for t in tensors]


def check_forward(x, weight, bias):
    pre, out = gemm_activation(x, weight, bias, "gelu")
    x64, weight64, bias64 = to64(x, weight, bias)
    pre64 = x64 @ weight64.t() + (0 if bias64 is None else bias64)
    for name, actual, expected in (("pre", pre, pre64), ("out", out, gelu(pre64))):
        assert (actual.dtype, actual.is_contiguous()) == (x.dtype, True)
        assert_close(actual, expected, x.dtype, what=name)
    apart = gemm(x, weight, None, None, bias, x.dtype, Mode.PLAIN, Mode.PLAIN, False)
    assert relative_error(pre, apart) <= TOLERANCES[x.dtype, "plain"] / 2
    assert relative_error(out, activation(apart, "gelu", 7.0, 1.702, *plain(x.dtype))[0]) <= TOLERANCES[x.dtype, "plain"]


def check_backward(dy, weight, pre, in_place, bias_grad=True):
    dy64, weight64, pre64 = to64(dy, weight, pre)
    expected, again = (dy64 @ weight64) * slope(pre64), gelu(pre64)
    dout = gemm(dy, weight.t(), None, None, None, dy.dtype, Mode.PLAIN, Mode.PLAIN, False)
    apart = activation_backward(dout, pre, "gelu", 7.0, 1.702, False, *plain(dy.dtype))[0]
    kept = pre.clone()
    out = pre if in_place else torch.empty_like(pre)
    dpre, dbias = gemm_activation_backward(out, dy, weight, pre, "gelu", bias_grad)
    assert (dpre.dtype, dpre.is_contiguous()) == (dy.dtype, True)
    assert_close(dpre, expected, dy.dtype, what="dpre")
    assert dbias.shape == ((pre.shape[1],) if bias_grad else (0,))
    if bias_grad:
        assert_close(dbias, expected.sum(0), dy.dtype, what="dbias")
    assert_close(out, again, dy.dtype, what="out")
    assert relative_error(dpre, apart) <= TOLERANCES[dy.dtype, "plain"]
    if not in_place:
        assert_same_bits(pre, kept)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape, dtype, bias, device):
    check_forward(*draw_forward(shape, dtype, device, bias))


@pytest.mark.parametrize("bias_grad", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(shape, dtype, in_place, bias_grad, device):
    check_backward(*draw_backward(shape, dtype, device), in_place, bias_grad)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts(kind, device):
    check_forward(*draw_forward((136, 72, 200), torch.bfloat16, device, kind=kind))
    check_backward(*draw_backward((136, 72, 200), torch.bfloat16, device, kind=kind), True)


def test_memory_that_begins_anywhere(device):
    def moved(t):
        return torch.cat((t.new_zeros(3), t.flatten()))[3:].view(t.shape)

    check_forward(*map(moved, draw_forward((20, 64, 48), torch.bfloat16, device)))
    check_backward(*map(moved, draw_backward((20, 64, 48), torch.bfloat16, device)), False)


def test_parameters_and_what_requires_grad(device):
    x, weight, bias = draw_forward((20, 64, 48), torch.bfloat16, device)
    with torch.no_grad():
        check_forward(x.requires_grad_(), torch.nn.Parameter(weight), torch.nn.Parameter(bias))


def test_the_reference_activates_the_sum_before_it_is_rounded():
    x = torch.ones(8, 8, dtype=torch.bfloat16)
    weight = torch.zeros(8, 8, dtype=torch.bfloat16)
    weight[:, 0], weight[:, 1] = -2, 2.0**-8
    pre, out = gemm_activation(x, weight, None, "gelu")
    assert (pre == -2).all()
    assert_same_bits(out, gelu(torch.full((8, 8), -2 + 2.0**-8, dtype=torch.float64)).bfloat16())
    assert (out != gelu(pre.double()).bfloat16()).all()


def test_twice_the_same_bits(device):
    arguments = draw_forward((700, 512, 640), torch.bfloat16, device)
    for a, b in zip(gemm_activation(*arguments, "gelu"), gemm_activation(*arguments, "gelu"), strict=True):
        assert_same_bits(a, b)
    dy, weight, pre = draw_backward((700, 512, 640), torch.bfloat16, device)
    out = torch.empty_like(pre)
    for a, b in zip(*(gemm_activation_backward(out, dy, weight, pre, "gelu", True) for _ in range(2)), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("name", [name for name, kind in ACTIVATIONS.items() if not kind.gated])
def test_the_reference_knows_every_activation_that_does_not_gate(name):
    x, weight, bias = draw_forward((9, 16, 24), torch.float32, "cpu")
    pre, out = gemm_activation(x, weight, bias, name)
    assert_same_bits(out, activation(pre, name, 7.0, 1.702, *plain(torch.float32))[0])
    dy, weight, _ = draw_backward((9, 16, 24), torch.float32, "cpu")
    dpre, dbias = gemm_activation_backward(torch.empty_like(pre), dy, weight, pre, name, True)
    apart, *_, bias_apart = activation_backward(dy @ weight, pre, name, 7.0, 1.702, True, *plain(torch.float32))
    assert relative_error(dpre, apart) < 1e-6
    assert relative_error(dbias, bias_apart) < 1e-6


# --- FP8 ---------------------------------------------------------------------------------------------------------------

FP8_SHAPES = (  # tokens, inputs, outputs; tokens fill the tiles, as the layer has them; outputs and the contraction need not
    (128, 16, 16),
    (256, 128, 128),
    (128, 400, 208),
    (384, 144, 272),
    (1152, 1024, 640),
)


def draw_quantized(shape, device, dtype=torch.bfloat16, bias=True):
    """FP8 operands with their scales, the bias, and the float64 value of the product."""
    tokens, inputs, outputs = shape
    x = draw(tokens, inputs, dtype=torch.bfloat16, device=device)
    weight = draw(outputs, inputs, dtype=torch.bfloat16, device=device, scale=inputs**-0.5)
    a, b = quantized(x, Mode.CURRENT, E4M3), quantized(weight, Mode.CURRENT, E4M3)
    bias = draw(outputs, dtype=dtype, device=device) if bias else None
    a64, b64, bias64 = to64(a.data.float() * a.scale_inv, b.data.float() * b.scale_inv, bias)
    return (a.data, b.data, a.scale_inv, b.scale_inv, bias), a64 @ b64.t() + (0 if bias64 is None else bias64)


def check_quantized(arguments, pre64, dtype, q):
    pre, data, data_t, scale_inv, scale_inv_t = gemm_activation_quantized(*arguments, dtype, "gelu", *q)
    assert (pre.dtype, pre.is_contiguous()) == (dtype, True)
    assert_close(pre, pre64, dtype, what="pre")
    if q.mode == Mode.DELAYED:
        assert_same_bits(scale_inv, (1 / q.scales[q.slots[q.slot]]).reshape(1))
    else:
        assert scale_inv.item() == pytest.approx(gelu(pre64).abs().max().item() / FP8_MAX[q.dtype], rel=TOLERANCES[dtype, "plain"])
    assert scale_inv_t.numel() == 0
    for name, asked, values, expected in (("data", q.row, data, gelu(pre64)), ("data_t", q.col, data_t, gelu(pre64).t())):
        if not asked:
            assert values.numel() == 0
            continue
        assert (values.dtype, values.is_contiguous()) == (q.dtype, True)
        assert_close(values.float() * scale_inv, expected, q.dtype, what=name)
    if q.row and q.col:
        assert_same_bits(data_t, data.t().contiguous())
    return pre


@pytest.mark.parametrize("mode", [Mode.DELAYED, Mode.CURRENT])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", FP8_SHAPES)
def test_quantized(shape, dtype, bias, mode, device):
    arguments, pre64 = draw_quantized(shape, device, dtype, bias)
    pre = check_quantized(arguments, pre64, dtype, tail(mode, E4M3, device, scale=30.0))
    a, b, scale_a, scale_b, bias = arguments
    apart = gemm(a, b, scale_a, scale_b, bias, dtype, Mode.CURRENT, Mode.CURRENT, True)
    assert relative_error(pre, apart) <= TOLERANCES[dtype, "plain"] / 2


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [*FP8_SHAPES, (16, 32, 48), (400, 272, 304)])
def test_quantized_operands_and_a_sum(shape, dtype, bias, fast, device):
    (*operands, bias), product64 = draw_quantized(shape, device, dtype, bias)
    addend = draw(*product64.shape, dtype=dtype, device=device)
    kept = addend.clone()
    assert_close(gemm_add(*operands, bias, addend, dtype, fast), product64 + addend.cpu().double(), dtype)
    assert_same_bits(addend, kept)
    out = gemm_add(*operands, bias, None, dtype, fast)
    assert_close(out, product64, dtype)
    assert_same_bits(gemm_add(*operands, bias, None, dtype, fast), out)
    apart = gemm(*operands, bias, dtype, Mode.CURRENT, Mode.CURRENT, fast)
    assert relative_error(out, apart) <= TOLERANCES[dtype, "plain"] / 2


def test_split_accumulation_keeps_what_fast_accumulation_loses(device):
    """Of many small terms beside a large one; on a CPU both sum in f32."""
    a, b = torch.full((128, 4096), 0.125, device=device), torch.full((16, 4096), 0.125, device=device)
    a[:, 0] = b[:, 0] = 448
    one = torch.ones(1, device=device)
    exact = 448.0**2 + 4095 / 64
    split, fast = (gemm_add(a.to(E4M3), b.to(E4M3), one, one, None, None, torch.bfloat16, fast).double() for fast in (False, True))
    assert ((split - exact).abs() <= exact * 2**-8).all()
    assert (fast - exact).abs().max() >= (split - exact).abs().max()


@pytest.mark.parametrize("mode", [Mode.DELAYED, Mode.CURRENT])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize(("row", "col"), [(True, False), (False, True), (True, True)])
def test_quantized_layouts(row, col, dtype, mode, device):
    arguments, pre64 = draw_quantized((256, 256, 272), device)
    check_quantized(arguments, pre64, torch.bfloat16, tail(mode, dtype, device, scale=30.0, row=row, col=col))


def test_quantized_values_saturate_and_nan_stays(device):
    (a, b, scale_a, scale_b, bias), _ = draw_quantized((128, 64, 32), device)
    bias[3], bias[5] = 1e4, torch.nan
    q = tail(Mode.DELAYED, E4M3, device, scale=30.0)
    _, data, data_t, *_ = gemm_activation_quantized(a, b, scale_a, scale_b, bias, torch.bfloat16, "gelu", *q)
    for values in (data.float(), data_t.t().float()):
        assert (values[:, 3] == 448).all()
        assert values[:, 5].isnan().all()
        assert values[:, [0, 1, 2, 4]].isfinite().all()


def test_current_scaling_of_what_is_not_finite(device):
    """The scale is 1; what is finite stays."""
    (a, b, scale_a, scale_b, bias), _ = draw_quantized((128, 64, 32), device)
    bias[5] = torch.nan
    pre, data, _, scale_inv, _ = gemm_activation_quantized(
        a, b, scale_a, scale_b, bias, torch.bfloat16, "gelu", *tail(Mode.CURRENT, E4M3, device)
    )
    assert scale_inv.item() == 1
    assert data[:, 5].float().isnan().all()
    others = [column for column in range(32) if column != 5]
    assert_close(data[:, others].float(), gelu(pre[:, others].cpu().double()), E4M3)


def test_quantized_records_its_amax(device):
    arguments, pre64 = draw_quantized((256, 64, 208), device)
    where = arguments[0].device  # with its index
    own = SlotRange(1, where)
    slots, state, tenant = own.indices(where), arena(where), tenant_id(DelayedScaling(), None)
    own.reset(where)
    q = Quantization(Mode.DELAYED, E4M3, torch.ones(1024, device=device), slots, 1, -1, False, True, True)
    before = bits(state.amax).clone()
    gemm_activation_quantized(*arguments, torch.bfloat16, "gelu", *q)
    assert (bits(state.amax) == before).all(), "a tenant below 0 records nothing"
    gemm_activation_quantized(*arguments, torch.bfloat16, "gelu", *q._replace(tenant=tenant))
    at = own.start + 1
    assert state.amax[at].item() == pytest.approx(gelu(pre64).abs().max().item(), rel=5e-3)
    assert state.owner[at] == tenant
    kept = bits(state.amax).clone()
    a, *others = arguments
    others[-1] = torch.zeros_like(others[-1])
    gemm_activation_quantized(torch.zeros_like(a), *others, torch.bfloat16, "gelu", *q._replace(tenant=tenant))
    assert (bits(state.amax) == kept).all(), "a smaller amax later in the step changes nothing"
    others[-1][7] = torch.nan
    gemm_activation_quantized(a, *others, torch.bfloat16, "gelu", *q._replace(tenant=tenant))
    assert state.amax[at].isnan()
    own.reset(where)


@pytest.mark.parametrize("mode", [Mode.DELAYED, Mode.CURRENT])
def test_quantized_twice_the_same_bits(mode, device):
    arguments, _ = draw_quantized((640, 512, 640), device)
    q = tail(mode, E4M3, device, scale=30.0)
    first, second = (gemm_activation_quantized(*arguments, torch.bfloat16, "gelu", *q) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)


# --- whether they run here ---------------------------------------------------------------------------------------------


@pytest.fixture
def asked_anew(monkeypatch):
    """The machine is asked again, as if it were a Hopper GPU, whatever the answer was."""
    monkeypatch.setattr(support, "_capability", lambda: (9, 0))
    support._epilogue_failure.cache_clear()
    yield monkeypatch
    support._epilogue_failure.cache_clear()


def test_where_there_is_no_hopper_gpu_the_reason_says_so(asked_anew):
    for capability, said in ((None, "torch sees none"), ((8, 0), "this GPU has 8.0")):
        asked_anew.setattr(support, "_capability", lambda capability=capability: capability)
        support._epilogue_failure.cache_clear()
        for able, reason in (support.is_gemm_epilogue_available(), support.is_norm_cluster_available()):
            assert not able
            assert said in reason


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("No module named 'quack'", name="quack"), "pip install 'overdrive[fa4]'"),
        (ModuleNotFoundError("No module named 'cutlass'", name="cutlass"), "does not load: No module named 'cutlass'"),
        (TypeError("no fail-closed semantic key"), "does not run: TypeError: no fail-closed semantic key"),
    ],
)
def test_whatever_goes_wrong_is_a_reason_and_asked_once(error, said, asked_anew):
    calls = []

    def fail(device):
        calls.append(error)
        raise error

    asked_anew.setattr(support, "_epilogue_error", fail)
    for _ in range(2):
        able, reason = support.is_gemm_epilogue_available()
        assert not able
        assert said in reason
    assert len(calls) == 1
    asked_anew.setattr(support, "_norm_cluster_error", lambda: fail("cuda"))
    able, reason = support.is_norm_cluster_available()
    assert not able
    assert said in reason


WRONG = (
    "product",
    "activation",
    "activation in backward",
    "gradient",
    "bias gradient",
    "FP8 product",
    "FP8 activation",
    "transposed FP8 activation",
)


@pytest.mark.parametrize("wrong", [None, *WRONG])
def test_wrong_numbers_are_a_reason(wrong, asked_anew, device):
    def off(name, values):
        return values * 1.1 if wrong == name else values

    def forward(*arguments):
        pre, out = gemm_activation(*arguments)
        return off("product", pre), off("activation", out)

    def backward(out, *arguments):
        dpre, dbias = gemm_activation_backward(out, *arguments)
        out.copy_(off("activation in backward", out))
        return off("gradient", dpre), off("bias gradient", dbias)

    def quantized(*arguments):
        pre, data, data_t, *scales = gemm_activation_quantized(*arguments)
        data, data_t = off("FP8 activation", data.float()), off("transposed FP8 activation", data_t.float())
        return off("FP8 product", pre), data, data_t, *scales

    asked_anew.setattr(support, "gemm_activation", forward)
    asked_anew.setattr(support, "gemm_activation_backward", backward)
    asked_anew.setattr(support, "gemm_activation_quantized", quantized)
    reason = support._epilogue_error(device)
    assert reason.endswith(f"of the {wrong}") if wrong else reason == ""
