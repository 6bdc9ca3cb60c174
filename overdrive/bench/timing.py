"""How things are timed: rounds that visit everything in random order, over inputs that the cache cannot hold.

A GPU is limited by its power, so what runs after something hungry is slower: in a fixed order the order would be measured.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

CYCLES_PER_SECOND = 2e9
"""Of a GPU that sleeps; where its clock is slower, it sleeps longer than it has to."""

HOST_BOUND = 1.2
"""The GPU's time over the host's under which the GPU may have waited."""

MOST_SETS = 128

Visit = Callable[[], Mapping[str, float]]
"""One visit: a sample of each thing it measures."""


def unheard(what: str, done: int, total: int) -> None:
    """A Protocol's `tick` where nobody watches."""


@dataclass(frozen=True)
class Protocol:
    """How to measure: `rounds` that count after `warmup` that do not; `tick` hears (what, done, total)."""

    device: torch.device
    rounds: int
    warmup: int = 3
    seed: int = 0
    tick: Callable[[str, int, int], None] = unheard

    def within(self, where: str) -> Protocol:
        """The same, its ticks said to be of `where`."""
        return replace(self, tick=lambda what, done, total: self.tick(f"{where}: {what}", done, total))


class Spread(NamedTuple):
    """The median of samples and its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: list[float]) -> Spread:
        """Of at least one sample."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high)

    @property
    def width(self) -> float:
        """The range of the middle half."""
        return self.high - self.low


def reason(error: Exception) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def measure(visits: Mapping[str, Visit], protocol: Protocol) -> tuple[dict[str, dict[str, Spread]], dict[str, str]]:
    """(spreads of what each visit measures, why the others failed)."""
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in visits}
    failed: dict[str, str] = {}
    draw = random.Random(protocol.seed)
    total = protocol.warmup + protocol.rounds
    for count in range(total):
        protocol.tick("timing", count, total)
        alive = [name for name in visits if name not in failed]
        for name in draw.sample(alive, len(alive)):
            try:
                found = visits[name]()
            except Exception as error:  # whatever a competitor raises, the others go on
                failed[name] = reason(error)
                continue
            if count >= protocol.warmup:
                for key, sample in found.items():
                    samples[name].setdefault(key, []).append(sample)
    spreads = {name: {key: Spread.of(each) for key, each in found.items()} for name, found in samples.items()}
    return {name: found for name, found in spreads.items() if name not in failed}, failed


def timed(run: Callable[[int], object], device: torch.device, repeats: int, alone: bool = False) -> Visit:
    """Visits that time `run` over `repeats` calls, on a CPU over one, after one that does not count.

    run: takes a number that grows by one from call to call, to choose its input with. Each visit gives "ms", the device's time,
    and "host_us", the time until the call returns, which on a GPU is what it costs to enqueue. alone: where the host is the
    slower of the two, let the GPU sleep until everything is enqueued, so that "ms" is the GPU's own time.
    """
    numbers = itertools.count()
    if device.type != "cuda":
        return lambda: _on_cpu(run, numbers)
    asleep = 0.0  # seconds

    def visit() -> dict[str, float]:
        nonlocal asleep
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run(next(numbers))
        if asleep:
            torch.cuda._sleep(int(asleep * CYCLES_PER_SECOND))
        start.record()
        began = time.perf_counter()
        for _ in range(repeats):
            run(next(numbers))
        host = time.perf_counter() - began
        end.record()
        torch.cuda.synchronize(device)
        milliseconds = start.elapsed_time(end)
        if alone and milliseconds < HOST_BOUND * host * 1e3:
            asleep = max(asleep, 2 * host)
        return {"ms": milliseconds / repeats, "host_us": host * 1e6 / repeats}

    return visit


def _on_cpu(run: Callable[[int], object], numbers: Iterator[int]) -> dict[str, float]:
    run(next(numbers))
    began = time.perf_counter()
    run(next(numbers))
    elapsed = time.perf_counter() - began
    return {"ms": elapsed * 1e3, "host_us": elapsed * 1e6}


def sets_beyond_cache(size: int, device: torch.device) -> int:
    """How many inputs of `size` bytes to rotate, so that none is still in the L2 cache when its turn comes: twice its size.

    No more than MOST_SETS: what works on so little is not bound by memory.
    """
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return min(max(2, math.ceil(2 * cache / size)), MOST_SETS)


@contextlib.contextmanager
def first_backward() -> Iterator[None]:
    """Hide torch's warning that its backward thread was the first to meet cuBLAS: it then sets the thread up itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attempting to run cuBLAS", UserWarning)
        yield
