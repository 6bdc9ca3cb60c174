"""LayerNorm + Linear with few tokens and no gradients, as in decoding: torch, norm and product as two kernels, and as one.

    python benchmarks/decode.py [--json out.json --plot out.png]

Microseconds of GPU time a call in a CUDA graph, medians over rounds in random order, and of host time to enqueue a call. Weights
take turns, so that the L2 cache holds none of them. Everything is checked against float32 before it is timed.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

import overdrive.pytorch as te
from overdrive.functional import layernorm_linear as stage
from overdrive.ops.gemm import gemm
from overdrive.ops.norm import norm
from overdrive.ops.norm_gemm import norm_gemm
from overdrive.ops.quantize import Mode, Quantization

DTYPE, EPS = torch.bfloat16, 1e-5
TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512)
OTHERS = ((1024, 3072), (4096, 4096), (4096, 6144), (8192, 10240), (4096, 28672))
FEW = (1, 2, 4, 8, 16, 32)
ROTATED = 700 << 20  # bytes of weights that take turns
Call = Callable[[torch.Tensor], Any]


@triton.jit
def _read(weight, out, B: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    tl.store(out + block, tl.sum(tl.load(weight + block * B + tl.arange(0, B)).to(tl.float32)))


class Case:
    """Parameters of one size, and the variants as functions of the weight."""

    def __init__(self, hidden: int, outputs: int) -> None:
        self.hidden, self.outputs = hidden, outputs
        count = max(-(-ROTATED // (2 * hidden * outputs)), 2)
        self.weights = [torch.randn(outputs, hidden, device="cuda", dtype=DTYPE) * hidden**-0.5 for _ in range(count)]
        self.gamma, self.beta = (torch.randn(hidden, device="cuda", dtype=DTYPE) for _ in range(2))
        self.bias = torch.randn(outputs, device="cuda", dtype=DTYPE)
        self.read_out = torch.empty(hidden * outputs // 4096, device="cuda")

    def x(self, tokens: int) -> torch.Tensor:
        return torch.randn(tokens, self.hidden, device="cuda", dtype=DTYPE) * 2 + 0.5

    def variants(self, x: torch.Tensor) -> dict[str, Call]:
        norm_arguments = (self.gamma, self.beta, EPS, False, False, 0, *Quantization(Mode.PLAIN, DTYPE))

        def two(weight):
            y, *_ = norm(x, *norm_arguments)
            return gemm(y, weight, None, None, self.bias, DTYPE, Mode.PLAIN, Mode.PLAIN, False)

        return {
            "torch": lambda weight: F.linear(F.layer_norm(x, (self.hidden,), self.gamma, self.beta, EPS), weight, self.bias),
            "two kernels": two,
            "one kernel": lambda weight: norm_gemm(x, self.gamma, self.beta, weight, self.bias, EPS, False, False),
        }

    def read(self, weight: torch.Tensor) -> None:
        """The floor: a kernel that does nothing but read the weight."""
        _read[(self.read_out.numel(),)](weight, self.read_out, B=4096, num_warps=4)

    def check(self, x: torch.Tensor) -> dict[str, float]:
        """Relative error of every variant; raises where one is off."""
        exact = F.layer_norm(x.float(), (self.hidden,), self.gamma.float(), self.beta.float(), EPS)
        exact = F.linear(exact, self.weights[0].float(), self.bias.float())
        errors = {}
        for name, call in self.variants(x).items():
            errors[name] = float((call(self.weights[0]).float() - exact).norm() / exact.norm())
            assert errors[name] < 6e-3, (name, tuple(x.shape), errors[name])
        return errors


def graph_of(call: Call, weights: list[torch.Tensor]) -> Callable[[], float]:
    """A function that replays a CUDA graph of `call` with each weight in turn: microseconds a call."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        call(weights[0])
    torch.cuda.synchronize()
    calls = weights * max(16 // len(weights), 1)
    with torch.cuda.graph(graph):
        for weight in calls:
            call(weight)
    graph.replay()

    def measure() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / len(calls) * 1e3

    return measure


def medians(measures: dict[str, Callable[[], float]], rounds: int) -> dict[str, dict[str, float]]:
    times: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name in random.sample(list(measures), len(measures)):
            times[name].append(measures[name]())
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in times.items()}
    return {name: {"us": q[1], "spread_us": q[2] - q[0]} for name, q in quartiles.items()}


