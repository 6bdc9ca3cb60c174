"""autograd.Function with less Python around it: what its wrappers check is known here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def applied(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply`, without its search for functorch's wrappers among twenty arguments where no transform is active."""
    quick = super(torch.autograd.Function, function).apply  # pyright: ignore[reportAttributeAccessIssue]

    def apply(*args: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return function.apply(*args)
        return quick(*args)

    return apply


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """once_differentiable, which does nothing where no second derivative can be asked for."""
    checked = once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        return checked(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return run
