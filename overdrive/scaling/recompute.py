"""Activation checkpointing: recomputation must see the recipe and the scales of the forward it repeats.

torch.utils.checkpoint runs a function twice, the second time inside backward, when the autocast has long ended or begun a new
step. Both runs share one object: the frame that its saved-tensor hooks close over (use_reentrant=False) or the autograd node
(True). What the first run used is kept on that object, so it lives exactly as long as it may be needed."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointFunction

_REENTRANT_FORWARD = CheckpointFunction.forward.__code__


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


def _closed_over(function: Callable[..., Any], name: str) -> Any:
    function = inspect.unwrap(function)
    if name not in function.__code__.co_freevars:
        return None
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents  # pyright: ignore[reportOptionalSubscript]


def _carrier(recomputing: bool) -> Any:
    """The object that both runs of the innermost checkpoint share, None outside of checkpoints."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)  # pyright: ignore[reportAttributeAccessIssue]
    if hooks is not None:
        reference = _closed_over(hooks[0], "target_frame_ref")
        frame = reference() if reference is not None else _closed_over(hooks[0], "frame")
        if frame is not None:
            return frame
    if recomputing:
        node = torch._C._current_autograd_node()
        return node if type(node).__name__ == "CheckpointFunctionBackward" else None
    if not torch.is_grad_enabled():
        caller = sys._getframe(1)
        while caller is not None:
            if caller.f_code is _REENTRANT_FORWARD:
                return caller.f_locals["ctx"]
            caller = caller.f_back
    return None


def current() -> tuple[Recording | None, int]:
    """(recording, task): the checkpoint being recorded or repeated, and the backward that repeats it (-1 while recording)."""
    task = torch._C._current_graph_task_id()
    carrier = _carrier(task != -1)
    if carrier is None:
        return None, task
    recording = getattr(carrier, "_overdrive_recording", None)
    if recording is None:
        recording = carrier._overdrive_recording = Recording()
    return recording, task