def graph_times(case: Case, tokens: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    rows = []
    for count in tokens:
        x = case.x(count)
        errors = case.check(x)
        calls = {**case.variants(x), "reading the weight": case.read}
        times = medians({name: graph_of(call, case.weights) for name, call in calls.items()}, rounds)
        rows.append({"hidden": case.hidden, "outputs": case.outputs, "tokens": count, "times": times, "errors": errors})
        print(f"{case.hidden} -> {case.outputs}, {count:3} tokens: ", end="")
        print(", ".join(f"{name} {time['us']:.2f}" for name, time in times.items()), flush=True)
    return rows


def layer_of(case: Case) -> te.LayerNormLinear:
    """The layer with a case's first weight."""
    layer = te.LayerNormLinear(case.hidden, case.outputs, eps=EPS, params_dtype=DTYPE, device="cuda")
    layer.weight = torch.nn.Parameter(case.weights[0])
    return layer


def eager_calls(case: Case, x: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The variants as eager code calls them, and the layer, in one kernel and made to take two."""
    layer = layer_of(case)
    plain = torch.nn.Sequential(
        torch.nn.LayerNorm(case.hidden, EPS, device="cuda", dtype=DTYPE),
        torch.nn.Linear(case.hidden, case.outputs, device="cuda", dtype=DTYPE),
    )

    def in_two():
        most, stage.ONE_KERNEL_TOKENS = stage.ONE_KERNEL_TOKENS, 0
        layer(x)
        stage.ONE_KERNEL_TOKENS = most

    calls: dict[str, Callable[[], Any]] = {
        name: functools.partial(call, case.weights[0]) for name, call in case.variants(x).items()
    }
    return {**calls, "torch modules": lambda: plain(x), "layer, two kernels": in_two, "layer, one kernel": lambda: layer(x)}


def host_time(call: Callable[[], Any], calls: int = 100) -> float:
    """Microseconds to enqueue a call."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / calls * 1e6


def profile(call: Callable[[], Any]) -> dict[str, Any]:
    """Kernels that one call launches and blocks that it asks of the allocator."""

    def allocations() -> int:
        return torch.cuda.memory_stats()["allocation.all.allocated"]

    call()
    before = allocations()
    call()
    allocated = allocations() - before
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as events:
        call()
        torch.cuda.synchronize()
    kernels = [event.name for event in events.events() or () if event.device_type == torch.autograd.DeviceType.CUDA]
    return {"kernels": kernels, "allocations": allocated}


def plot(path: str, rows: list[dict[str, Any]], others: list[dict[str, Any]], host: dict[str, Any]) -> None:
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 5), width_ratios=(3, 2, 2))
    tokens = [row["tokens"] for row in rows]
    for name, style in {"torch": "C7o-", "two kernels": "C0o-", "one kernel": "C1o-", "reading the weight": "k--"}.items():
        left.plot(tokens, [row["times"][name]["us"] for row in rows], style, label=name)
    most = max(row["times"]["torch"]["us"] for row in rows)
    left.set(xscale="log", xlabel="tokens", ylabel="microseconds", xticks=tokens, ylim=(0, 1.3 * most))
    left.set(title=f"norm + linear {rows[0]['hidden']} -> {rows[0]['outputs']}, bf16, in a CUDA graph")
    left.set_xticks(tokens, [str(count) for count in tokens], rotation=60)
    left.minorticks_off()
    left.legend()
    for size in dict.fromkeys((row["hidden"], row["outputs"]) for row in [*rows, *others]):
        mine = [r for r in [*rows, *others] if (r["hidden"], r["outputs"]) == size and r["tokens"] <= FEW[-1]]
        ratios = [r["times"]["one kernel"]["us"] / r["times"]["two kernels"]["us"] for r in mine]
        middle.plot([r["tokens"] for r in mine], ratios, "o-", label=f"{size[0]} -> {size[1]}")
    middle.axhline(1, color="k", linewidth=0.8)
    middle.set(xscale="log", xlabel="tokens", title="one kernel / two kernels")
    middle.set_xticks(FEW, [str(count) for count in FEW])
    middle.minorticks_off()
    middle.legend()
    names = list(host)
    right.barh(names, [host[name]["us"] for name in names], color="C0")
    right.invert_yaxis()
    right.set(title="host time a call, 1 token", xlabel="microseconds")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--outputs", type=int, default=12288)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json")
    parser.add_argument("--plot")
    a = parser.parse_args()
    torch.manual_seed(0)
    with torch.no_grad():
        case = Case(a.hidden, a.outputs)
        rows = graph_times(case, TOKENS, a.rounds)
        x = case.x(1)
        calls = eager_calls(case, x)
        profiles = {name: profile(call) for name, call in calls.items()}
        for name, result in profiles.items():
            print(f"{name}: {len(result['kernels'])} kernels {result['kernels']}, {result['allocations']} allocations")
        host = medians({name: functools.partial(host_time, call) for name, call in calls.items()}, a.rounds)
        print("host: " + ", ".join(f"{name} {time['us']:.1f}" for name, time in host.items()))
        del case, calls
        others = [row for hidden, outputs in OTHERS for row in graph_times(Case(hidden, outputs), FEW, a.rounds)]
    if a.json:
        about = {
            "command": " ".join(["python", *sys.argv]),
            "date": datetime.date.today().isoformat(),
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "overdrive": te.__version__,
            "arguments": {name: value for name, value in vars(a).items() if name not in ("json", "plot")},
        }
        with open(a.json, "w") as file:
            json.dump({**about, "rows": rows, "other sizes": others, "profiles": profiles, "host": host}, file, indent=1)
    if a.plot:
        plot(a.plot, rows, others, host)


if __name__ == "__main__":
    main()
