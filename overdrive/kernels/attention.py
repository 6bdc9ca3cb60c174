"""Attention by flash-attn-4, whose kernels read views of any strides and write into the outputs they are given."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch

from overdrive.ops.attention import new_gradients, new_output, views_at

with warnings.catch_warnings():  # of names that have moved in the package's own dependencies
    warnings.simplefilter("ignore")
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

_LARGEST_TILE = 256
_compiled: set[Hashable] = set()


def _tokens_first(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def _run(function: Callable[..., Any], tensors: list[torch.Tensor], **options: Any) -> Any:
    """function(*tensors, ...) on [B, S, H, D]; where it compiles first, without the warnings of its compiler."""
    query, key, value = tensors[:3]
    lengths = min(query.shape[1], _LARGEST_TILE + 1), min(key.shape[1], _LARGEST_TILE + 1)
    heads = query.shape[2] // key.shape[2], query.shape[3], value.shape[3]
    expanded = tuple(0 in x.stride() for x in tensors)
    kind = (function, query.dtype, *lengths, *heads, options["causal"], options.get("deterministic"), expanded)
    if kind in _compiled:
        return function(*tensors, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = function(*tensors, **options)
    _compiled.add(kind)
    return result


def attention_forward(query, key, value, causal, scale):
    """overdrive::attention_forward."""
    out = new_output(query, value.shape[3])
    *inputs, o = _tokens_first(query, key, value, out)
    lse = _run(_flash_attn_fwd, inputs, softmax_scale=scale, causal=causal, out=o, return_lse=True)[1]
    return out, lse


def attention_backward(dout, query, key, value, out, lse, causal, scale, places):
    """overdrive::attention_backward. The order in which dQ is summed is fixed only where torch is told to be deterministic."""
    outputs = new_gradients(query, key, value, places)
    views = views_at(places, outputs[0], query.shape, key.shape, value.shape) if places else outputs
    dq, dk, dv = _tokens_first(*views)
    inputs = [*_tokens_first(query, key, value, out, dout), lse]
    deterministic = torch.are_deterministic_algorithms_enabled()
    _run(_flash_attn_bwd, inputs, softmax_scale=scale, causal=causal, deterministic=deterministic, dq=dq, dk=dk, dv=dv)
    return outputs
