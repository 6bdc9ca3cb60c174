"""LayerNormMLP with its activation in the epilogues of its products, and when it is there."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

import overdrive.pytorch as te
from overdrive.functional import activation as stage
from overdrive.functional import gemm as products
from overdrive.functional import layernorm_mlp as node
from overdrive.ops.quantize import Mode
from overdrive.recipe import DelayedScaling, MMParams
from overdrive.scaling.tensor import QuantizedTensor
from tests.modules.layer_oracle import IN, Step, assert_same_step, build, check, features, formula_of, fp8, step
from tests.numerics import RECIPES, TOLERANCES, assert_close, assert_same_bits, observe, relative_error

HALVES = (torch.float16, torch.bfloat16)
BF16 = torch.bfloat16


def may_fuse(x, weight1, weight2, options) -> bool:
    """What the choice is on any device, for products of any size and, on a CPU, where the references take odd sizes."""
    if isinstance(x, QuantizedTensor):
        return x.mode.per_tensor and options.activation.name == "gelu" and x.shape[0] % 128 == 0
    return options.fc2.input_grad and options.fc1.rules is None and options.activation.name == "gelu"


BOTH, QUANTIZED = ["gemm_activation", "gemm_activation_backward"], ["gemm_activation_quantized"]


def counted(patch, where, *names) -> list[str]:
    """From now on a list with one name for each call that the module `where` makes of one of these of its ops."""
    uses = []
    for name in names:
        observe(patch, where, name, lambda *_, name=name: uses.append(name))
    return uses


@pytest.fixture
def used(monkeypatch, gemm_epilogues):
    """Fuses wherever a product's size alone speaks against it; a list with one name for each use of an op."""
    uses = counted(monkeypatch, stage, *BOTH, *QUANTIZED)
    monkeypatch.setattr(products, "FUSED_MULTIPLICATIONS", 0)
    monkeypatch.setattr(node, "_fuses_activation", may_fuse)
    return uses


def apart(monkeypatch, *arguments, **options) -> Step:
    """The step of the layer that does not fuse."""
    with monkeypatch.context() as patch:
        patch.setattr(node, "_fuses_activation", lambda *_: False)
        return step(*arguments, **options)


def assert_alike(actual: Step, expected: Step, dtype: torch.dtype, recipe: str = "plain") -> None:
    for a, e in zip(actual.outputs, expected.outputs, strict=True):
        assert relative_error(a, e) <= TOLERANCES[dtype, recipe]
    assert actual.grads.keys() == expected.grads.keys()
    for name, grad in expected.grads.items():
        found = actual.grads[name]
        assert (found is None) == (grad is None), name
        if grad is not None and found is not None:
            assert (found.dtype, found.shape) == (grad.dtype, grad.shape)
            assert relative_error(found, grad) <= 2 * TOLERANCES[dtype, recipe], name


VARIANTS = [
    {},
    {"bias": False},
    {"return_bias": True},
    {"normalization": "RMSNorm", "zero_centered_gamma": True},
    {"return_layernorm_output": True},
    {"checkpoint": True},
]


@pytest.mark.parametrize("lead", [(2, 16), (3,), (7, 5)])
@pytest.mark.parametrize("arguments", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", HALVES)
def test_is_the_layer_that_does_not_fuse(dtype, arguments, lead, device, used, monkeypatch):
    module = build("LayerNormMLP", device, dtype, **arguments)
    x = features(*lead, dtype=dtype, device=device)
    fused = step(module, x)
    assert used == (["gemm_activation", *BOTH] if "checkpoint" in arguments else BOTH)
    assert_alike(fused, apart(monkeypatch, module, x), dtype)
    check(module, x)


def test_the_residual_before_it(device, used):
    module = build("LayerNormMLP", device, BF16)
    x = features(2, 16, dtype=BF16, device=device)
    check(module, x, formula=lambda x, p: (*formula_of(module)(x, p), x), call=module.forward_with_residual)
    assert used == BOTH


FROZEN = [
    {"input"},
    {"fc1_weight"},
    {"fc1_bias"},
    {"fc2_weight"},
    {"fc2_bias"},
    {"fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"},
    {"input", "layer_norm_weight", "layer_norm_bias"},
]


@pytest.mark.parametrize(
    ("recipe", "tokens", "uses"), [("plain", 16, BOTH), ("delayed", 64, QUANTIZED * 2)], ids=["plain", "delayed"]
)
@pytest.mark.parametrize("frozen", FROZEN, ids=lambda names: "+".join(sorted(names)))
def test_any_part_may_be_frozen(frozen, recipe, tokens, uses, device, used):
    module = build("LayerNormMLP", device, BF16)
    x = features(2, tokens, dtype=BF16, device=device).requires_grad_("input" not in frozen)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in frozen)
    check(module, x, recipe)
    assert used == uses


