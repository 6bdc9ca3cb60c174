"""What is seen of training runs: progress, a table, loss curves."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from overdrive.cli.report import BLUE, ORANGE
from overdrive.train import Row, Trainer
from overdrive.train.checkpoint import replace_file

COLORS = {"bf16": "#555555", "delayed": BLUE, "current": ORANGE, "block": "#3a9a5b"}


def describe(trainer: Trainer) -> str:
    """One line that says what is trained."""
    settings, config = trainer.settings, trainer.settings.model
    place = torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else "CPU"
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    batch = f"{settings.batch} x {config.context}" + (f" x {settings.accumulate}" if settings.accumulate > 1 else "")
    return (
        f"{config.kind}, {config.layers} layers, hidden {config.hidden}, {config.heads} heads, {parameters / 1e6:.1f}M parameters; "
        f"{batch} bytes a step of {len(trainer.text.training) / 1e6:.1f} MB on {place}"
    )


def progress_bar(console: Console) -> Progress:
    """A line per recipe: steps, loss, speed, time."""
    columns = (
        TextColumn("{task.description:7}"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(compact=True),
    )
    return Progress(*columns, console=console, refresh_per_second=2)


class View:
    """What is seen of one run while it goes."""

    def __init__(self, console: Console, progress: Progress, chart: Chart, trainer: Trainer) -> None:
        self.console, self.progress, self.chart, self.trainer = console, progress, chart, trainer
        self.task: TaskID = progress.add_task(trainer.settings.recipe, total=trainer.total, state="")
        self.validation = ""

    def show(self, rows: list[Row]) -> None:
        """Take notice of new rows."""
        if not rows:
            return
        last = rows[-1]
        if last.validation_loss is not None:
            self.validation = f" val {last.validation_loss:.3f}"
        state = f"loss {last.loss:.3f}{self.validation} {last.tokens_per_second:,.0f} tokens/s"
        self.progress.update(self.task, completed=last.step, total=self.trainer.total, state=state)
        if last.validation_loss is not None:
            if not self.console.is_terminal:
                self.console.print(f"{self.trainer.settings.recipe} step {last.step}: {state}", soft_wrap=True, highlight=False)
            self.chart.draw_if_due()


class Chart:
    """The chart on the disk, kept up to date without taking more than a twentieth of the time."""

    def __init__(self, path: Path, logs: dict[str, list[Row]]) -> None:
        self.path, self.logs, self.due = path, logs, 0.0

    def draw_if_due(self) -> None:
        """Draw, unless that was done a moment ago."""
        if time.monotonic() >= self.due:
            self.draw()

    def draw(self) -> None:
        """Draw now."""
        began = time.monotonic()
        draw(self.logs, self.path)
        self.due = began + max(5.0, 20 * (time.monotonic() - began))


def table(logs: dict[str, list[Row]]) -> Table:
    """What each recipe reached."""
    made = Table(title="Training", caption="Losses in nats per byte: training over the last 20 steps, validation on held-out text.")
    made.add_column("Recipe")
    for heading in ("Steps", "Minutes", "Tokens/s", "Training", "Validation"):
        made.add_column(heading, justify="right")
    for name, rows in logs.items():
        if not rows:
            made.add_row(name, "0", *["–"] * 4)
            continue
        last = rows[-20:]
        validation = next((row.validation_loss for row in reversed(rows) if row.validation_loss is not None), None)
        made.add_row(
            name,
            str(rows[-1].step),
            f"{rows[-1].seconds / 60:.2f}",
            f"{median(row.tokens_per_second for row in rows):,.0f}",
            f"{sum(row.loss for row in last) / len(last):.4f}",
            "–" if validation is None else f"{validation:.4f}",
        )
    return made


def smoothed(values: list[float]) -> list[float]:
    """Mean over the last twentieth of the run (50 steps at most) up to each value."""
    window = max(1, min(50, len(values) // 20))
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i] - sums[max(i - window, 0)]) / min(i, window) for i in range(1, len(sums))]


def draw(logs: dict[str, list[Row]], path: Path) -> None:
    """Loss over steps and over the time they took: training as lines, validation as dots, one color a recipe; a PNG, replaced at
    once.
    """
    from matplotlib.figure import Figure  # a third of a second that --help need not wait for

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    beginnings = []
    for name, rows in logs.items():
        losses = smoothed([row.loss for row in rows])
        beginnings += losses[len(losses) // 20 :][:1]
        validated = [row for row in rows if row.validation_loss is not None]
        held_out = [row.validation_loss for row in validated]
        for axes, at in ((left, lambda row: row.step), (right, lambda row: row.seconds / 60)):
            axes.plot([at(row) for row in rows], losses, color=COLORS.get(name), linewidth=1, alpha=0.8, label=name)
            axes.plot([at(row) for row in validated], held_out, "o", color=COLORS.get(name), markersize=3)
    for axes, label in ((left, "steps"), (right, "minutes of training")):
        axes.set_xlabel(label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("loss (nats per byte)")
    if beginnings:
        left.legend(frameon=False, title="lines: training\ndots: held out", title_fontsize=8)
        left.set_ylim(top=max(beginnings) + 0.1)  # the first steps' fall would flatten the rest
    replace_file(path, lambda file: figure.savefig(file, dpi=130, format="png"))
