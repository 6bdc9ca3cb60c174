"""The GEMM stage: operands, products, gradients. Linear, LayerNormLinear and LayerNormMLP are compositions of it.

Shapes: x [T, K] tokens by inputs, weight [N, K], y and dy [T, N]. Every product is `matmul(a, b) = a @ b.T`; `.t()` on an
operand says which layout it contracts over: y = x w^T, dx = dy (w^T)^T, dw = dy^T (x^T)^T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.compiler import is_dynamo_compiling

from overdrive.ops.gemm import gemm, gemms, host_decides
from overdrive.ops.gemm_epilogue import gemm_add
from overdrive.ops.quantize import PAD, Mode
from overdrive.ops.residual import residual_add
from overdrive.ops.scaling import record_amax
from overdrive.scaling.arena import SLOTS, with_index
from overdrive.scaling.quantizers import Quantizer, Rules, Scales
from overdrive.scaling.support import is_gemm_epilogue_available
from overdrive.scaling.tensor import Operand, QuantizedTensor

WeightGradSink = Callable[[Operand, Operand], tuple[torch.Tensor | None, ...]]


@dataclass
class GemmOptions:
    """What one GEMM of a module does, constant for compiled code.

    rules: how to quantize, None for high precision. dtype: of activations. input_grad, weight_grad, bias_grad: which gradients
    backward owes. splits: rows of each of the weight's parameters. sink: who takes (dy, x) instead of returning weight gradients.
    """

    rules: Rules | None
    dtype: torch.dtype
    input_grad: bool
    weight_grad: bool
    bias_grad: bool
    splits: tuple[int, ...]
    sink: WeightGradSink | None = None

    @property
    def quantizes(self) -> bool:
        """Whether the GEMM runs in FP8."""
        return quantizing(self.rules) is not None


def matmul(
    a: Operand,
    b: Operand,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    fast: bool = False,
    addend: torch.Tensor | None = None,
) -> torch.Tensor:
    """a [M, K] @ b [N, K].T + bias + addend [M, N] -> [M, N] in `dtype`. fast: see recipe.MMParams."""
    if isinstance(a, torch.Tensor):
        return gemm(a, b, None, None, bias, dtype, Mode.PLAIN, Mode.PLAIN, fast, addend)
    assert isinstance(b, QuantizedTensor)
    assert a.data is not None
    padded = a.data.shape[0] != a.shape[0]
    joined = None if padded else addend
    if _prefers_epilogues(a, b, dtype, fast):
        out = gemm_add(a.data, b.data, a.scale_inv, b.scale_inv, bias, joined, dtype, fast)
    else:
        out = gemm(a.data, b.data, a.scale_inv, b.scale_inv, bias, dtype, a.mode, b.mode, fast, joined)
    if padded:
        out = out[: a.shape[0]]
        return out if addend is None else out.add_(addend)
    return out


def calibrate(x: torch.Tensor, quantizer: Quantizer, scales: Scales) -> None:
    """Record the amax that quantizing x would have."""
    if quantizer.tenant >= 0:
        record_amax(SLOTS.counters[with_index(x.device)], x, scales.slots, quantizer.slot, quantizer.tenant)


def quantizing(rules: Rules | None) -> Rules | None:
    """`rules` where they quantize; None in high precision and in calibration."""
    return rules if rules is not None and rules.quantizes else None


def calibrated(x: Operand, rules: Rules | None, scales: Scales) -> Operand:
    """x, a GEMM's input, its amax recorded where that is all that the rules ask for."""
    if rules is not None and isinstance(x, torch.Tensor):
        calibrate(x, rules.input, scales)
    return x


def input_operand(x: Operand, options: GemmOptions, scales: Scales, row_only: bool = False) -> Operand:
    """x as the forward GEMM reads it; unless row_only, in both layouts where a weight gradient will want the other."""
    rules = options.rules
    if rules is None or isinstance(x, QuantizedTensor):
        return x
    if not rules.quantizes:
        return calibrated(x, rules, scales)
    return rules.input(x, scales, row=True, col=options.weight_grad and not row_only)[0]


