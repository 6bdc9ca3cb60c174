"""Activation checkpointing: recomputation must see the recipe and the scales of the forward it repeats.

torch.utils.checkpoint runs a function twice, the second time inside backward, when the autocast has long ended or begun a new
step. Both runs share one object: the frame that its saved-tensor hooks close over (use_reentrant=False) or the autograd node
(True). What the first run used is kept on that object, so it lives exactly as long as it may be needed. Checkpoints nest, and the
first run of an inner one may be part of the repetition of an outer one, hence the walk up the stack.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import CheckpointFunction, _checkpoint_hook, checkpoint

_CHECKPOINT = inspect.unwrap(checkpoint).__code__
_FORWARD, _BACKWARD = CheckpointFunction.forward.__code__, CheckpointFunction.backward.__code__
_CONSTANTS = _checkpoint_hook.__init__.__code__.co_consts
_UNPACK = next((code for code in _CONSTANTS if getattr(code, "co_name", "") == "unpack_hook"), None)


class Recording:
    """What one checkpointed call used: the autocasts it entered, in order, and the one it found itself in."""

    def __init__(self) -> None:
        self.entered: list[Any] = []
        self.around: Any = None
        self._replayed: dict[int, int] = {}

    def next_entered(self, task: int) -> Any:
        """The autocast that the first run entered at this point; each backward (`task`) counts anew."""
        index = self._replayed.get(task, 0)
        self._replayed[task] = index + 1
        return self.entered[index] if index < len(self.entered) else None


class Running(NamedTuple):
    """The checkpointed calls that are running. first: those in their first run, innermost first. repeated: the one being repeated,
    by the backward `task`, around those.
    """

    first: tuple[Recording, ...] = ()
    repeated: Recording | None = None
    task: int = -1


OUTSIDE = Running()


def _closed_over(function: Callable[..., Any], name: str) -> Any:
    function = inspect.unwrap(function)
    variables = getattr(getattr(function, "__code__", None), "co_freevars", ())
    return function.__closure__[variables.index(name)].cell_contents if name in variables else None  # pyright: ignore[reportFunctionMemberAccess, reportOptionalSubscript]


def _carriers(hooks: Any) -> Iterator[tuple[Any, bool]]:
    """(carrier, whether it is being repeated) of every checkpoint around the caller, innermost first."""
    innermost = None if hooks is None else _closed_over(hooks[0], "frame")
    if innermost is not None:  # the only trace that torch.distributed's composable checkpoint leaves
        yield innermost, False
    caller = sys._getframe(1)
    while caller is not None:
        code = caller.f_code
        if code is _FORWARD or code is _BACKWARD:
            yield caller.f_locals["ctx"], code is _BACKWARD
        elif code is _UNPACK:
            yield caller.f_locals["frame"], True
        elif code is _CHECKPOINT and "gen" in caller.f_locals:
            frame = caller.f_locals["gen"].gi_frame.f_locals.get("new_frame")
            if frame is not None and frame is not innermost:
                yield frame, False
        caller = caller.f_back


def _recording(carrier: Any) -> Recording:
    recording = getattr(carrier, "_overdrive_recording", None)
    if recording is None:
        recording = carrier._overdrive_recording = Recording()
    return recording


def current() -> Running:
    """What the caller is part of; quick outside of checkpoints, and in inference mode, whose results no backward needs again."""
    task = torch._C._current_graph_task_id()
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)  # pyright: ignore[reportAttributeAccessIssue]
    if task == -1 and hooks is None and (torch.is_grad_enabled() or torch.is_inference_mode_enabled()):
        return OUTSIDE
    first: list[Recording] = []
    for carrier, repeated in _carriers(hooks):
        if repeated:
            return Running(tuple(first), _recording(carrier), task)
        first.append(_recording(carrier))
    return Running(tuple(first)) if first else OUTSIDE
