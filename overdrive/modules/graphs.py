"""CUDA graphs of layers: what the host does in a step becomes one launch forward and one backward."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch

from overdrive.modules.base import Module
from overdrive.recipe import Recipe
from overdrive.scaling.autocast import autocast


def _inside(forward: Callable[..., Any], **arguments: Any) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with autocast(**arguments):
            return forward(*args)

    return run


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
    collects = gc.isenabled()
    gc.collect()
    gc.disable()  # a graph that is freed inside of another's capture ends that
    try:
        for module in several:
            module.forward = _inside(
                module.forward, enabled=enabled, calibrating=calibrating, recipe=recipe, amax_reduction_group=amax_reduction_group
            )
        with kept_scaling(*several):
            torch.cuda.make_graphed_callables(modules, sample_args, num_warmup_iters, allow_unused_input, pool)
    except BaseException:
        for module, forward in zip(several, forwards):
            module.forward = forward
        raise
    finally:
        if collects:
            gc.enable()
    return modules
