"""What `overdrive bench` prints and saves as JSON."""

from __future__ import annotations

import datetime
import json
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from overdrive.bench.outcome import Outcome
from overdrive.cli.doctor import devices, installed, versions


class Column(NamedTuple):
    """A value of each row: its key, heading and format."""

    key: str
    heading: str
    form: str


@dataclass(frozen=True)
class View:
    """How the rows of a command are shown. bars: keys that the bar chart shows and what they are; lines: those over --scale."""

    title: str
    columns: tuple[Column, ...]
    note: str
    bars: dict[str, str]
    lines: dict[str, str] = field(default_factory=dict)

    def form(self, key: str) -> str:
        """The format of a key."""
        return next(column.form for column in self.columns if column.key == key)


VARIANT, ERROR = Column("variant", "Variant", ""), Column("error", "Error", ".1e")
MS, SPREAD, RATIO = Column("ms", "ms", ".3f"), Column("spread_ms", "Spread", ".3f"), Column("ratio", "Of eager", ".2f")
PEAK = Column("peak_GiB", "Peak GiB", ".3f")
ABOUT_ERRORS = "Errors are relative, against the same in float32"
ABOUT_TIMES = "Times are medians over rounds in random order with rotating inputs; spread: between their quartiles."

LAYER = View(
    "One Transformer layer, forward + backward",
    (
        *(VARIANT, MS, SPREAD, RATIO, Column("tflops", "TFLOP/s", ".4g"), PEAK),
        *(Column("error_output", "Error", ".1e"), Column("error_gradients", "of grads", ".1e")),
    ),
    f"{ABOUT_TIMES} Peak: above parameters, gradients and inputs. {ABOUT_ERRORS} and without dropout; the worst of the gradients. "
    "Floor: the layer's bare GEMMs and bare attention, timed in the same rounds.",
    bars={"ms": "ms"},
    lines={"tflops": "TFLOP/s", "ratio": "time, eager = 1"},
)
MEMORY = View(
    "Peak memory of one Transformer layer, forward + backward",
    (VARIANT, PEAK, RATIO),
    "The most that torch's allocator held above parameters, gradients and inputs.",
    bars={"peak_GiB": "GiB"},
    lines={"peak_GiB": "GiB", "ratio": "peak, eager = 1"},
)
HOST = View(
    "What one Transformer layer costs the host, forward + backward",
    (
        *(VARIANT, Column("us", "us", ".0f"), Column("spread_us", "Spread", ".0f"), RATIO),
        *(Column("forward_us", "Forward", ".0f"), Column("backward_us", "Backward", ".0f")),
        *(Column("launches", "Launches", "d"), Column("allocations", "Allocations", "d")),
        Column("graph_ms", "Graph ms", ".3f"),
        Column("graph_gpu_ms", "on GPU", ".3f"),
    ),
    f"{ABOUT_TIMES} us: until both calls returned, each step from an idle GPU. Launches and allocations: of one step. Graph: "
    "a step as CUDA graphs, with what the host does between them, and on the GPU alone.",
    bars={"us": "us to enqueue"},
    lines={"us": "us to enqueue", "ratio": "time, eager = 1"},
)
GEMM = View(
    "[M, K] @ [K, N]",
    (
        *(Column("m", "M", "d"), Column("n", "N", "d"), Column("k", "K", "d"), VARIANT, MS, SPREAD),
        *(Column("tflops", "TFLOP/s", ".4g"), RATIO._replace(heading="Of torch.mm"), ERROR),
    ),
    f"{ABOUT_TIMES} {ABOUT_ERRORS}, FP8's with that of quantizing, which is not timed.",
    bars={"tflops": "TFLOP/s"},
)
NORM = View(
    "Memory-bound kernels",
    (
        *(VARIANT._replace(heading="Kernel"), Column("us", "us", ".1f"), Column("spread_us", "Spread", ".1f")),
        *(Column("TB_s", "TB/s", ".3g"), Column("of_copy", "Of copy", ".0%"), Column("host_us", "Host us", ".1f"), ERROR),
    ),
    f"{ABOUT_TIMES} TB/s: each input read once, each output written once. Host: to launch. {ABOUT_ERRORS}; the worst output.",
    bars={"of_copy": "share of a copy's bandwidth"},
)
ATTENTION = View(
    "Attention",
    (
        *(VARIANT._replace(heading="Backend"), Column("forward_ms", "Forward ms", ".3f")),
        *(Column("forward_spread_ms", "Spread", ".3f"), Column("forward_tflops", "TFLOP/s", ".4g")),
        *(Column("backward_ms", "Backward ms", ".3f"), Column("backward_spread_ms", "Spread", ".3f")),
        *(Column("backward_tflops", "TFLOP/s", ".4g"), ERROR, Column("chosen", "Chosen", "")),
    ),
    f"{ABOUT_TIMES} {ABOUT_ERRORS}; the worst of output and gradients.",
    bars={"forward_tflops": "forward, TFLOP/s", "backward_tflops": "backward, TFLOP/s"},
)


def about(arguments: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What has to be known to measure the same again, in values that JSON can hold."""
    competitors = {name: installed(name) for name in ("torchao", "transformer-engine")}
    return {
        "command": shlex.join(["overdrive", *sys.argv[1:]]),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else devices()[0],
        "versions": {**versions(), **{name: version for name, version in competitors.items() if version != "not installed"}},
        "arguments": {key: str(value) if isinstance(value, torch.dtype) else value for key, value in arguments.items()},
    }


def caption(about: dict[str, Any]) -> str:
    """One line that says what ran where."""
    said = {**about["arguments"]}
    scaled = {"tokens": ("sequence", "batch"), "hidden": ("hidden", "ffn", "heads", "groups")}.get(said.get("scale", ""), ())
    for key in ("only", "seed", "device", "scale", "point", "rounds", *scaled):
        said.pop(key, None)
    words = [f"{key} {' '.join(map(str, value)) if isinstance(value, list) else value}" for key, value in said.items()]
    return f"{', '.join(words)}; {about['gpu']}, torch {about['versions']['torch']}".replace("torch.", "")


def cell(value: Any, form: str) -> str:
    """A value for people."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else ""
    return format(value, form)


def table(view: View, outcome: Outcome, about: dict[str, Any]) -> Table:
    """All rows; columns that no row fills are left out."""
    axis = about["arguments"].get("scale")
    columns = (*([Column(axis, axis.capitalize(), "d")] if axis else []), *view.columns)
    columns = [column for column in columns if any(column.key in row for row in outcome.rows)]
    made = Table(title=view.title, caption=caption(about), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        name = column.key == "variant"  # may wrap on a narrow terminal, numbers may not
        heading = column.heading if name else column.heading.replace(" ", "\n")
        made.add_column(heading, justify="left" if name else "right", no_wrap=not name)
    for before, row in zip([None, *outcome.rows], outcome.rows):
        if before and axis and before[axis] != row[axis]:
            made.add_section()
        made.add_row(*(cell(row.get(column.key), column.form) for column in columns))
    return made


def notes(view: View, device: torch.device) -> list[str]:
    """What the columns mean."""
    on_cpu = "On a CPU every operation of overdrive runs as its plain PyTorch reference: times say nothing of a GPU."
    return [view.note, *([on_cpu] if device.type == "cpu" else [])]


def save(outcome: Outcome, about: dict[str, Any], path: Path) -> None:
    """Everything as JSON."""
    path.write_text(json.dumps({**about, "rows": outcome.rows, "skipped": outcome.skipped}, indent=1) + "\n")
