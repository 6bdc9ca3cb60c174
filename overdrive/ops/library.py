"""How an op is defined: one schema, a plain-PyTorch reference (the CPU implementation), a Triton launch and a fake."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

_PLAIN: set[type] = {torch.Tensor, torch.nn.Parameter}
"""Types of arguments that a kernel takes as they are; those that are no tensors join when they first come."""
_LIBRARY = torch.library.Library("overdrive", "DEF")


class Kernel:
    """A CUDA implementation; one named by (family, function) is imported when first needed."""

    def __init__(self, kernel: tuple[str, str] | Callable[..., Any]) -> None:
        self.name = kernel
        self.function = kernel if callable(kernel) else None

    def load(self) -> Callable[..., Any]:
        """The function; RuntimeError if that needs a triton which is not installed."""
        family, function = self.name  # pyright: ignore[reportGeneralTypeIssues]
        try:
            self.function = getattr(importlib.import_module(f"overdrive.kernels.{family}"), function)
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            raise RuntimeError("overdrive's GPU kernels need triton: pip install triton (Linux only)") from error
        return self.function

    def __call__(self, *args: Any) -> Any:
        return (self.function or self.load())(*args)


def _filled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with an empty tensor for every None that it returns: outputs as a schema can have them.

    Each is its caller's own: autograd would take a shared one for an output of the node that returned it last.
    """

    def filled(*args: Any) -> Any:
        outputs = function(*args)
        if not isinstance(outputs, tuple):
            return outputs
        return tuple(args[0].new_empty(0, dtype=torch.float32) if x is None else x for x in outputs)

    return filled


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    kernel: tuple[str, str] | Callable[..., Any],
) -> Any:
    """Define ``overdrive::<schema>`` and return what calls it.

    kernel: the CUDA implementation, either a callable or (family, function) in ``overdrive.kernels``, imported on first call
    so that nothing needs triton before a CUDA tensor arrives. Of several outputs, each function returns None for those that were
    not asked for; callers find an empty tensor there, and callers of the result's `unfilled` that or None.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    implementation = Kernel(kernel)
    _LIBRARY.impl(name, _filled(reference), "CPU")
    _LIBRARY.impl(name, _filled(implementation), "CUDA")
    torch.library.register_fake(f"overdrive::{name}", _filled(fake), lib=_LIBRARY)
    return _direct(getattr(torch.ops.overdrive, name).default, implementation)


def _plain(args: tuple[Any, ...]) -> bool:
    """Whether no argument is a tensor subclass, which the dispatcher knows how to read."""
    for kind in set(map(type, args)) - _PLAIN:
        if issubclass(kind, torch.Tensor):
            return False
        _PLAIN.add(kind)
    return True


def _direct(overload: Any, kernel: Kernel) -> Any:
    """What calls `overload`, or `kernel` where the dispatcher would do no more: it costs 10 us for ops of twenty arguments."""

    def unfilled(*args: Any) -> Any:
        first = args[0]
        if (
            is_dynamo_compiling()
            or not first.is_cuda
            or not (_PLAIN.issuperset(map(type, args)) or _plain(args))
            or torch._C._len_torch_dispatch_stack()
            or torch._C._are_functorch_transforms_active()
            or (first.requires_grad and torch.is_grad_enabled())
        ):
            return overload(*args)
        return (kernel.function or kernel.load())(*args)

    if len(overload._schema.returns) == 1:
        return unfilled
    op: Any = _filled(unfilled)
    op.unfilled = unfilled
    return op


def constant_result(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compiler.assume_constant_result without its import of torch._dynamo, which takes seconds."""
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, where nothing on `device` can be read."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
