"""What commands share: parsers that name the flag, say what came and what is allowed, and a progress bar."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

T = TypeVar("T")


class DtypeName(str, Enum):
    """What `--dtype` takes."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


DTYPES = {DtypeName.FP32: torch.float32, DtypeName.FP16: torch.float16, DtypeName.BF16: torch.bfloat16}


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


def check_folder(path: Path | None) -> Path | None:
    """Refuse a file that could not be saved before anything is measured."""
    if path is not None and not path.resolve().parent.is_dir():
        raise typer.BadParameter(f"{str(path)!r} lies in a folder that does not exist; make it first.")
    return path


def check_chart(path: Path | None) -> Path | None:
    """Refuse a chart that is no PNG, or could not be saved."""
    if path is not None and path.suffix.lower() != ".png":
        raise typer.BadParameter(f"{str(path)!r} does not end in .png; the chart is a PNG image.")
    return check_folder(path)


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


def choice(*allowed: str) -> Callable[[str], str]:
    """A parser of one of these names."""

    def parse(value: str) -> str:
        if value not in allowed:
            raise typer.BadParameter(f"{value!r} came; it takes {', '.join(allowed)}.")
        return value

    return parse


def count(help: str, low: int = 1) -> Any:
    """A flag that takes a whole number."""
    return typer.Option(help=help, parser=number(int, low), metavar="INT")


@contextlib.contextmanager
def progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar, and what to call with (what is done now, how many are done, of how many)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Redrawn by hand between measurements, as a refreshing thread would disturb them.
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as bar:
        task = bar.add_task("")
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total, refresh=True)
