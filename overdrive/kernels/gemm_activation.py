"""GEMMs with an activation in their epilogue: those of quack-kernels (Apache-2.0), which come with flash-attn-4.

They are CuTe kernels for Hopper, compiled for each dtype when first called; a CUDA graph needs a warm-up before it, as it does for
any kernel. Nothing is tuned: the tile is the best of those measured on an H200. quack has to lie in a folder named site-packages
or dist-packages, where pip puts it: elsewhere it takes cutlass for code of an epilogue and raises TypeError ("no fail-closed key").
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch

with warnings.catch_warnings():  # of names that have moved in the package's own dependencies
    warnings.simplefilter("ignore")
    from quack.gemm_config import GemmConfig
    from quack.gemm_interface import gemm_act, gemm_dact

# One object: quack finds its launch plans by the identity of what is pinned.
_CONFIG = GemmConfig(tile_m=128, tile_n=192, cluster_m=2, cluster_n=1, pingpong=True, is_dynamic_persistent=False)
_NAMES = {"gelu": "gelu_tanh_approx"}
_ALIGNMENT = 16  # bytes, of a tensor that TMA reads
_compiled: set[Hashable] = set()


def _readable(x: torch.Tensor) -> torch.Tensor:
    """x as rows that TMA reads, no parameter."""
    x = x.detach().contiguous()
    return x.clone() if x.data_ptr() % _ALIGNMENT else x


def _run(function: Callable[..., Any], *tensors: torch.Tensor, bias: torch.Tensor | None = None, **options: Any) -> None:
    """function(*tensors, ...); where it may compile first, without the warnings of its compiler."""
    kind = (function, tensors[0].dtype, *(x.shape for x in tensors), bias is None)
    if bias is not None:
        options["bias"] = bias
    with torch.cuda.device(tensors[0].device):
        if kind in _compiled:
            function(*tensors, config=_CONFIG, **options)
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(*tensors, config=_CONFIG, **options)
    _compiled.add(kind)


def gemm_activation(x, weight, bias, name):
    """overdrive::gemm_activation."""
    pre, out = (x.new_empty((x.shape[0], weight.shape[0])) for _ in range(2))
    x, weight = _readable(x), _readable(weight)
    bias = None if bias is None else _readable(bias)
    outputs = {"preact_out": pre, "postact_out": out}
    _run(gemm_act, x, weight.t(), bias=bias, activation=_NAMES[name], **outputs)
    return pre, out


def gemm_activation_backward(out, dy, weight, pre, name):
    """overdrive::gemm_activation_backward. A tile's part of pre is read before its part of out is written."""
    dpre = pre.new_empty(pre.shape)
    outputs = {"dx_out": dpre, "postact_out": out}
    _run(gemm_dact, *map(_readable, (dy, weight, pre)), activation=_NAMES[name], **outputs)
    return dpre
