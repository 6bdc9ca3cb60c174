"""The command line: flags, their checks, and what is printed."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from overdrive.cli import report
from overdrive.cli.doctor import examine, to_markdown
from overdrive.cli.layers import Size
from overdrive.cli.quickstart import PARTS, NotSharedError, Settings, run, stages
from overdrive.cli.recipes import RecipeName

T = TypeVar("T")

app = typer.Typer(no_args_is_help=True, add_completion=False, help="FP8 Transformer layers: try them, look at this machine.")


class DtypeName(str, Enum):
    """What `--dtype` takes."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


DTYPES = {DtypeName.FP32: torch.float32, DtypeName.FP16: torch.float16, DtypeName.BF16: torch.bfloat16}
DEFAULT_RECIPES = [RecipeName.DELAYED, RecipeName.CURRENT, RecipeName.BLOCK]


class Defaults(NamedTuple):
    """What flags that are not given mean on one kind of device."""

    hidden: int
    heads: int
    sequence: int
    batch: int
    dtype: DtypeName
    iterations: int
    warmup: int


# The tutorial's size on a GPU; on a CPU one that ends within a minute.
DEFAULTS = {
    "cuda": Defaults(4096, 32, 2048, 4, DtypeName.FP16, 50, 50),
    "cpu": Defaults(256, 8, 128, 2, DtypeName.FP32, 10, 3),
}


def parse_device(value: str | None) -> torch.device:
    """The device that was named, or the GPU where there is one."""
    if value is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = torch.cuda.device_count()
    allowed = ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if value not in allowed:
        raise typer.BadParameter(
            f"{value!r} is not a device of this machine; it has {', '.join(allowed)}.", param_hint="'--device'"
        )
    return torch.device(value)


def check_chart(path: Path) -> Path:
    """Refuse a chart that could not be saved before anything is measured."""
    if path.suffix.lower() != ".png":
        raise typer.BadParameter(f"{str(path)!r} does not end in .png; the chart is a PNG image.")
    if not path.resolve().parent.is_dir():
        raise typer.BadParameter(f"{str(path)!r} lies in a folder that does not exist; make it first.")
    return path


def given(value: T | None, default: T) -> T:
    """The flag's value, or its default on this device."""
    return default if value is None else value


def number(kind: type, low: float, high: float = math.inf) -> Callable[[Any], Any]:
    """A parser that says what came and what is allowed; typer adds the flag's name."""
    allowed = "a whole number" if kind is int else "a number"
    allowed += f" of at least {low}" if high == math.inf else f" from {low} to {high}"

    def parse(value: Any) -> Any:
        try:
            parsed = kind(value)
            if low <= parsed <= high:
                return parsed
        except ValueError:
            pass
        raise typer.BadParameter(f"{value!r} came; it takes {allowed}.")

    return parse


def count(help: str, low: int = 1) -> Any:
    """A flag that takes a whole number."""
    return typer.Option(help=help, parser=number(int, low), metavar="INT")


@app.command()
def quickstart(
    hidden: Annotated[int | None, count("Hidden size (GPU 4096, CPU 256).")] = None,
    ffn: Annotated[int | None, count("Hidden size of the MLP (4 x hidden).")] = None,
    heads: Annotated[int | None, count("Attention heads (GPU 32, CPU 8).")] = None,
    sequence: Annotated[int | None, count("Sequence length (GPU 2048, CPU 128).")] = None,
    batch: Annotated[int | None, count("Batch size (GPU 4, CPU 2).")] = None,
    dtype: Annotated[DtypeName | None, typer.Option(help="Of parameters and activations (GPU fp16, CPU fp32).")] = None,
    recipe: Annotated[list[RecipeName] | None, typer.Option(help="FP8 recipe, repeatable (delayed, current, block).")] = None,
    dropout: Annotated[
        float, typer.Option(help="Dropout while timing; errors are taken without.", parser=number(float, 0, 1), metavar="FLOAT")
    ] = 0.1,
    causal: Annotated[bool, typer.Option(help="A token attends only to itself and those before it.")] = False,
    iterations: Annotated[int | None, count("Timed steps (GPU 50, CPU 10).")] = None,
    warmup: Annotated[int | None, count("Steps before the clock starts (GPU 50, CPU 3).", low=0)] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N (the GPU where there is one).")] = None,
    seed: Annotated[int, count("Seed of parameters and inputs.", low=0)] = 0,
    chart: Annotated[Path, typer.Option(help="Where the bar chart goes.", callback=check_chart)] = Path("quickstart.png"),
) -> None:
    """Run one Transformer layer as plain PyTorch, from ever larger fused modules, and in FP8: time, memory, error."""
    place = parse_device(device)
    default = DEFAULTS[place.type]
    width = given(hidden, default.hidden)
    size = Size(
        width, given(ffn, 4 * width), given(heads, default.heads), given(sequence, default.sequence), given(batch, default.batch)
    )
    if size.hidden % size.heads:
        raise typer.BadParameter(f"{size.heads} heads do not divide the hidden size {size.hidden}.", param_hint="'--heads'")
    settings = Settings(
        size=size,
        dtype=DTYPES[given(dtype, default.dtype)],
        device=place,
        recipes=tuple(dict.fromkeys(recipe or DEFAULT_RECIPES)),
        dropout=dropout,
        causal=causal,
        iterations=given(iterations, default.iterations),
        warmup=given(warmup, default.warmup),
        seed=seed,
    )
    show(settings, chart)


def show(settings: Settings, path: Path) -> None:
    """Measure under a progress bar, then print the table and save the chart."""
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Redrawn by hand between measurements, as a refreshing thread would disturb them.
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        task = progress.add_task("plain layer in float32", total=PARTS * len(stages(settings)))

        done = itertools.count()

        def tick(what: str) -> None:
            progress.update(task, description=what, completed=next(done), refresh=True)

        try:
            results = run(settings, tick)
        except NotSharedError as error:
            console.print(f"[red]{error}[/red]")
            raise typer.Exit(1) from error
    console.print(report.table(settings, results))
    for note in report.notes(settings, results):
        console.print(note, style="dim", highlight=False)
    report.chart(settings, results, path)
    console.print(f"Chart: {path}", soft_wrap=True)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of Markdown.")] = False) -> None:
    """Print versions, devices, and what is usable here, ready to paste into a bug report."""
    found = examine()
    typer.echo(json.dumps(found, indent=2) if as_json else to_markdown(found))
