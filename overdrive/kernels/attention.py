"""Attention by flash-attn-4, whose kernels read views of any strides and write into the outputs they are given."""

from __future__ import annotations

import warnings

import torch
from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

from overdrive.ops.attention import new_gradients, new_output, views_at

# its compiler's, about an argument that is empty here
warnings.filterwarnings("ignore", "Argument aux_data", UserWarning)


def _tokens_first(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(x.transpose(1, 2) for x in tensors)


def attention_forward(query, key, value, causal, scale):
    """overdrive::attention_forward."""
    out = new_output(query, value.shape[3])
    q, k, v, o = _tokens_first(query, key, value, out)
    _, lse, *_ = _flash_attn_fwd(q, k, v, softmax_scale=scale, causal=causal, out=o, return_lse=True)
    return out, lse


def attention_backward(dout, query, key, value, out, lse, causal, scale, places):
    """overdrive::attention_backward. The order of dQ's sums is fixed where torch is told to be deterministic."""
    outputs = new_gradients(query, key, value, places)
    views = views_at(places, outputs[0], query.shape, key.shape, value.shape) if places else outputs
    dq, dk, dv = _tokens_first(*views)
    q, k, v, o, dy = _tokens_first(query, key, value, out, dout)
    deterministic = torch.are_deterministic_algorithms_enabled()
    _flash_attn_bwd(q, k, v, o, dy, lse, scale, causal, deterministic=deterministic, dq=dq, dk=dk, dv=dv)
    return outputs
