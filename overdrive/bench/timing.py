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


def timed(run: Callable[[int], object], device: torch.device, repeats: int) -> Visit:
    """Visits that time `run` over `repeats` calls, on a CPU over one, after one that does not count.

    run: takes a number that grows by one from call to call, to choose its input with. Each visit gives "ms", the device's time,
    and "host_us", the time until the call returns, which on a GPU is what it costs to enqueue.
    """
    numbers = itertools.count()
    repeats = repeats if device.type == "cuda" else 1

    def visit() -> dict[str, float]:
        run(next(numbers))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2)) if device.type == "cuda" else (None, None)
        began = time.perf_counter()
        if start:
            start.record()
        for _ in range(repeats):
            run(next(numbers))
        host = (time.perf_counter() - began) / repeats
        if not start or not end:
            return {"ms": host * 1e3, "host_us": host * 1e6}
        end.record()
        torch.cuda.synchronize(device)
        return {"ms": start.elapsed_time(end) / repeats, "host_us": host * 1e6}

    return visit


def sets_beyond_cache(size: int, device: torch.device) -> int:
    """How many inputs of `size` bytes to rotate, so that none is still in the L2 cache when its turn comes: twice its size."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return max(2, math.ceil(2 * cache / size))


@contextlib.contextmanager
def first_backward() -> Iterator[None]:
    """Hide torch's warning that its backward thread was the first to meet cuBLAS: it then sets the thread up itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attempting to run cuBLAS", UserWarning)
        yield