def weight_operand(weight: torch.Tensor, options: GemmOptions, scales: Scales, cached: QuantizedTensor | None = None) -> Operand:
    """The weight as the forward GEMM reads it; in both layouts where an input gradient will want the other."""
    rules = options.rules
    if cached is not None:
        return cached
    if rules is None:
        return weight
    if not rules.quantizes:
        calibrate(weight, rules.weight, scales)
        return weight
    return rules.weight(weight, scales, row=True, col=options.input_grad)[0]


def grad_operand(
    dy: torch.Tensor, options: GemmOptions, scales: Scales, bias_grad: bool | None = None
) -> tuple[Operand, torch.Tensor | None]:
    """(dy as the backward GEMMs read it, bias gradient if that is owed; bias_grad=False: somebody else makes it)."""
    rules, bias_grad = quantizing(options.rules), options.bias_grad if bias_grad is None else bias_grad
    if rules is not None:
        return rules.grad_output(dy, scales, options.input_grad, options.weight_grad, bias_grad)
    return dy, column_sum(dy) if bias_grad else None


def column_sum(dy: torch.Tensor) -> torch.Tensor:
    """dy summed over tokens in f32, in dy's dtype."""
    return dy.sum(0, dtype=torch.float32).to(dy.dtype) if dy.device.type == "cpu" else dy.sum(0)


def releases() -> bool:
    """Whether the backward that runs is the last to read what its nodes saved: not with retain_graph=True."""
    return not (is_dynamo_compiling() or torch._C._autograd._get_current_graph_task_keep_graph())  # pyright: ignore[reportAttributeAccessIssue]


def release(*operands: Operand | None) -> None:
    """Free saved operands that nothing but this backward reads, after their last use.

    Autograd would hold them until its node ends, next to all that the node makes.
    """
    if not releases():
        return
    for operand in operands:
        for tensor in (operand.data, operand.data_t) if isinstance(operand, QuantizedTensor) else (operand,):
            if tensor is not None:
                tensor.untyped_storage().resize_(0)


FUSED_MULTIPLICATIONS = 2**36
"""Of a product: below, cuBLASLt and a kernel for what follows it take no longer than one with an epilogue, and the host less."""


def _runs_epilogues(a: Operand, b: Operand, dtype: torch.dtype) -> bool:
    """Whether kernels with epilogues (ops.gemm_epilogue) take the product a b^T to `dtype`, and are worth their launch."""
    if torch.compiler.is_compiling() or dtype not in (torch.bfloat16, torch.float16):  # compiled: not measured, sizes unknown
        return False
    if isinstance(a, QuantizedTensor):
        fits = a.mode.per_tensor and a.scale_inv.is_cuda and a.shape[0] % PAD == 0
    else:
        fits = a.is_cuda and a.dtype == b.dtype == dtype and not (b.shape[0] % 8 or b.shape[1] % 8)
    return fits and a.shape[0] * b.shape[0] * b.shape[1] >= FUSED_MULTIPLICATIONS and is_gemm_epilogue_available()[0]


def _fast(options: GemmOptions, product: str) -> bool:
    """Whether the recipe lets a product sum as the tensor cores do; see recipe.MMParams."""
    return options.rules is not None and not getattr(options.rules.recipe, product).use_split_accumulator


def fuses_epilogue(x: Operand, weight: Operand, options: GemmOptions) -> bool:
    """Whether what follows the product x w^T can join it."""
    if isinstance(x, QuantizedTensor):
        return _fast(options, "fp8_gemm_fprop") and _runs_epilogues(x, weight, options.dtype)
    return options.rules is None and _runs_epilogues(x, weight, options.dtype)


def _prefers_epilogues(a: QuantizedTensor, b: QuantizedTensor, dtype: torch.dtype, fast: bool) -> bool:
    """Whether those kernels are the faster ones for the product alone: where outputs are many beside the contraction.

    Measured on an H200 with 8192 tokens, of cuBLASLt's time: 4096 -> 12288 0.93, 4096 -> 4096 0.95, 16384 -> 4096 1.0; with split
    accumulation 4096 -> 16384 0.94, all others 0.99 to 1.1. In a long row of products, where the GPU's power decides, all are 1.
    """
    return _runs_epilogues(a, b, dtype) and b.shape[0] >= (1 if fast else 3) * b.shape[1]


