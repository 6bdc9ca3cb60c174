"""What a layer costs the host: time to enqueue, launches, allocations; and the same layer as a CUDA graph.

A layer so small that the GPU waits for the host shows it best.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from overdrive.bench.competitors import BASELINE, Competitor
from overdrive.bench.layer import Case, Entry, admit, contenders
from overdrive.bench.observe import allocations, launches
from overdrive.bench.outcome import Outcome
from overdrive.bench.plain import EagerLayer, Spec
from overdrive.bench.timing import Protocol, Visit, measure, timed
from overdrive.common.recipe import Recipe
from overdrive.modules.graphs import make_graphed_callables

STEPS_A_VISIT = 10
AS_GRAPH = " as a CUDA graph"
NEEDS_GPU = "launches, allocations and CUDA graphs need a GPU; on a CPU the times are those of the arithmetic"


def enqueued(case: Case, module: nn.Module) -> Visit:
    """Visits that take the median time until forward and backward return, each step from an idle GPU."""

    def visit() -> dict[str, float]:
        forward, backward = [], []
        for number in range(STEPS_A_VISIT):
            index = number % len(case.inputs)
            case.clear()
            if case.device.type == "cuda":
                torch.cuda.synchronize(case.device)
            began = time.perf_counter()
            y = module(case.inputs[index])
            between = time.perf_counter()
            y.backward(case.output_grads[index])
            backward.append(time.perf_counter() - between)
            forward.append(between - began)
        found = {"forward_us": statistics.median(forward) * 1e6, "backward_us": statistics.median(backward) * 1e6}
        return {**found, "us": found["forward_us"] + found["backward_us"]}

    return visit


class Alone(nn.Module):
    """A module to be graphed, which changes it: its own `forward` stays as it was."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """What the module makes of x."""
        return self.module(x)


def graphed(case: Case, entry: Entry) -> Competitor:
    """An entry captured as CUDA graphs, one forward and one backward, all by the function that costs the host least."""

    def capture(_: EagerLayer) -> nn.Module:
        return make_graphed_callables(Alone(entry.module), (case.inputs[0],))

    return Competitor(f"{entry.name}{AS_GRAPH}", capture, fp8=entry.fp8)


def graph_times(case: Case, entries: list[Entry], protocol: Protocol) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """(ms of a step of each entry as CUDA graphs, with the host and on the GPU alone; why others are left out)."""
    captured, wrong = admit(case, [graphed(case, entry) for entry in entries], protocol, "capturing")
    steps = {entry.name: partial(case.step, entry.module) for entry in captured}
    found, failed = measure({name: timed(step, case.device, STEPS_A_VISIT) for name, step in steps.items()}, protocol)
    alone = {name: timed(steps[name], case.device, STEPS_A_VISIT, alone=True) for name in found}
    found_alone, failed_alone = measure(alone, protocol)
    both = {
        name.removesuffix(AS_GRAPH): {"graph_ms": found[name]["ms"].median, "graph_gpu_ms": times["ms"].median}
        for name, times in found_alone.items()
    }
    return both, {**wrong, **failed, **failed_alone}


def host(spec: Spec, protocol: Protocol, recipes: Mapping[str, Recipe], only: Sequence[str] = ()) -> Outcome:
    """Microseconds to enqueue forward and backward; on a GPU also launches and allocations of a step, and ms of a graphed one."""
    wanted, skipped = contenders(spec, protocol, recipes, only)
    case = Case(spec, protocol)
    entries, wrong = admit(case, wanted, protocol)
    found, failed = measure({entry.name: enqueued(case, entry.module) for entry in entries}, protocol)
    skipped |= {**wrong, **failed}
    rows: dict[str, dict[str, Any]] = {}
    base = found[BASELINE]["us"].median if BASELINE in found else None
    for name, times in found.items():
        us = times["us"]
        ratio = us.median / base if base else None
        rows[name] = {"variant": name, "us": us.median, "spread_us": us.width, "ratio": ratio}
        rows[name] |= {key: times[key].median for key in ("forward_us", "backward_us")}
    if protocol.device.type != "cuda":
        return Outcome(list(rows.values()), {**skipped, "on this device": NEEDS_GPU})
    entries = [entry for entry in entries if entry.name in rows]
    for entry in entries:
        step = partial(case.step, entry.module)
        rows[entry.name] |= {"launches": launches(step, case.device), "allocations": allocations(step, case.device)}
    times, failed = graph_times(case, entries, protocol)
    for name, found in times.items():
        rows[name] |= found
    return Outcome(list(rows.values()), {**skipped, **failed})
