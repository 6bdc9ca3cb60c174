"""Matrix products of given shapes: torch.mm, and overdrive's GEMM in high precision and in FP8."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from overdrive.bench.formats import MODES, Formats
from overdrive.bench.observe import relative
from overdrive.bench.outcome import Outcome
from overdrive.bench.timing import Protocol, measure, reason, sets_beyond_cache, timed
from overdrive.ops.gemm import gemm as product
from overdrive.ops.quantize import Mode, quantize

BASELINE = "torch.mm"
WITHIN = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.01}
WITHIN_FP8 = 0.06
PRODUCTS_A_VISIT = 10

Prepare = Callable[[Tensor, Tensor], Callable[[], Tensor]]
"""(x [M, K], w [N, K]) -> what computes x @ w.T; FP8 operands are quantized at once."""


def variants(dtype: torch.dtype, recipes: Sequence[str], formats: Formats) -> dict[str, Prepare]:
    """Every way to a product."""

    def plain(x: Tensor, w: Tensor) -> Callable[[], Tensor]:
        return partial(product, x, w, None, None, None, dtype, Mode.PLAIN, Mode.PLAIN, False)

    def in_fp8(mode_x: Mode, mode_w: Mode, x: Tensor, w: Tensor) -> Callable[[], Tensor]:
        (a, _, scale_a, *_), (b, _, scale_b, *_) = (
            quantize(t, False, *formats(mode, transposed=False)) for t, mode in ((x, mode_x), (w, mode_w))
        )
        rows = x.shape[0]  # quantized data is padded
        run = partial(product, a, b, scale_a, scale_b, None, dtype, mode_x, mode_w, False)
        return run if a.shape[0] == rows else lambda: run()[:rows]

    found: dict[str, Any] = {BASELINE: lambda x, w: partial(torch.mm, x, w.t()), "overdrive": plain}
    for recipe in recipes:
        modes = list(MODES[recipe].values())
        found[f"overdrive {recipe}"] = partial(in_fp8, modes[0], modes[-1])
    return found


def gemm(shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype, recipes: Sequence[str], protocol: Protocol) -> Outcome:
    """TFLOP/s and error of [M, K] @ [K, N] for each (M, N, K); FP8 operands are quantized before the clock starts."""
    outcome, device, formats = Outcome(), protocol.device, Formats(protocol.device)
    torch.manual_seed(protocol.seed)
    for m, n, k in shapes:
        label = f"{m}x{n}x{k}"
        heard = protocol.within(label)
        count = sets_beyond_cache(m * k + n * k, device)  # bytes of the smallest operands, FP8's
        operands = [[torch.randn(rows, k, device=device).to(dtype) for rows in (m, n)] for _ in range(count)]
        x, w = operands[0]
        want = x.float() @ w.float().t()
        runs, errors = {}, {}
        prepared = variants(dtype, recipes, formats)
        for name, prepare in prepared.items():
            heard.tick(f"checking: {name}", len(errors), len(prepared))
            try:
                sets = [prepare(x, w) for x, w in operands]
                errors[name] = relative(sets[0](), want)
                limit = WITHIN[dtype] if name in (BASELINE, "overdrive") else WITHIN_FP8
                if not errors[name] <= limit:
                    raise ArithmeticError(f"the error is {errors[name]:.2g}, above {limit:g}")
                runs[name] = lambda number, sets=sets: sets[number % len(sets)]()
            except Exception as error:
                outcome.skipped[f"{label}, {name}"] = reason(error)
        times, failed = measure({name: timed(run, device, PRODUCTS_A_VISIT, alone=True) for name, run in runs.items()}, heard)
        outcome.skipped |= {f"{label}, {name}": why for name, why in failed.items()}
        base = times[BASELINE]["ms"].median if BASELINE in times else None
        for name, found in times.items():
            ms = found["ms"]
            row = {"variant": name, "ms": ms.median, "spread_ms": ms.width, "tflops": 2 * m * n * k / ms.median / 1e9}
            ratio = ms.median / base if base else None
            outcome.rows.append({"m": m, "n": n, "k": k, **row, "ratio": ratio, "error": errors[name]})
    return outcome
