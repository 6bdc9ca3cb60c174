"""The `overdrive` command: quickstart, bench, train, generate and doctor."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console

from overdrive.bench.plain import Size
from overdrive.cli import report
from overdrive.cli.bench import bench
from overdrive.cli.doctor import examine, to_markdown
from overdrive.cli.flags import DTYPES, DtypeName, check_chart, count, given, number, parse_device, progress
from overdrive.cli.generate import generate
from overdrive.cli.quickstart import PARTS, NotSharedError, Settings, run, stages
from overdrive.cli.recipes import DEFAULT_RECIPES, RecipeName
from overdrive.cli.train import train

app = typer.Typer(no_args_is_help=True, add_completion=False, help="FP8 Transformer layers: try, measure and train them.")
app.add_typer(bench)
app.command()(train)
app.command()(generate)


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
    total, done = PARTS * len(stages(settings)), itertools.count()
    with progress(console) as tick:
        tick("plain layer in float32", 0, total)
        try:
            results = run(settings, lambda what: tick(what, next(done), total))
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
