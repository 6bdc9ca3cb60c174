"""`overdrive train`: flags, their checks, and one recipe after the other."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from overdrive.cli.flags import choice, count, number, parse_device
from overdrive.cli.recipes import RECIPES, RecipeName
from overdrive.cli.training import Chart, View, describe, progress_bar, table
from overdrive.models import SIZES, ArgumentError, ModelConfig
from overdrive.models.config import KINDS
from overdrive.scaling.support import is_bf16_available, usable
from overdrive.train import (
    CheckpointError,
    DiskError,
    DivergedError,
    Log,
    Row,
    Settings,
    Text,
    Trainer,
    conflict,
    fit,
    read_settings,
)
from overdrive.train.data import standard_library
from overdrive.train.settings import DEFAULTS

BF16 = "bf16"
NAMES = (BF16, *(name.value for name in RecipeName))
COMPARED = (BF16, RecipeName.DELAYED.value, RecipeName.CURRENT.value, RecipeName.BLOCK.value)
MOST_SEED = 2**63 - 1
FIELDS = {"model": "kind", "sequence": "context"}
"""What flags set that are not called as it."""
IN_MODEL = {field.name for field in dataclasses.fields(ModelConfig)}
SETTABLE = IN_MODEL | {field.name for field in dataclasses.fields(Settings)} - {"model", "recipe", "recipes", "texts"}


def flag(name: str) -> str:
    """How the command line calls an argument."""
    if name in ("texts", "text_sha256"):
        return "'TEXT'"
    called = next((flag for flag, field in FIELDS.items() if field == name), name)
    return f"'--{called.replace('_', '-')}'"


@contextlib.contextmanager
def named_flags() -> Iterator[None]:
    """Report what is wrong with a value as the command line's own errors."""
    try:
        yield
    except ArgumentError as error:
        raise typer.BadParameter(str(error), param_hint=flag(error.argument)) from error


@contextlib.contextmanager
def signals() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM came. A second one acts as ever."""
    caught: list[int] = []
    before: dict[int, Any] = {}

    def note(kind: int, _: Any) -> None:
        caught.append(kind)
        signal.signal(kind, before[kind])

    for kind in (signal.SIGINT, signal.SIGTERM):
        before[kind] = signal.signal(kind, note)
    try:
        yield lambda: bool(caught)
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def check_recipe(value: str) -> str:
    """A recipe's name; one that cannot run here is refused with the reason."""
    able, reason = able_to_run(choice(*NAMES)(value))
    if not able:
        raise typer.BadParameter(f"{value!r} cannot run here: {reason}.", param_hint="'--recipe'")
    return value


def able_to_run(recipe: str) -> tuple[bool, str]:
    """(usable, reason) of a recipe's name on this machine."""
    return is_bf16_available() if recipe == BF16 else usable(RECIPES[RecipeName(recipe)])


def decimal(help: str, low: float = 0.0, high: float = 1.0) -> Any:
    """A flag that takes a number."""
    return typer.Option(help=help, parser=number(float, low, high), metavar="FLOAT")