def test_not_where_backward_ends_at_fc2(device, used):
    module = build("LayerNormMLP", device, BF16)
    x = features(2, 16, dtype=BF16, device=device).requires_grad_(False)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith("fc2"))
    check(module, x)
    assert not used


def test_backward_runs_twice_with_retain_graph(device, used):
    module = build("LayerNormMLP", device, BF16)
    x = features(2, 16, dtype=BF16, device=device)
    y = module(x)
    y.sum().backward(retain_graph=True)
    once, x.grad = x.grad, None
    weights = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    y.sum().backward()
    assert_same_bits(x.grad, once)
    for parameter, grad in zip(module.parameters(), weights):
        assert_same_bits(parameter.grad, grad)
    assert used == [*BOTH, "gemm_activation_backward"]


def test_no_second_derivative(device, used):
    module, x = build("LayerNormMLP", device, BF16), features(2, 16, dtype=BF16, device=device)
    (grad,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    assert used == BOTH


@pytest.mark.parametrize("delay", [False, True])
@pytest.mark.parametrize("fuse", [False, True])
def test_weight_gradients_that_go_elsewhere(fuse, delay, device, used):
    module = build("LayerNormMLP", device, BF16, fuse_wgrad_accumulation=fuse, delay_wgrad_compute=delay)
    x = features(2, 16, dtype=BF16, device=device)
    plain = build("LayerNormMLP", device, BF16)
    plain.load_state_dict(module.state_dict())
    expected = step(plain, x)
    weights = {name: getattr(module, name) for name in ("fc1_weight", "fc2_weight")}
    for weight in weights.values():
        weight.main_grad = torch.zeros(weight.shape, device=device)
    step(module, x)
    if delay:
        module.backward_dw()
    assert used == BOTH * 2
    for name, weight in weights.items():
        found = weight.main_grad.to(BF16) if fuse else weight.grad
        assert_same_bits(found, expected.grads[name], name)


def test_checkpoint_around_it(device, used):
    module, x = build("LayerNormMLP", device, BF16), features(2, 16, dtype=BF16, device=device)
    expected = step(module, x)
    for reentrant in (False, True):
        again = step(module, x, call=lambda x, reentrant=reentrant: checkpoint(module, x, use_reentrant=reentrant))
        assert_same_step(again, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_not_without_a_backward(mode, device, used):
    module, x = build("LayerNormMLP", device, BF16), features(2, 16, dtype=BF16, device=device)
    with mode():
        module(x)
    assert not used


def test_forward_keeps_one_matrix_of_the_inner_size_and_backward_frees_it(device, used):
    module = te.LayerNormMLP(32, 64, params_dtype=BF16, device=device)
    x = torch.randn(24, 32, dtype=BF16, device=device, requires_grad=True)
    saved = []

    def remember(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        y = module(x)
    inner = [tensor for tensor in saved if tensor.shape == (24, 64)]
    assert len(inner) == 1
    y.sum().backward()
    assert inner[0].untyped_storage().nbytes() == 0
    assert all(parameter.untyped_storage().nbytes() for parameter in module.parameters())
    assert used == BOTH


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor")  # torch.compile's own
def test_compiled_code_has_the_ops_in_its_one_graph(device, used, monkeypatch):
    monkeypatch.undo()  # of the counters
    monkeypatch.setattr(node, "_fuses_activation", may_fuse)
    torch._dynamo.reset()
    module, x = build("LayerNormMLP", device, BF16), features(2, 16, dtype=BF16, device=device)
    expected = step(module, x)
    targets = []

    def compiler(graph, inputs):
        targets.extend(f"{n.target} {n.args}" for n in graph.graph.nodes if n.op == "call_function")
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=compiler)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    assert_same_step(step(module, x, call=compiled), expected)
    for name in BOTH:
        assert any(f"overdrive.{name}." in target.replace("'", ".") for target in targets), name


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor")
def test_compiled_code_does_not_fuse(device, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(products, "FUSED_MULTIPLICATIONS", 0)
    monkeypatch.setattr(products, "is_gemm_epilogue_available", lambda: pytest.fail("nobody compiled may ask"))
    module, x = build("LayerNormMLP", device, BF16), features(2, 16, dtype=BF16, device=device)
    expected = apart(monkeypatch, module, x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same_step(step(module, x, call=compiled), expected)


# --- FP8 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["delayed", "current"])
@pytest.mark.parametrize("lead", [(2, 64), (3, 128)])
@pytest.mark.parametrize("arguments", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", HALVES)
def test_in_fp8_is_the_layer_that_does_not_fuse(dtype, arguments, lead, recipe, device, used, monkeypatch):
    module = build("LayerNormMLP", device, dtype, **arguments)
    x = features(*lead, dtype=dtype, device=device)
    twin = copy.deepcopy(module)
    fused = check(module, x, recipe)
    steps = 2 if recipe == "delayed" else 1
    assert used == QUANTIZED * (2 * steps if "checkpoint" in arguments else steps)
    for _ in range(steps):
        expected = apart(monkeypatch, twin, x, recipe)
    assert_alike(fused, expected, dtype, recipe)


def test_the_scales_follow_the_amax_that_the_epilogue_saw(device, used):
    module = build("LayerNormMLP", device, BF16)
    x = features(2, 64, dtype=BF16, device=device)
    recipe = DelayedScaling(amax_history_len=1, amax_compute_algo="most_recent")
    seen, op = [], stage.gemm_activation_quantized

    def recording(*arguments):
        outputs = op(*arguments)
        slots, slot = arguments[10], arguments[11]
        seen.append((arguments[9][slots[slot]].item(), outputs[0].float()))
        return outputs

    recording.unfilled = recording
    stage.gemm_activation_quantized = recording  # the fixture puts the op back
    for _ in range(2):
        with te.autocast(recipe=recipe):
            module(x)
    (first, pre), (second, _) = seen
    amax = torch.nn.functional.gelu(pre, approximate="tanh").abs().max().item()
    assert first == 1
    assert second == pytest.approx(448 / amax, rel=0.01)


def test_block_scaling_keeps_its_kernels(device, used):
    module, x = build("LayerNormMLP", device, BF16), features(2, 64, dtype=BF16, device=device)
    check(module, x, "block")
    assert not used


def test_evaluation_in_fp8_records_nothing(device, used):
    module, x = build("LayerNormMLP", device, BF16), features(2, 64, dtype=BF16, device=device)
    step(module, x, "delayed")
    with torch.no_grad(), fp8("delayed"):
        first = module(x)
    with torch.no_grad(), fp8("delayed"):
        assert_same_bits(module(x), first)
    assert used == QUANTIZED * 3


# --- the sum after the layer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["plain", "delayed", "current"])
@pytest.mark.parametrize("arguments", VARIANTS[:4] + VARIANTS[5:], ids=str)
def test_the_sum_after_the_layer(arguments, recipe, device, used, monkeypatch):
    added = counted(monkeypatch, products, "gemm_add")
    monkeypatch.setattr(products, "fuses_epilogue", lambda *_: True)
    monkeypatch.setattr(products, "_prefers_epilogues", lambda *_: False)
    module = build("LayerNormMLP", device, BF16, **arguments)
    x, residual = (features(2, 64, dtype=BF16, device=device) for _ in range(2))
    other = residual.detach().cpu().double().requires_grad_()
    plain = formula_of(module)

    def formula(x, p):
        out, *rest = plain(other + x, p)
        return (other + x + out, *rest)

    def call(x):
        residual.grad = None
        return module.forward_between_residuals(x, residual)

    check(module, x, recipe, formula, call)
    steps = {"plain": 0, "current": 1, "delayed": 2}[recipe]
    assert len(added) == steps * (2 if "checkpoint" in arguments else 1)
    assert_close(residual.grad, other.grad, BF16, recipe, "gradient of residual", 5)


# --- the choice --------------------------------------------------------------------------------------------------------


class Cuda:
    """A matrix that says it is on a GPU."""

    def __init__(self, rows: int, cols: int, dtype: torch.dtype = BF16, is_cuda: bool = True) -> None:
        self.shape, self.dtype, self.is_cuda = torch.Size((rows, cols)), dtype, is_cuda


def asked(
    monkeypatch, tokens=8192, inputs=4096, inner=16384, dtype=BF16, is_cuda=True, able=True, recipe="plain", name="gelu", **frozen
):
    """What `_fuses_activation` says to the options that a module makes."""
    monkeypatch.setattr(products, "is_gemm_epilogue_available", lambda: (able, "" if able else "no"))
    seen = []
    monkeypatch.setattr(node, "_apply", lambda *arguments: seen.append(arguments) or (arguments[0].clone(),))
    with fp8(recipe), contextlib.ExitStack() as stack:
        if frozen.get("no_grad"):
            stack.enter_context(torch.no_grad())
        te.LayerNormMLP(IN, 64, activation=name, params_dtype=dtype, device="cpu")(
            torch.ones(16, IN, dtype=dtype, requires_grad=True)
        )
    options = next(argument for argument in seen[0] if isinstance(argument, node.LayerNormMLPOptions))
    matrices = [Cuda(tokens, inputs, dtype, is_cuda), Cuda(inner, inputs, dtype), Cuda(inputs, inner, dtype)]
    if options.fc1.rules is not None:
        mode, scale = options.fc1.rules.input.mode, Cuda(1, 1, dtype, is_cuda)
        matrices = [QuantizedTensor(None, None, scale, scale, mode, (m.shape[0], m.shape[1]), dtype) for m in matrices]
    return node._fuses_activation(*matrices, options)


def test_large_products_with_a_backward_fuse(monkeypatch):
    assert asked(monkeypatch)
    assert asked(monkeypatch, dtype=torch.float16)
    assert asked(monkeypatch, tokens=1024)
    assert asked(monkeypatch, tokens=8191)


@pytest.mark.parametrize(
    "case",
    [
        {"tokens": 1023},
        {"inputs": 4100},
        {"inner": 16388},
        {"dtype": torch.float32},
        {"is_cuda": False},
        {"able": False},
        {"name": "silu"},
        {"name": "geglu"},
        {"no_grad": True},
        {"recipe": "block"},
        *(
            {"recipe": "delayed", **case}
            for case in (
                {"tokens": 896},
                {"tokens": 8190},
                {"dtype": torch.float32},
                {"is_cuda": False},
                {"able": False},
                {"name": "silu"},
                {"name": "geglu"},
            )
        ),
    ],
    ids=str,
)
def test_others_do_not(case, monkeypatch):
    assert not asked(monkeypatch, **case)


def test_large_fp8_products_with_one_scale_a_tensor_fuse(monkeypatch):
    assert asked(monkeypatch, recipe="delayed")
    assert asked(monkeypatch, recipe="current")
    assert asked(monkeypatch, recipe="delayed", tokens=1024, dtype=torch.float16)
    assert asked(monkeypatch, recipe="delayed", no_grad=True)
    monkeypatch.setattr(DelayedScaling, "fp8_gemm_fprop", MMParams(use_split_accumulator=True))
    monkeypatch.setitem(RECIPES, "split", DelayedScaling())
    assert not asked(monkeypatch, recipe="split")


def product(monkeypatch, rows, outputs, contraction, fast=True, mode=Mode.CURRENT, dtype=BF16, able=True, is_cuda=True) -> bool:
    """Whether an FP8 product [rows, contraction] x [outputs, contraction] runs in those kernels."""
    monkeypatch.setattr(products, "is_gemm_epilogue_available", lambda: (able, ""))
    scale = Cuda(1, 1, is_cuda=is_cuda)
    a, b = (QuantizedTensor(None, None, scale, scale, mode, (size, contraction), dtype) for size in (rows, outputs))
    return products._prefers_epilogues(a, b, dtype, fast)


def test_fp8_products_with_many_outputs(monkeypatch):
    assert product(monkeypatch, 8192, 12288, 4096)
    assert product(monkeypatch, 8192, 4096, 4096, dtype=torch.float16, mode=Mode.DELAYED)
    assert product(monkeypatch, 8192, 16384, 4096, fast=False)
    for other in (
        {"outputs": 4096, "contraction": 16384},
        {"outputs": 4096, "fast": False},
        {"rows": 1024, "outputs": 8192},
        {"rows": 8190},
        {"mode": Mode.BLOCK_1D},
        {"dtype": torch.float32},
        {"able": False},
        {"is_cuda": False},
    ):
        assert not product(monkeypatch, **{"rows": 8192, "outputs": 16384, "contraction": 4096, **other}), other


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["delayed", "current"])
def test_large_fp8_products_on_a_gpu(recipe, monkeypatch, gemm_epilogues):
    for sizes, uses in (((2048, 8192), 1), ((8192, 2048), 1)):  # forward; the input gradient
        module = te.Linear(*sizes, params_dtype=BF16, device="cuda")
        x = torch.randn(4096, sizes[0], device="cuda", dtype=BF16, requires_grad=True)
        twin = copy.deepcopy(module)
        with monkeypatch.context() as patch:
            added = counted(patch, products, "gemm_add")
            for _ in range(2):
                found = step(module, x, recipe)
        assert len(added) == 2 * uses
        with monkeypatch.context() as patch:
            patch.setattr(products, "_prefers_epilogues", lambda *_: False)
            for _ in range(2):
                expected = step(twin, x, recipe)
        assert_alike(found, expected, BF16)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["plain", "delayed", "current", "block"])
def test_a_large_transformer_layer_on_a_gpu(recipe, monkeypatch, gemm_epilogues):
    """Its last sum is in the last product's epilogue; hooks on the MLP see the MLP's own output."""
    options = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "params_dtype": BF16, "device": "cuda"}
    layer = te.TransformerLayer(2048, 8192, 16, **options)
    x = torch.randn(256, 16, 2048, device="cuda", dtype=BF16, requires_grad=True)
    twin, added = copy.deepcopy(layer), counted(monkeypatch, products, "gemm_add")
    monkeypatch.setattr(products, "_prefers_epilogues", lambda *_: False)
    seen = []
    twin.layernorm_mlp.register_forward_hook(lambda module, inputs, output: seen.append(output))
    for _ in range(2):
        fused, apart_ = step(layer, x, recipe), step(twin, x, recipe)
    assert len(added) == (2 if recipe in ("delayed", "current") else 0)
    assert len(seen) == 2
    for result in (fused, apart_):
        del result.grads["self_attention.layernorm_qkv.key_bias"]  # is zero but for rounding: softmax does not see it
    assert_alike(fused, apart_, BF16, recipe)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("dtype", HALVES)
def test_a_large_layer_on_a_gpu(dtype, monkeypatch, gemm_epilogues):
    """By its own choice, also in a CUDA graph."""
    module = te.LayerNormMLP(2048, 8192, params_dtype=dtype, device="cuda")
    x = torch.randn(4104, 2048, device="cuda", dtype=dtype, requires_grad=True)
    with monkeypatch.context() as patch:
        uses = counted(patch, stage, "gemm_activation_backward")
        fused = step(module, x)
    assert uses
    plain = apart(monkeypatch, module, x)
    assert_alike(fused, plain, dtype)
    assert_same_step(step(module, x), fused)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same_step(step(module, x, call=compiled), plain)
    twin = copy.deepcopy(module)  # whose gradients nothing has accumulated on another stream
    twin.zero_grad()
    graphed = te.make_graphed_callables(twin, (torch.randn_like(x).requires_grad_(),))
    assert_alike(step(twin, x, call=graphed), fused, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
def test_a_large_fp8_layer_on_a_gpu(dtype, monkeypatch, gemm_epilogues):
    """By its own choice, also in a CUDA graph."""
    module = te.LayerNormMLP(2048, 8192, params_dtype=dtype, device="cuda")
    x = torch.randn(4096, 2048, device="cuda", dtype=dtype, requires_grad=True)
    twin, graphed = copy.deepcopy(module), copy.deepcopy(module)
    with monkeypatch.context() as patch:
        uses = counted(patch, stage, *QUANTIZED)
        for _ in range(2):
            fused = step(module, x, "delayed")
    assert len(uses) == 2
    for _ in range(2):
        plain = apart(monkeypatch, twin, x, "delayed")
    assert_alike(fused, plain, dtype, "delayed")
    te.make_graphed_callables(graphed, (torch.randn_like(x).requires_grad_(),), enabled=True, recipe=DelayedScaling())
    for _ in range(3):
        replayed = step(graphed, x)
    assert_alike(replayed, fused, dtype, "delayed")
