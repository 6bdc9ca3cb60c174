"""What is seen of a run besides its time: errors, memory, launches, allocations."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def relative(got: Tensor, want: Tensor) -> float:
    """Frobenius norm of the difference over that of what was wanted."""
    return ((got.float() - want).norm() / want.norm()).item()


def worst(errors: Iterable[float]) -> float:
    """The largest error; NaN where there is one."""
    return max(errors, key=lambda error: (math.isnan(error), error))


def peak_memory(step: Callable[[], object], device: torch.device) -> int:
    """The most bytes that torch's allocator held at once during `step`, above what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    # The CPU allocator keeps no peak, but reports every allocation to the profiler.
    with quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as p:
        step()
    recorded = p.profiler and p.profiler.kineto_results
    assert recorded, "the profiler has run"
    events: list[Any] = [e for e in recorded.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def launches(step: Callable[[], object], device: torch.device) -> int:
    """Kernels, copies and fills that one `step` runs on a GPU."""
    torch.cuda.synchronize(device)
    with quiet_stderr(), profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as p:
        step()
        torch.cuda.synchronize(device)
    events: list[Any] = list(p.events() or [])
    return sum(event.device_type == DeviceType.CUDA and not event.is_user_annotation for event in events)


def allocations(step: Callable[[], object], device: torch.device) -> int:
    """How often one `step` asks the GPU's allocator for memory."""
    before = torch.cuda.memory_stats(device)["allocation.all.allocated"]
    step()
    return torch.cuda.memory_stats(device)["allocation.all.allocated"] - before


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Send file descriptor 2 to nowhere: the profiler's start and stop messages come from C++."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
