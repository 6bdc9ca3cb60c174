"""One Transformer layer, forward and backward: who is right, how fast, in how much memory, and how near to the floor."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import overdrive.pytorch as te
from overdrive.bench.competitors import BASELINE, Competitor, competitors
from overdrive.bench.observe import peak_memory, relative, worst
from overdrive.bench.outcome import Outcome, selected
from overdrive.bench.plain import EagerLayer, Spec
from overdrive.bench.timing import Protocol, first_backward, measure, reason, sets_beyond_cache, timed
from overdrive.common.recipe import Recipe
from overdrive.ops.gemm import gemm
from overdrive.ops.quantize import Mode, padded

WITHIN = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.05}
WITHIN_FP8 = 0.2
"""The largest relative error of an output or gradient that rounding explains: one that forgets anything is off by about one."""

STEPS_A_VISIT = 3
NOT_INSTALLED = "not installed"
SLOW_ON_CPU = "compiles for longer than all else takes on a CPU, so it runs there only where --only names it"


class WrongError(RuntimeError):
    """A competitor computes something else than the layer."""


class Exact(NamedTuple):
    """Output, gradient of the input and of each parameter in float32."""

    output: Tensor
    input_grad: Tensor
    parameter_grads: list[Tensor]


class Entry(NamedTuple):
    """A competitor that is right: the errors of its output and of its worst gradient."""

    name: str
    module: nn.Module
    fp8: bool
    output_error: float
    gradient_error: float


class Case:
    """The eager layer, whose parameters everyone uses, and inputs and output gradients that rotate."""

    def __init__(self, spec: Spec, protocol: Protocol) -> None:
        self.spec, self.device = spec, protocol.device
        torch.manual_seed(protocol.seed)
        self.eager = EagerLayer(spec, self.device)
        with torch.no_grad():  # as after training: a gain of one and a bias of nothing would hide those that are not applied
            for norm in (self.eager.ln1, self.eager.ln2):
                for parameter in norm.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        shape = (spec.sequence, spec.batch, spec.hidden)
        size = spec.tokens * spec.hidden * spec.dtype.itemsize
        count = sets_beyond_cache(size, self.device)
        self.inputs = [torch.randn(shape, device=self.device, dtype=spec.dtype, requires_grad=True) for _ in range(count)]
        self.output_grads = [torch.randn(shape, device=self.device, dtype=spec.dtype) for _ in range(count)]
        self.parameters = list(self.eager.parameters())

    def clear(self) -> None:
        """Forget all gradients."""
        for leaf in (*self.inputs, *self.parameters):
            leaf.grad = None

    def step(self, module: nn.Module, number: int = 0) -> Tensor:
        """One forward and backward with the input of that number; gradients of the step before are dropped."""
        index = number % len(self.inputs)
        self.inputs[index].grad = None
        for parameter in self.parameters:
            parameter.grad = None
        y = module(self.inputs[index])
        y.backward(self.output_grads[index])
        return y

    def exact(self) -> Exact:
        """What the layer has to return for the first input, without dropout."""
        layer = EagerLayer(dataclasses.replace(self.spec, dtype=torch.float32, dropout=0.0), self.device)
        layer.load_state_dict(self.eager.state_dict())
        x = self.inputs[0].detach().float().requires_grad_()
        y = layer(x)
        with first_backward():
            y.backward(self.output_grads[0].float())
        return Exact(y.detach(), gradient(x), [gradient(p) for p in layer.parameters()])

    def errors(self, module: nn.Module, exact: Exact) -> tuple[float, float]:
        """Relative errors of output and worst gradient; dropout is off."""
        dropped = self.spec.dropout > 0
        if dropped:
            module.eval()
        y = self.inputs[0]
        for _ in range(3):  # delayed scaling has no scales before its first step
            y = self.step(module)
        if dropped:
            module.train()
        pairs = [(gradient(p), want) for p, want in zip(self.parameters, exact.parameter_grads)]
        pairs.append((gradient(self.inputs[0]), exact.input_grad))
        found = relative(y.detach(), exact.output), worst(relative(got, want) for got, want in pairs)
        self.clear()
        return found

    def peak_GiB(self, module: nn.Module) -> float:
        """The most that a forward and backward holds above parameters, gradients and inputs."""

        def step() -> None:  # into the gradients that are there
            module(self.inputs[0]).backward(self.output_grads[0])

        step()
        peak = peak_memory(step, self.device)
        self.clear()
        return peak / 2**30


def gradient(leaf: Tensor) -> Tensor:
    """The gradient that backward left."""
    if leaf.grad is None:
        raise WrongError("a parameter has no gradient: it is not used")
    return leaf.grad


def admit(case: Case, wanted: list[Competitor], protocol: Protocol, phase: str = "checking") -> tuple[list[Entry], dict[str, str]]:
    """(those that are right, why the others are left out)."""
    exact, entries, skipped = case.exact(), [], {}
    for count, competitor in enumerate(wanted):
        protocol.tick(f"{phase}: {competitor.name}", count, len(wanted))
        limit = WITHIN_FP8 if competitor.fp8 else WITHIN[case.spec.dtype]
        try:
            module = competitor.build(case.eager)
            errors = case.errors(module, exact)
            if not worst(errors) <= limit:  # NaN is not either
                raise WrongError(f"errors of output and worst gradient are {errors[0]:.2g} and {errors[1]:.2g}, above {limit:g}")
            entries.append(Entry(competitor.name, module, competitor.fp8, *errors))
        except Exception as error:  # whatever a competitor raises, the others go on
            skipped[competitor.name] = reason(error)
    case.clear()
    return entries, skipped


def contenders(
    spec: Spec, protocol: Protocol, recipes: Mapping[str, Recipe], only: Sequence[str]
) -> tuple[list[Competitor], dict[str, str]]:
    """(the baseline and those of the others that `only` lets through, why others are left out)."""
    everyone = competitors(spec, protocol.device, recipes)
    names = {BASELINE, *selected((each.name for each in everyone), only)}
    wanted = [each for each in everyone if each.name in names]
    skipped = {each.package: NOT_INSTALLED for each in wanted if each.package and each.missing}
    if protocol.device.type == "cpu" and not only:
        skipped |= {each.name: SLOW_ON_CPU for each in wanted if each.compiled and not each.missing}
    return [each for each in wanted if not {each.name, each.package} & skipped.keys()], skipped


def gemm_operands(spec: Spec, device: torch.device, fp8: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """(a, b) of each product a @ b.T that a step has to do: output, input gradient and weight gradient of four linears.

    FP8 contracts over a padded number of tokens.
    """
    made: dict[Any, Tensor] = {}

    def operand(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
        if (rows, cols, dtype) not in made:
            values = torch.randn(rows, cols, device=device, dtype=spec.dtype)
            made[rows, cols, dtype] = (values * 64).to(dtype) if fp8 else values
        return made[rows, cols, dtype]

    for index, (m, n, k) in enumerate(spec.gemms):
        k = padded(k) if fp8 else k
        left = torch.float8_e4m3fn if index % 3 == 0 else torch.float8_e5m2  # an output, then two products of its gradient
        yield operand(m, k, left if fp8 else spec.dtype), operand(n, k, torch.float8_e4m3fn if fp8 else spec.dtype)


def bare_gemms(spec: Spec, device: torch.device, fp8: bool) -> Callable[[int], object]:
    """Run the GEMMs of a step and nothing else."""
    operands, one = list(gemm_operands(spec, device, fp8)), torch.ones(1, device=device)
    how: tuple[Any, ...] = (one, one, None, spec.dtype, Mode.CURRENT, Mode.CURRENT, False)
    if not fp8:
        how = (None, None, None, spec.dtype, Mode.PLAIN, Mode.PLAIN, False)

    def run(_: int) -> None:
        for a, b in operands:
            gemm(a, b, *how)

    return run


def bare_attention(spec: Spec, device: torch.device) -> Callable[[int], object]:
    """Run the attention of a step, forward and backward, by the backend that is best here, and nothing else."""
    attention = te.DotProductAttention(
        spec.heads,
        spec.head_dim,
        num_gqa_groups=spec.kv_heads,
        attention_dropout=spec.dropout,
        attn_mask_type="causal" if spec.causal else "no_mask",
    )
    heads = (spec.heads, spec.kv_heads, spec.kv_heads)
    shapes = [(spec.sequence, spec.batch, count, spec.head_dim) for count in heads]
    qkv = [torch.randn(shape, device=device, dtype=spec.dtype, requires_grad=True) for shape in shapes]
    dy = torch.randn(spec.sequence, spec.batch, spec.hidden, device=device, dtype=spec.dtype)
    return lambda _: torch.autograd.grad(attention(*qkv), qkv, dy)


def layer(spec: Spec, protocol: Protocol, recipes: Mapping[str, Recipe], only: Sequence[str] = ()) -> Outcome:
    """Time, memory and errors of everyone, and the floors: the bare GEMMs in FP8 or `spec.dtype`, and the bare attention."""
    wanted, skipped = contenders(spec, protocol, recipes, only)
    case, device = Case(spec, protocol), protocol.device
    entries, wrong = admit(case, wanted, protocol)
    peaks = {entry.name: case.peak_GiB(entry.module) for entry in entries}
    runs: dict[str, Callable[[int], object]] = {
        "GEMMs FP8": bare_gemms(spec, device, fp8=True),
        "GEMMs": bare_gemms(spec, device, fp8=False),
        "attention": bare_attention(spec, device),
    }
    for entry in entries:
        runs[entry.name] = lambda number, module=entry.module: case.step(module, number)
    times, failed = measure({name: timed(run, device, STEPS_A_VISIT) for name, run in runs.items()}, protocol)
    skipped |= {**wrong, **failed}
    base = times[BASELINE]["ms"].median if BASELINE in times else None
    rows = []
    for entry in entries:
        if entry.name not in times:
            continue
        ms = times[entry.name]["ms"]
        rows.append(
            {
                "variant": entry.name,
                "ms": ms.median,
                "spread_ms": ms.width,
                "ratio": ms.median / base if base else None,
                "tflops": spec.flops / ms.median / 1e9,
                "peak_GiB": peaks[entry.name],
                "error_output": entry.output_error,
                "error_gradients": entry.gradient_error,
            }
        )
    for name, gemms in (("floor", "GEMMs"), ("floor FP8", "GEMMs FP8")):
        if gemms in times and "attention" in times:
            parts = {"gemm_ms": times[gemms]["ms"].median, "attention_ms": times["attention"]["ms"].median}
            ms = sum(parts.values())
            rows.append({"variant": name, "ms": ms, "ratio": ms / base if base else None, "tflops": spec.flops / ms / 1e9, **parts})
    return Outcome(rows, skipped)


def memory(spec: Spec, protocol: Protocol, recipes: Mapping[str, Recipe], only: Sequence[str] = ()) -> Outcome:
    """Peak memory of everyone."""
    wanted, skipped = contenders(spec, protocol, recipes, only)
    case = Case(spec, protocol)
    entries, wrong = admit(case, wanted, protocol)
    peaks = {entry.name: case.peak_GiB(entry.module) for entry in entries}
    base = peaks.get(BASELINE)
    rows = [{"variant": name, "peak_GiB": peak, "ratio": peak / base if base else None} for name, peak in peaks.items()]
    return Outcome(rows, {**skipped, **wrong})


def scaled(spec: Spec, axis: str, point: int) -> Spec:
    """The layer at another number of tokens, or at another hidden size in the same proportions.

    Fewer tokens than a sequence has make a shorter sequence, more a larger batch. Raises ValueError where that does not come out
    even.
    """
    if axis == "tokens":
        sequence = min(spec.sequence, point)
        if point % sequence:
            raise ValueError(f"{point} tokens are no multiple of the sequence length {sequence}")
        return dataclasses.replace(spec, sequence=sequence, batch=point // sequence)
    heads, uneven = divmod(point, spec.head_dim)
    groups, ungrouped = divmod(heads * spec.kv_heads, spec.heads)
    if uneven or ungrouped or point * spec.ffn % spec.hidden:
        raise ValueError(
            f"hidden size {point} cannot have the proportions of hidden {spec.hidden}, ffn {spec.ffn}, {spec.heads} heads in "
            f"{spec.kv_heads} groups"
        )
    return dataclasses.replace(spec, hidden=point, ffn=point * spec.ffn // spec.hidden, heads=heads, groups=groups)


Measure = Callable[[Spec, Protocol, Mapping[str, Recipe], Sequence[str]], Outcome]


def scaling(
    measure: Measure, specs: Sequence[Spec], axis: str, protocol: Protocol, recipes: Mapping[str, Recipe], only: Sequence[str]
) -> Outcome:
    """What `measure` finds at each of `specs`; rows carry their number of tokens and hidden size."""
    outcome = Outcome()
    for spec in specs:
        where = f"{axis} {getattr(spec, axis)}"
        found = measure(spec, protocol.within(where), recipes, only)
        outcome.rows += [{"tokens": spec.tokens, "hidden": spec.hidden, **row} for row in found.rows]
        everywhere = (NOT_INSTALLED, SLOW_ON_CPU)
        outcome.skipped |= {name if why in everywhere else f"{where}, {name}": why for name, why in found.skipped.items()}
        torch.compiler.reset()  # or the compiler gives up after the eighth size
        gc.collect()
        if protocol.device.type == "cuda":
            torch.cuda.empty_cache()
    return outcome
