"""A QKV product handed out as Q, K and V, whose gradients come back together without a concatenation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from overdrive.functional.attention import split_qkv
from overdrive.functional.gemm import GemmOptions, grad_operand
from overdrive.ops.qkv import qkv_gradient
from overdrive.ops.quantize import Mode, Quantization
from overdrive.scaling.quantizers import Scales
from overdrive.scaling.tensor import Operand


@dataclass
class QKVLayout:
    """How the features of a QKV product lie: interleaved as [groups, heads / groups + 2, head_dim], or as [Q; K; V]."""

    heads: int
    groups: int
    head_dim: int
    interleaved: bool


def outputs_of(y: torch.Tensor, layout: QKVLayout | None) -> tuple[torch.Tensor, ...]:
    """(y,), or (Q [.., .., H, D], K, V [.., .., G, D])."""
    return (y,) if layout is None else split_qkv(y, layout.heads, layout.groups, layout.head_dim, layout.interleaved)


def output_count(layout: QKVLayout | None) -> int:
    """How many tensors `outputs_of` gives."""
    return 1 if layout is None else 3


def outputs_gradient(
    grads: tuple[Any, ...], layout: QKVLayout | None, options: GemmOptions, scales: Scales
) -> tuple[Operand, torch.Tensor | None]:
    """`gemm.grad_operand` of what `outputs_of` gave."""
    if layout is None:
        return grad_operand(grads[0].reshape(-1, grads[0].shape[-1]), options, scales)
    dq, dk, dv = grads[:3]
    arguments = (dq, dk, dv, layout.interleaved, options.bias_grad)
    if options.rules is None or not options.rules.quantizes:
        dy, *_, dbias = qkv_gradient(*arguments, *Quantization(Mode.PLAIN, dq.dtype))
    else:
        row, col = options.input_grad, options.weight_grad
        quantizer = options.rules.grad_output
        *outputs, dbias = qkv_gradient(*arguments, *quantizer.arguments(scales, row, col))
        shape = (dq.shape[0] * dq.shape[1], (layout.heads + 2 * layout.groups) * layout.head_dim)
        dy = quantizer.wrap(outputs, shape, dq.dtype, row, col)
    return dy, dbias if options.bias_grad else None
