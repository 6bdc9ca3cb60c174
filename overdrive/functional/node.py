"""autograd.Function with less Python around it: what its wrappers check is known here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.compiler import is_dynamo_compiling


class _Unrecorded:
    """The ctx of a forward that no backward follows."""

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        pass


def applied(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply`, without its search for functorch's wrappers among twenty arguments where no transform is active.

    Its forward alone where nothing is recorded.
    """
    quick = super(torch.autograd.Function, function).apply  # pyright: ignore[reportAttributeAccessIssue]

    def apply(*args: Any) -> Any:
        if is_dynamo_compiling() or torch._C._are_functorch_transforms_active():
            return function.apply(*args)
        recorded = torch.is_grad_enabled() or forward_ad._current_level >= 0
        return quick(*args) if recorded else function.forward(_Unrecorded(), *args)

    return apply


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """once_differentiable, which does nothing where no second derivative can be asked for."""
    checked = once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        return checked(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return run
