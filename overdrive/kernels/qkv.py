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
def _gather(x, s0, s1, s2, t, B, head, d, mask):
    offsets = (t // B).to(tl.int64) * s0 + (t % B).to(tl.int64) * s1
    return tl.load(x + offsets[:, None] + (head * s2 + d)[None, :], mask, 0.0).to(tl.float32)


@triton.jit
def _place(slot, INTERLEAVED: tl.constexpr, H, G):
    """(is a head of Q, of K, which head of that) of a head slot."""
    if INTERLEAVED:
        per_group = H // G
        group, place = slot // (per_group + 2), slot % (per_group + 2)
        is_q, is_k = place < per_group, place == per_group
        return is_q, is_k, tl.where(is_q, group * per_group + place, group)
    is_q, is_k = slot < H, (slot >= H) & (slot < H + G)
    return is_q, is_k, tl.where(is_q, slot, tl.where(is_k, slot - H, slot - H - G))


@triton.jit
def _qkv_source(args, FLAG: tl.constexpr, row0, r, cols, T, F):
    """Source: args (dq, dk, dv, their strides, B, H, G). FLAG: 2 D, + 1 if interleaved."""
    dq, dk, dv, q_strides, k_strides, v_strides, B, H, G = args
    INTERLEAVED: tl.constexpr = FLAG % 2 == 1
    D: tl.constexpr = FLAG // 2
    t = row0 + r
    inside = (t < T)[:, None] & (cols < F)[None, :]
    if D % cols.shape[0] == 0:  # the tile is of one head, so one load
        slot = tl.min(cols, 0) // D
        is_q, is_k, head = _place(slot, INTERLEAVED, H, G)
        x = tl.where(is_q, dq, tl.where(is_k, dk, dv))
        s0 = tl.where(is_q, q_strides[0], tl.where(is_k, k_strides[0], v_strides[0]))
        s1 = tl.where(is_q, q_strides[1], tl.where(is_k, k_strides[1], v_strides[1]))
        s2 = tl.where(is_q, q_strides[2], tl.where(is_k, k_strides[2], v_strides[2]))
        return (_gather(x, s0, s1, s2, t, B, head, cols - slot * D, inside),)
    is_q, is_k, head = _place(cols // D, INTERLEAVED, H, G)
    d = cols % D
    q = _gather(dq, q_strides[0], q_strides[1], q_strides[2], t, B, head, d, inside & is_q[None, :])
    k = _gather(dk, k_strides[0], k_strides[1], k_strides[2], t, B, head, d, inside & is_k[None, :])
    v = _gather(dv, v_strides[0], v_strides[1], v_strides[2], t, B, head, d, inside & ~(is_q | is_k)[None, :])
    return (tl.where(is_q[None, :], q, tl.where(is_k[None, :], k, v)),)


def qkv_gradient(dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, interleaved: bool, bias_grad: bool, *tail):
    """overdrive::qkv_gradient."""
    dq, dk, dv = dense(dq), dense(dk), dense(dv)
    outer, inner, heads, width = dq.shape
    groups = dk.shape[2]
    shape = (outer * inner, (heads + 2 * groups) * width)
    if 0 in shape:  # strides of empty tensors mean nothing
        return quantize(dq.new_empty(shape), bias_grad, *tail)
    strides = [x.stride()[:3] for x in (dq, dk, dv)]
    if all(s0 == inner * s1 for s0, s1, _ in strides):  # one stride from token to token: nothing to divide
        strides, inner = [(s1, 0, s2) for _, s1, s2 in strides], 1
    args = (dq, dk, dv, *strides, inner, heads, groups)
    flag, q = 2 * width + interleaved, Quantization(*tail)
    out, column_sum = run_tiles(_qkv_source, args, flag, dq, shape, q, span=width, bias_grad=bias_grad)
    return (*out, column_sum)
