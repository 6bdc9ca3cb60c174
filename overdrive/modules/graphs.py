"""CUDA graphs of layers: what the host does in a step becomes one launch forward and one backward."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from overdrive.modules.base import Module
from overdrive.recipe import Recipe
from overdrive.scaling.autocast import autocast


class _Output(torch.autograd.Function):
    """The identity; what it gives is no view, so that it can be detached in place."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


class Captured:
    """A forward inside of an autocast, whose autograd graph ends with the next call or with `finish`, whoever keeps the outputs.

    torch does keep them, of the warm-up during the capture and of the capture for good. With them live nodes that add to each
    parameter's gradient on the stream where they were made: the capture, and then every replay, would make two streams wait for
    one another once a parameter, and torch warn of it.
    """

    def __init__(self, forward: Callable[..., Any], **arguments: Any) -> None:
        self.forward, self.arguments = forward, arguments
        self.outputs: list[torch.Tensor] | None = []

    def __call__(self, *args: Any) -> Any:
        self._forget()
        with autocast(**self.arguments):
            out = self.forward(*args)
        return out if self.outputs is None else tree_map_only(torch.Tensor, self._remembered, out)

    def _remembered(self, x: torch.Tensor) -> torch.Tensor:
        if not x.requires_grad:
            return x
        assert self.outputs is not None
        self.outputs.append(_Output.apply(x))
        return self.outputs[-1]

    def _forget(self) -> None:
        while self.outputs:
            self.outputs.pop().detach_()

    def finish(self) -> None:
        """Be a plain forward from now on."""
        self._forget()
        self.outputs = None


@contextlib.contextmanager
def kept_scaling(*modules: torch.nn.Module) -> Iterator[None]:
    """What runs inside, such as a warm-up with gradients of any value, leaves no trace in the modules' states of scaling."""
    scaled = [part for module in modules for part in module.modules() if isinstance(part, Module)]
    states = [part.scaling_state() for part in scaled]
    try:
        yield
    finally:
        for part, state in zip(scaled, states):
            part.set_scaling_state(state)


def make_graphed_callables(
    modules: Any,
    sample_args: Any,
    num_warmup_iters: int = 3,
    allow_unused_input: bool = False,
    sample_kwargs: Any = None,
    enabled: bool = False,
    calibrating: bool = False,
    recipe: Recipe | None = None,
    amax_reduction_group: Any = None,
    pool: Any = None,
) -> Any:
    """Capture forward and backward of a module, or of each of a tuple, as CUDA graphs; the modules' own forward becomes the replay.

    sample_args: a tuple of tensors, or one for each module; later inputs have the same shapes and dtypes and are copied into
    place, outputs are overwritten by the next call. num_warmup_iters, allow_unused_input, pool: see
    torch.cuda.make_graphed_callables, which does the work. enabled, calibrating, recipe, amax_reduction_group: the autocast
    inside of which the modules run; each replay is a step of delayed scaling, and the states of scaling are those from before
    the capture. RuntimeError without a GPU, TypeError for what is no module, NotImplementedError for sample_kwargs.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("make_graphed_callables: CUDA graphs need a GPU, torch sees none; call the modules as they are")
    if sample_kwargs:
        raise NotImplementedError(f"make_graphed_callables: sample_kwargs={sample_kwargs!r} is not built yet; use sample_args")
    several = modules if isinstance(modules, tuple) else (modules,)
    for module in several:
        if not isinstance(module, torch.nn.Module):
            raise TypeError(
                f"make_graphed_callables: modules must be a torch.nn.Module or a tuple of them, got {type(module).__name__}"
            )
    forwards = [module.forward for module in several]
    inside = {"enabled": enabled, "calibrating": calibrating, "recipe": recipe, "amax_reduction_group": amax_reduction_group}
    collects = gc.isenabled()
    gc.collect()
    gc.disable()  # a graph that is freed inside of another's capture ends that
    try:
        captured = [Captured(forward, **inside) for forward in forwards]
        for module, forward in zip(several, captured):
            module.forward = forward
        with kept_scaling(*several):
            torch.cuda.make_graphed_callables(modules, sample_args, num_warmup_iters, allow_unused_input, pool)
        for forward in captured:
            forward.finish()
    except BaseException:
        for module, forward in zip(several, forwards):
            module.forward = forward
        raise
    finally:
        if collects:
            gc.enable()
    return modules
