"""Attention by every backend that can run the case."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import overdrive.pytorch as te
from overdrive.bench.observe import relative, worst
from overdrive.bench.outcome import Outcome, selected
from overdrive.bench.plain import Spec
from overdrive.bench.timing import Protocol, first_backward, measure, reason, sets_beyond_cache, timed
from overdrive.functional.attention_backends import BACKENDS, VARIABLE

WITHIN = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.02}
CALLS_A_VISIT = 5


@contextlib.contextmanager
def forced(backend: str) -> Iterator[None]:
    """Let every attention run on one backend."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = backend
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


class Case:
    """Queries, keys, values [S, B, H or G, D] and output gradients that rotate."""

    def __init__(self, spec: Spec, protocol: Protocol) -> None:
        self.spec, device = spec, protocol.device
        torch.manual_seed(protocol.seed)
        mask = "causal" if spec.causal else "no_mask"
        self.module = te.DotProductAttention(
            spec.heads, spec.head_dim, num_gqa_groups=spec.kv_heads, attention_dropout=spec.dropout, attn_mask_type=mask
        )
        heads = (spec.heads, spec.kv_heads, spec.kv_heads)
        shapes = [(spec.sequence, spec.batch, count, spec.head_dim) for count in heads]
        count = sets_beyond_cache(3 * spec.tokens * spec.hidden * spec.dtype.itemsize, device)
        self.inputs = [
            [torch.randn(shape, device=device, dtype=spec.dtype, requires_grad=True) for shape in shapes] for _ in range(count)
        ]
        self.output_grads = [
            torch.randn(spec.sequence, spec.batch, spec.hidden, device=device, dtype=spec.dtype) for _ in range(count)
        ]

    def exact(self) -> list[Tensor]:
        """Output and gradients in float32 for the first input, without dropout."""
        leaves = [t.detach().float().requires_grad_() for t in self.inputs[0]]
        repeats = self.spec.heads // self.spec.kv_heads
        q, k, v = (t.repeat_interleave(n, 2).permute(1, 2, 0, 3) for t, n in zip(leaves, (1, repeats, repeats)))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.spec.causal).permute(2, 0, 1, 3).flatten(2)
        with first_backward():
            return [y.detach(), *torch.autograd.grad(y, leaves, self.output_grads[0].float())]

    def error(self, exact: list[Tensor]) -> float:
        """The worst relative error of the backend that is forced."""
        self.module.eval()
        y = self.module(*self.inputs[0])
        gradients = torch.autograd.grad(y, self.inputs[0], self.output_grads[0])
        self.module.train()
        return worst(relative(got.detach(), want) for got, want in zip((y, *gradients), exact))

    def refusal(self, backend: str) -> str:
        """Why a backend does not run these tensors, or ""."""
        passed_over = self.module.explain(*self.inputs[0]).passed_over
        with forced(backend):
            try:
                decision = self.module.explain(*self.inputs[0])
            except ValueError:  # forced to what it cannot do
                return passed_over[backend]
        return "" if decision.backend == backend else decision.passed_over[backend]

    def runs(self, backend: str) -> dict[str, Callable[[int], object]]:
        """Forward, and backward of outputs computed beforehand."""

        def forward(number: int) -> Tensor:
            with forced(backend):
                return self.module(*self.inputs[number % len(self.inputs)])

        outputs = [forward(number) for number in range(len(self.inputs))]

        def backward(number: int) -> object:
            index = number % len(outputs)
            return torch.autograd.grad(outputs[index], self.inputs[index], self.output_grads[index], retain_graph=True)

        return {"forward": forward, "backward": backward}


def attention(spec: Spec, protocol: Protocol, only: Sequence[str] = ()) -> Outcome:
    """Time and TFLOP/s of each backend, and which one is chosen where nobody forces one."""
    outcome, names = Outcome(), selected((backend.name for backend in BACKENDS), only)
    case = Case(spec, protocol)
    exact, chosen = case.exact(), case.module.explain(*case.inputs[0]).backend
    runs: dict[str, Callable[[int], object]] = {}
    errors: dict[str, float] = {}
    for count, name in enumerate(names):
        protocol.tick(f"checking: {name}", count, len(names))
        if why := case.refusal(name):
            outcome.skipped[name] = why
            continue
        try:
            with forced(name):
                errors[name] = case.error(exact)
            if not errors[name] <= WITHIN[spec.dtype]:
                raise ArithmeticError(f"the worst error is {errors[name]:.2g}, above {WITHIN[spec.dtype]:g}")
            runs |= {f"{name} {way}": run for way, run in case.runs(name).items()}
        except Exception as error:
            outcome.skipped[name] = reason(error)
    times, failed = measure({name: timed(run, protocol.device, CALLS_A_VISIT, alone=True) for name, run in runs.items()}, protocol)
    outcome.skipped |= failed
    for name in names:
        row: dict[str, Any] = {"variant": name, "chosen": name == chosen, "error": errors.get(name)}
        for way, flops in zip(("forward", "backward"), spec.attention_flops):
            if f"{name} {way}" in times:
                ms = times[f"{name} {way}"]["ms"]
                row |= {f"{way}_ms": ms.median, f"{way}_spread_ms": ms.width, f"{way}_tflops": flops / ms.median / 1e9}
        if len(row) > 3:
            outcome.rows.append(row)
    return outcome