def forward_product(
    x: Operand,
    weight: Operand,
    bias: torch.Tensor | None,
    options: GemmOptions,
    addend: torch.Tensor | None = None,
    p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x w^T + bias, or dropout_p(y) + addend [T, N].

    Measured on an H200: in FP8 the layer takes 0.570 of eager's time with the sum in the product's epilogue, 0.580 without; in bf16
    0.941 and 0.936, with dropout there too 0.951 and 0.945.
    """
    if addend is not None and p == 0 and isinstance(x, QuantizedTensor) and fuses_epilogue(x, weight, options):
        assert isinstance(weight, QuantizedTensor)
        return gemm_add(x.data, weight.data, x.scale_inv, weight.scale_inv, bias, addend, options.dtype, True)
    y = matmul(x, weight, options.dtype, bias, _fast(options, "fp8_gemm_fprop"), None if p > 0 else addend)
    return y if addend is None or p == 0 else residual_add(y, None, addend, p, seed)


def input_gradient(dy: Operand, weight: Operand, options: GemmOptions) -> torch.Tensor:
    """dx = dy w."""
    return matmul(dy, weight.t(), options.dtype, None, _fast(options, "fp8_gemm_dgrad"))


def weight_gradient(dy: Operand, x: Operand, options: GemmOptions, dtype: torch.dtype | None = None) -> torch.Tensor:
    """dw = dy^T x, in the weight's dtype unless told otherwise."""
    return matmul(dy.t(), x.t(), dtype or options.dtype, None, _fast(options, "fp8_gemm_wgrad"))


def weight_gradients(dy: Operand, x: Operand, options: GemmOptions) -> tuple[torch.Tensor | None, ...]:
    """The gradient of each of the weight's parameters, None where not owed or taken by the sink."""
    if not options.weight_grad:
        return (None,) * len(options.splits)
    if options.sink is not None:
        return options.sink(dy, x)
    return _parts(weight_gradient(dy, x, options), options)


def _parts(dw: torch.Tensor, options: GemmOptions) -> tuple[torch.Tensor, ...]:
    """The gradient of each of the weight's parameters."""
    return (dw,) if len(options.splits) == 1 else dw.split(options.splits)


def both_gradients(
    dy: Operand, weight: Operand, x: Operand, options: GemmOptions
) -> tuple[torch.Tensor | None, tuple[torch.Tensor | None, ...] | None]:
    """(`input_gradient`, `weight_gradients`) in one launch, where both are owed and the products so small that the host decides;
    else (None, None).
    """
    if is_dynamo_compiling() or not (options.input_grad and options.weight_grad) or options.sink is not None:
        return None, None
    (m, n), k = dy.shape, weight.shape[1]
    if isinstance(dy, QuantizedTensor):
        assert isinstance(weight, QuantizedTensor)
        assert isinstance(x, QuantizedTensor)
        assert dy.data is not None
        like, of_dx = dy.data, (dy.data, weight.data_t, dy.scale_inv, weight.scale_inv_t)
        of_dw = (dy.data_t, x.data_t, dy.scale_inv_t, x.scale_inv_t)
        modes = (dy.mode, weight.mode, dy.mode, x.mode)
    else:
        if not dy.dtype == weight.dtype == x.dtype:
            return None, None
        like, of_dx, of_dw = dy, (dy, weight.t(), None, None), (dy.t(), x.t(), None, None)
        modes = (Mode.PLAIN,) * 4
    if not (host_decides(m, k, n, like) and host_decides(n, k, m, like)):
        return None, None
    fast = (_fast(options, "fp8_gemm_dgrad"), _fast(options, "fp8_gemm_wgrad"))
    dx, dw = gemms.unfilled(*of_dx, *of_dw, options.dtype, *modes, *fast)
    return dx if dx.shape[0] == m else dx[:m], _parts(dw, options)


def product_gradients(
    dy: Operand, weight: Operand, x: Operand, options: GemmOptions
) -> tuple[torch.Tensor | None, tuple[torch.Tensor | None, ...]]:
    """(`input_gradient` or None, `weight_gradients`)."""
    dx, dweights = both_gradients(dy, weight, x, options)
    if dweights is None:
        dweights = weight_gradients(dy, x, options)
        dx = input_gradient(dy, weight, options) if options.input_grad else None
    return dx, dweights
