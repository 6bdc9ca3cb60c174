"""The quickstart's results as a table and as a chart."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.table import Table

from overdrive.cli.quickstart import Result, Settings

BLUE, ORANGE = "#3b6fb6", "#d9822b"


def describe(settings: Settings) -> str:
    """One line that says what ran."""
    s = settings.size
    dtype, device = str(settings.dtype).removeprefix("torch."), settings.device
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return (
        f"hidden {s.hidden}, ffn {s.ffn}, {s.heads} heads, sequence {s.sequence}, batch {s.batch}, {dtype} on "
        f"{place}, {'causal' if settings.causal else 'no mask'}, dropout {settings.dropout:g}"
    )


def size_of(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def table(settings: Settings, results: list[Result]) -> Table:
    """Time, speed-up, memory and errors, one row a stage."""
    made = Table(title="One Transformer layer, forward + backward", caption=describe(settings))
    made.add_column("Stage", no_wrap=True)
    for heading in ("Time (ms)", "Speed-up", "Peak", "Output", "Gradients"):
        made.add_column(heading, justify="right")
    base = results[0].milliseconds
    for r in results:
        if r.reason:
            made.add_row(r.name, "unusable", *["–"] * 4, style="dim")
            continue
        speed, memory = f"{base / r.milliseconds:.2f}x", size_of(r.peak_bytes)
        errors = (f"{e:.1e}" for e in (r.output_error, r.gradient_error))
        made.add_row(r.name, f"{r.milliseconds:.2f}", speed, memory, *errors)
    return made


def notes(settings: Settings, results: list[Result]) -> list[str]:
    """What the columns mean, and why a stage did not run."""
    on_cpu = [
        "On a CPU every operation runs as its plain PyTorch reference: errors are real, time and memory say nothing of a GPU."
    ]
    return [
        "Time: mean of forward + backward. Speed-up: against the first row. FP8: a TransformerLayer under that recipe.",
        "Peak: the most that torch's allocator held at once during one forward + backward, above what it held before "
        "(parameters, gradients, input).",
        "Output, Gradients: relative error against the plain layer in float32 (Frobenius norm, no dropout); the gradients of "
        "the input and of all parameters count as one vector.",
        "All stages use one set of parameters: each was checked with values written into the plain layer after the sharing.",
        *(on_cpu if settings.device.type == "cpu" else []),
        *(f"{r.name} is not usable here: {r.reason}" for r in results if r.reason),
    ]


def chart(settings: Settings, results: list[Result], path: Path) -> None:
    """Time and peak memory as bars, saved as a PNG."""
    from matplotlib.figure import Figure  # a third of a second that --help need not wait for

    ran = [r for r in results if not r.reason]
    figure = Figure(figsize=(11, 1.6 + 0.42 * len(ran)), layout="constrained")
    figure.suptitle(f"One Transformer layer, forward + backward\n{describe(settings)}", fontsize=10)
    left, right = figure.subplots(1, 2, sharey=True)
    names, base = [r.name for r in ran], ran[0].milliseconds
    times = left.barh(names, [r.milliseconds for r in ran], color=BLUE)
    left.bar_label(times, [f"{r.milliseconds:.2f} ms  ({base / r.milliseconds:.2f}x)" for r in ran], padding=3, fontsize=8)
    memory = right.barh(names, [r.peak_bytes / 2**20 for r in ran], color=ORANGE)
    right.bar_label(memory, [size_of(r.peak_bytes) for r in ran], padding=3, fontsize=8)
    for axes, label, room in ((left, "time (ms)", 1.45), (right, "peak memory (MiB)", 1.25)):
        axes.set_xlabel(label)
        axes.set_xlim(0, axes.get_xlim()[1] / 1.05 * room)
        axes.spines[["top", "right"]].set_visible(False)
    left.invert_yaxis()
    figure.savefig(path, dpi=150, format="png")
