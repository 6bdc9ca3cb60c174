"""The gradient of a QKV product: the tile consumer over a gather from dq, dk and dv.

Shapes: token t is (a, b) = (t / B, t % B); feature c is (head slot, d) = (c / D, c % D).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from overdrive.kernels.quantize import quantize
from overdrive.kernels.tile import dense, run_tiles
from overdrive.ops.quantize import Quantization


@triton.jit
def _gather(x, strides, t, B, head, d, mask):
    offsets = (t // B).to(tl.int64) * strides[0] + (t % B).to(tl.int64) * strides[1]
    return tl.load(x + offsets[:, None] + (head * strides[2] + d)[None, :], mask, 0.0).to(tl.float32)


@triton.jit
def _qkv_source(args, INTERLEAVED: tl.constexpr, row0, r, cols, T, F):
    """Source: args (dq, dk, dv, their strides, B, D, H, G)."""
    dq, dk, dv, q_strides, k_strides, v_strides, B, D, H, G = args
    t = row0 + r
    slot, d = cols // D, cols % D
    if INTERLEAVED:
        per_group = H // G
        group, place = slot // (per_group + 2), slot % (per_group + 2)
        q_head = group * per_group + place
        is_q, is_k, is_v = place < per_group, place == per_group, place == per_group + 1
        k_head, v_head = group, group
    else:
        q_head, k_head, v_head = slot, slot - H, slot - H - G
        is_q, is_k, is_v = slot < H, (slot >= H) & (slot < H + G), slot >= H + G
    inside = (t < T)[:, None] & (cols < F)[None, :]
    # where a tile lies in one of the three, the other loads are off
    q = _gather(dq, q_strides, t, B, q_head, d, inside & is_q[None, :])
    k = _gather(dk, k_strides, t, B, k_head, d, inside & is_k[None, :])
    v = _gather(dv, v_strides, t, B, v_head, d, inside & is_v[None, :])
    return (tl.where(is_q[None, :], q, tl.where(is_k[None, :], k, v)),)


def qkv_gradient(dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, interleaved: bool, bias_grad: bool, *tail):
    """overdrive::qkv_gradient."""
    dq, dk, dv = dense(dq), dense(dk), dense(dv)
    outer, inner, heads, width = dq.shape
    groups = dk.shape[2]
    args = (dq, dk, dv, *(x.stride()[:3] for x in (dq, dk, dv)), inner, width, heads, groups)
    shape = (outer * inner, (heads + 2 * groups) * width)
    if 0 in shape:  # strides of empty tensors mean nothing
        return quantize(dq.new_empty(shape), bias_grad, *tail)
    out, column_sum = run_tiles(_qkv_source, args, interleaved, dq, shape, Quantization(*tail), bias_grad=bias_grad)
    return (*out, column_sum)
