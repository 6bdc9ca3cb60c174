"""How an op is defined: one schema, a plain-PyTorch reference (the CPU implementation), a Triton launch and a fake."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("overdrive", "DEF")


@functools.cache
def _kernel(family: str, function: str) -> Callable[..., Any]:
    try:
        return getattr(importlib.import_module(f"overdrive.kernels.{family}"), function)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise RuntimeError("overdrive's GPU kernels need triton: pip install triton (Linux only)") from error


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    kernel: tuple[str, str] | Callable[..., Any],
) -> Callable[..., Any]:
    """Define ``overdrive::<schema>`` and return its ``.default`` overload.

    kernel: the CUDA implementation, either a callable or (family, function) in ``overdrive.kernels``, imported on first call
    so that nothing needs triton before a CUDA tensor arrives.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CPU")
    if callable(kernel):
        _LIBRARY.impl(name, kernel, "CUDA")
    else:
        family, function = kernel
        _LIBRARY.impl(name, lambda *args: _kernel(family, function)(*args), "CUDA")
    torch.library.register_fake(f"overdrive::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.overdrive, name).default


def empty_like_none(x: torch.Tensor) -> torch.Tensor:
    """The stand-in for an output that was not asked for: ops cannot return None in a fixed tuple."""
    return x.new_empty(0)


def constant_result(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compiler.assume_constant_result without its import of torch._dynamo, which takes seconds."""
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function
