"""Quantized tensors: `QuantizedTensor` inside the library, `Float8Tensor` where a user meets one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from overdrive.ops.gemm import dequantize
from overdrive.ops.quantize import Mode


@dataclass
class QuantizedTensor:
    """FP8 values of a matrix in one or both layouts, with reciprocal scales (ops.quantize.Quantized has their shapes).

    data [Tp, K] serves products that contract over K, data_t [K, Tp] those over T. shape is the unpadded (T, K), dtype what
    the values stand for. `.t()` swaps the layouts, as a plain tensor's does, so a GEMM is written once for both.
    """

    data: torch.Tensor | None
    data_t: torch.Tensor | None
    scale_inv: torch.Tensor
    scale_inv_t: torch.Tensor
    mode: Mode
    shape: tuple[int, int]
    dtype: torch.dtype

    def t(self) -> QuantizedTensor:
        """The transpose."""
        return QuantizedTensor(
            self.data_t, self.data, self.scale_inv_t, self.scale_inv, self.mode, (self.shape[1], self.shape[0]), self.dtype
        )

    def dequantize(self) -> torch.Tensor:
        """The values, in `dtype`."""
        if self.data is not None:
            values = dequantize(self.data, self.scale_inv, self.mode)[: self.shape[0]]
        else:
            assert self.data_t is not None
            values = dequantize(self.data_t, self.scale_inv_t, self.mode)[:, : self.shape[0]].t()
        return values[:, : self.shape[1]].to(self.dtype)


Operand = torch.Tensor | QuantizedTensor
"""One side of a GEMM: high precision or FP8."""


def pack(operands: tuple[Operand | None, ...]) -> tuple[list[torch.Tensor | None], tuple[Any, ...]]:
    """What backward reads of operands, the tensors themselves or the transposed FP8 copies: as plain tensors, which autograd can
    save, and what `unpack` needs to put them together again.
    """
    tensors: list[torch.Tensor | None] = []
    layout: list[Any] = []
    for operand in operands:
        if isinstance(operand, QuantizedTensor):
            tensors += [operand.data_t, operand.scale_inv_t]
            layout.append((operand.mode, operand.shape, operand.dtype))
        else:
            tensors.append(operand)
            layout.append(None)
    return tensors, tuple(layout)


def unpack(tensors: Any, layout: tuple[Any, ...]) -> list[Any]:
    """The operands that `pack` took apart, without their row layouts."""
    operands, at = [], 0
    for entry in layout:
        if entry is None:
            operands.append(tensors[at])
            at += 1
        else:
            data_t, scale_inv_t = tensors[at : at + 2]
            operands.append(QuantizedTensor(None, data_t, scale_inv_t, scale_inv_t, *entry))
            at += 2
    return operands
