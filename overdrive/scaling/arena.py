"""Which slots of the delayed-scaling arena belong to whom: handing them out, taking them back, carrying their state in and out."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from overdrive.ops.library import constant_result
from overdrive.ops.scaling import ARENAS, RESTORED, SLOTS_PER_GEMM, TENANTS, UNTOUCHED, Arena, arena, tenant_id
from overdrive.recipe import DelayedScaling


def with_index(device: torch.device) -> torch.device:
    """ "cuda" -> "cuda:<current>", the form arenas are kept under."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


class _Slots:
    """Hands out runs of slots, numbered alike on every device."""

    def __init__(self) -> None:
        self.count = 0
        self.capacity = 1024  # what snapshots have room for; a power of two, so that compiled graphs see few sizes
        self.free: dict[int, list[int]] = {}
        self.counters: dict[torch.device, torch.Tensor] = {}  # by device, read where compiled code cannot enter `arena`

    def take(self, size: int) -> int:
        """First slot of a fresh run."""
        if self.free.get(size):
            start = self.free[size].pop()
            for state in ARENAS:
                forget(state, start, size)
            return start
        start, self.count = self.count, self.count + size
        while self.capacity < self.count:
            self.capacity *= 2
        return start

    def give_back(self, start: int, size: int) -> None:
        """Let another module have the run. Touches no device memory: finalizers run at any moment."""
        self.free.setdefault(size, []).append(start)

    def use_on(self, device: torch.device) -> None:
        """From now on every outermost autocast takes a snapshot of the scales on this device."""
        if device.type != "meta" and device not in self.counters:
            self.counters[device] = arena(device).counter


SLOTS = _Slots()


def forget(state: Arena, start: int, size: int) -> None:
    """Reset a run of slots to its first state: scale 1, no history."""
    columns = slice(start, start + size)
    state.amax[columns] = UNTOUCHED
    state.scale[columns] = 1
    state.position[columns] = 0
    state.history[:, columns] = 0


class SlotRange:
    """The slots of one module: five a GEMM (input, weight, output, grad_output, grad_input)."""

    def __init__(self, gemms: int, device: torch.device) -> None:
        self.size = gemms * SLOTS_PER_GEMM
        self.start = SLOTS.take(self.size)
        weakref.finalize(self, SLOTS.give_back, self.start, self.size)

    @property
    def end(self) -> int:
        """One past the last slot."""
        return self.start + self.size

    def indices(self, device: torch.device) -> torch.Tensor:
        """i32 [size], what ops look the scales up with."""
        if device.type != "cpu" or not torch.cuda.is_available():  # where there is a GPU, layers only pass through the CPU
            SLOTS.use_on(with_index(device))
        return torch.arange(self.start, self.start + self.size, dtype=torch.int32, device=device)

    def reset(self, device: torch.device) -> None:
        """Back to the first state: scale 1, no history."""
        state = arena(with_index(device))
        if self.start < state.capacity:
            forget(state, self.start, self.size)

    def export(self, device: torch.device) -> torch.Tensor | None:
        """f32 [2 + steps, size]: scales, pending amaxes, then the history from oldest to newest; None where nothing was
        recorded.
        """
        state = arena(with_index(device))
        if self.start >= state.capacity:
            return None
        columns = slice(self.start, self.start + self.size)
        filled = state.position[columns].clamp(max=state.history.shape[0])
        lengths = [TENANTS[owner].recipe.amax_history_len for owner in state.owner[columns].unique().tolist() if owner >= 0]
        steps = min(int(filled.max()), max(lengths, default=state.history.shape[0]))  # no recipe looks further back
        if steps == 0 and bool((state.amax[columns] == UNTOUCHED).all()):
            return None
        # Newest entries last; UNTOUCHED stands above those of slots that took fewer steps.
        rows = torch.arange(steps, device=filled.device)[:, None] - (steps - filled)
        history = torch.where(rows >= 0, state.chronological()[:, columns].gather(0, rows.clamp(min=0)), UNTOUCHED)
        return torch.cat((state.scale[None, columns], state.amax[None, columns], history))

    def restore(self, saved: torch.Tensor, device: torch.device) -> None:
        """Take over what `export` gave."""
        if saved.dtype != torch.float32 or saved.dim() != 2 or saved.shape[0] < 2 or saved.shape[1] != self.size:
            raise ValueError(
                f"scaling state must be float32 of shape [2 + steps, {self.size}], got {saved.dtype} {list(saved.shape)}"
            )
        state = arena(with_index(device))
        saved = saved.to(state.scale.device)
        steps = saved.shape[0] - 2
        state.reserve(SLOTS.capacity, max(steps, 1))
        forget(state, self.start, self.size)
        columns = slice(self.start, self.start + self.size)
        state.scale[columns], state.amax[columns], state.owner[columns] = saved[0], saved[1], RESTORED
        history, filled = saved[2:], (saved[2:] != UNTOUCHED).sum(0).int()
        if steps:  # a slot's newest entry is the last row; in the ring its oldest goes first
            rows = torch.arange(steps, device=filled.device)[:, None]
            entries = history.gather(0, (rows + steps - filled).clamp(max=steps - 1))
            state.history[:steps, columns] = torch.where(rows < filled, entries, 0.0)
        state.position[columns] = filled


@constant_result
def tenant_of(group: Any, *fields: Any) -> int:
    """Number of DelayedScaling(*fields) and a process group, the same for equal ones. A constant to compiled code, whose tracer
    takes constants only as arguments: hence fields, not a recipe.
    """
    return tenant_id(DelayedScaling(*fields), group)