def train(
    context: typer.Context,
    texts: Annotated[
        list[Path] | None, typer.Argument(metavar="TEXT", help="Text files (the sources of Python's standard library).")
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(help="bf16, delayed, current or block; repeatable (delayed).", parser=check_recipe, metavar="NAME"),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Train with bf16 and each recipe that runs here.")] = False,
    model: Annotated[
        str | None, typer.Option(help="GPT-2 or Llama architecture (gpt).", parser=choice(*KINDS), metavar="|".join(KINDS))
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Shape, and what suits it (GPU 124M, CPU tiny).", parser=choice(*SIZES), metavar="|".join(SIZES)),
    ] = None,
    layers: Annotated[int | None, count("Transformer layers.")] = None,
    hidden: Annotated[int | None, count("Hidden size.")] = None,
    heads: Annotated[int | None, count("Attention heads.")] = None,
    groups: Annotated[int | None, count("Heads of keys and values.")] = None,
    ffn: Annotated[int | None, count("Hidden size of the MLP.")] = None,
    sequence: Annotated[int | None, count("Sequence length in bytes.")] = None,
    dropout: Annotated[float | None, decimal("Dropout (0).")] = None,
    tied: Annotated[bool | None, typer.Option("--tied/--untied", help="Whether the head is the embedding (tied).")] = None,
    batch: Annotated[int | None, count("Sequences of a microbatch.")] = None,
    accumulate: Annotated[int | None, count("Microbatches of a step.")] = None,
    steps: Annotated[int | None, count("Optimizer steps.")] = None,
    minutes: Annotated[float | None, decimal("Time for each recipe; without --steps, as many as fit.", 0.01, 1e6)] = None,
    warmup: Annotated[int | None, count("Steps in which the learning rate rises.", low=0)] = None,
    learning_rate: Annotated[float | None, decimal("Peak learning rate.", high=10.0)] = None,
    weight_decay: Annotated[float | None, decimal("Weight decay of AdamW (0.1).", high=10.0)] = None,
    clip: Annotated[float | None, decimal("Largest norm of the gradient, 0 for any (1).", high=1e9)] = None,
    amp: Annotated[bool | None, typer.Option("--amp/--no-amp", help="float32 parameters under torch.autocast (no).")] = None,
    recompute: Annotated[bool | None, typer.Option("--recompute/--no-recompute", help="Activation checkpointing (no).")] = None,
    deterministic: Annotated[
        bool | None, typer.Option("--deterministic/--fast", help="The same bits each time, on a GPU too (fast).")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of parameters, batches and dropout (0).", parser=number(int, 0, MOST_SEED), metavar="INT")
    ] = None,
    save_every: Annotated[int | None, count("Steps between checkpoints (100).")] = None,
    validate_every: Annotated[int | None, count("Steps between validations.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N (the GPU where there is one).")] = None,
    out: Annotated[Path, typer.Option(help="Folder of checkpoints, logs and chart.", file_okay=False)] = Path("overdrive-train"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out; start it where there is none.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
) -> None:
    """Train a byte-level language model on text, in bf16 or FP8; recipes side by side in one chart.

    Ctrl-C and SIGTERM save and end the run; --resume goes on with it, with the very numbers of a run that never stopped. Then only
    --steps, --minutes, --save-every, --validate-every, --recompute, --device and where TEXT lies may be others than before.
    """
    place = parse_device(device)
    if compare and recipe:
        raise typer.BadParameter("It names all recipes itself; leave out --recipe.", param_hint="'--compare'")
    chosen = [name for name in COMPARED if able_to_run(name)[0]] if compare else list(dict.fromkeys(recipe or []))
    names = {FIELDS.get(name, name): value for name, value in context.params.items() if value is not None}
    flags = {name: value for name, value in names.items() if name in SETTABLE}
    if chosen:
        flags["recipes"] = chosen
    if texts:
        flags["texts"] = [str(path.resolve()) for path in texts]
    console = Console()
    found = runs_in(out, overwrite, resume)
    try:
        with named_flags():
            base = read_settings(found[0]) if found and resume else None
            if resume and base is None:
                console.print(f"No checkpoint in {out} yet: the run starts.", soft_wrap=True)
            settings = settings_of(flags, size, base, place)
            text = Text([Path(path) for path in settings.texts] or standard_library(), settings.model.context)
        settings.text_sha256 = text.sha256
        if base is not None and (differing := conflict(settings, base)):
            refuse_change(*differing, out)
        if overwrite:
            for path in found:
                path.unlink()
                path.with_suffix(".csv").unlink(missing_ok=True)
        run_all(settings, text, place, out, resume, console)
    except CheckpointError as error:
        raise typer.BadParameter(str(error), param_hint="'--resume'") from error
    except (DiskError, DivergedError) as error:
        console.print(f"[red]{error}[/red]", soft_wrap=True)
        raise typer.Exit(1) from error
    except torch.cuda.OutOfMemoryError as error:
        console.print("[red]The GPU's memory is full. Take a smaller --batch with more --accumulate, or --recompute.[/red]")
        raise typer.Exit(1) from error


def runs_in(out: Path, overwrite: bool, resume: bool) -> list[Path]:
    """The checkpoints in `out`, which is made if needed. A run in it is not touched without being asked."""
    if overwrite and resume:
        raise typer.BadParameter("It replaces what --resume goes on with; give one of them.", param_hint="'--overwrite'")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{str(out)!r} cannot be made: {error.strerror}.", param_hint="'--out'") from error
    found = [path for path in (out / f"{name}.pt" for name in NAMES) if path.exists()]
    if found and not (overwrite or resume):
        raise typer.BadParameter(
            f"{str(out)!r} holds a run. Go on with it (--resume), replace it (--overwrite), or name another folder.",
            param_hint="'--out'",
        )
    return found


def settings_of(flags: dict[str, Any], size: str | None, base: Settings | None, place: torch.device) -> Settings:
    """The run's settings: flags before those of the run that is resumed (`base`) or what suits the size."""
    if base is None:
        size = size or ("124M" if place.type == "cuda" else "tiny")
        kind = flags.get("kind", "gpt")
        values: dict[str, Any] = {"recipes": [RecipeName.DELAYED.value], **DEFAULTS[size]}
        model = {"kind": kind, **SIZES[size][kind]}
    else:
        values = base.to_dict()
        model = values.pop("model")
        if size is not None:
            model |= SIZES[size][model["kind"]]
    if flags.keys() & {"steps", "minutes"}:
        values |= {"steps": None, "minutes": None}
    model |= {name: value for name, value in flags.items() if name in IN_MODEL}
    values |= {name: value for name, value in flags.items() if name not in IN_MODEL}
    settings = Settings(ModelConfig(**model), **values)
    for name in settings.recipes:
        check_recipe(name)
    return settings


def refuse_change(name: str, came: Any, was: Any, out: Path) -> None:
    """Say which flag a resumed run must not change."""
    if name == "text_sha256":
        message = f"The run in {str(out)!r} was trained on another text; give the same files in the same order."
    else:
        message = f"{came!r} came; the run in {str(out)!r} has {was!r}, which --resume must keep. Leave it out."
    raise typer.BadParameter(message, param_hint=flag(name))


def run_all(settings: Settings, text: Text, place: torch.device, out: Path, resume: bool, console: Console) -> None:
    """Train with each recipe in turn, then print what came of it."""
    logs: dict[str, list[Row]] = {}
    chart, interrupted = Chart(out / "loss.png", logs), False
    described = False
    with signals() as stop, progress_bar(console) as progress:
        for name in settings.recipes:
            checkpoint = out / f"{name}.pt"
            one = dataclasses.replace(settings, recipe=name)
            trainer = Trainer(one, text, None if name == BF16 else RECIPES[RecipeName(name)], place)
            if resume and checkpoint.exists():
                trainer.resume(checkpoint)
            if not described:
                console.print(describe(trainer), soft_wrap=True, highlight=False)
                described = True
            with Log(out / f"{name}.csv", until=trainer.step) as log:
                logs[name] = log.rows
                view = View(console, progress, chart, trainer)
                view.show(log.rows[-1:])
                fit(trainer, checkpoint, log, stop, view.show)
            if not trainer.finished:
                interrupted = True
                break
            if trainer.total is not None and trainer.step < trainer.total:
                console.print(f"{name}: the time was up after {trainer.step} of {trainer.total} steps; --minutes sets it.")
        chart.draw()
    console.print(table(logs))
    console.print(f"Chart: {out / 'loss.png'}   Logs: {out}/*.csv   Checkpoints: {out}/*.pt", soft_wrap=True, highlight=False)
    again = f"overdrive train --resume --out {out}" if interrupted else f"overdrive generate {out / (settings.recipes[-1] + '.pt')}"
    console.print(f"{'Stopped and saved. Go on' if interrupted else 'Write with it'}: {again}", soft_wrap=True, highlight=False)
