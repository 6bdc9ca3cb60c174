"""A QKV product handed out as Q, K and V, whose gradients come back together without a concatenation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from overdrive.functional.attention import split_qkv
from overdrive.functional.gemm import GemmOptions, grad_operand, quantizing
from overdrive.ops.qkv import qkv_gradient
from overdrive.scaling.quantizers import Scales, produce
from overdrive.scaling.tensor import Operand


@dataclass
class QKVLayout:
    """How the features of a QKV product lie: interleaved as [groups, heads / groups + 2, head_dim], or as [Q; K; V]."""

    heads: int
    groups: int
    head_dim: int
    interleaved: bool

    @property
    def features(self) -> int:
        """Of the product."""
        return (self.heads + 2 * self.groups) * self.head_dim

    def places(self) -> tuple[tuple[int, int, int], ...]:
        """(heads, first feature, stride of the heads) of Q, of K and of V; 0 for a stride where none spans the heads."""
        width, per_group = self.head_dim, self.heads // self.groups
        starts, strides = (0, self.heads, self.heads + self.groups), (width,) * 3
        if self.interleaved:
            stride = (per_group + 2) * width
            query = stride if per_group == 1 else width if self.groups == 1 else 0
            starts, strides = (0, per_group, per_group + 1), (query, stride, stride)
        return tuple(zip((self.heads, self.groups, self.groups), [start * width for start in starts], strides))


def outputs_of(y: torch.Tensor, layout: QKVLayout | None) -> tuple[torch.Tensor, ...]:
    """(y,), or (Q [.., H, D], K, V [.., G, D])."""
    return (y,) if layout is None else split_qkv(y, layout.heads, layout.groups, layout.head_dim, layout.interleaved)


def output_count(layout: QKVLayout | None) -> int:
    """How many tensors `outputs_of` gives."""
    return 1 if layout is None else 3


def whole_gradient(dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, layout: QKVLayout) -> torch.Tensor | None:
    """The matrix [tokens, features] of which dq, dk and dv are what `outputs_of` gives, or None: then they must be gathered."""
    if torch.compiler.is_compiling():
        return None
    storage = dq.untyped_storage()._cdata
    if dk.untyped_storage()._cdata != storage or dv.untyped_storage()._cdata != storage:
        return None
    outer, inner = dq.shape[:2]
    row, start = layout.features, dq.storage_offset()
    for x, (heads, first, stride) in zip((dq, dk, dv), layout.places()):
        shape, strides = (outer, inner, heads, layout.head_dim), (inner * row, row, stride, 1)
        if x.shape != shape or x.storage_offset() != start + first or x.dtype != dq.dtype:
            return None
        if x.stride() != strides and any(n > 1 and a != b for n, a, b in zip(shape, x.stride(), strides)):
            return None
    return dq.as_strided((outer * inner, row), (row, 1))


def outputs_gradient(
    grads: tuple[Any, ...], layout: QKVLayout | None, options: GemmOptions, scales: Scales
) -> tuple[Operand, torch.Tensor | None]:
    """`gemm.grad_operand` of what `outputs_of` gave."""
    if layout is None:
        return grad_operand(grads[0].reshape(-1, grads[0].shape[-1]), options, scales)
    dq, dk, dv = [x if x.dim() == 4 else x.unsqueeze(1) for x in grads[:3]]
    whole = whole_gradient(dq, dk, dv, layout)
    if whole is not None:
        return grad_operand(whole, options, scales)
    arguments = (dq, dk, dv, layout.interleaved, options.bias_grad)
    rules = quantizing(options.rules)
    quantizer = None if rules is None else rules.grad_output
    shape, layouts = (dq.shape[0] * dq.shape[1], layout.features), (options.input_grad, options.weight_grad)
    dy, (dbias,) = produce(qkv_gradient, arguments, quantizer, scales, shape, dq.dtype, *layouts)
    return dy, dbias if options.bias_grad else None
