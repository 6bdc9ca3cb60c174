"""Tiny runs that the tests of training share, and the bits that two of them must agree in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from overdrive.models import ModelConfig
from overdrive.recipe import DelayedScaling, Float8BlockScaling, Float8CurrentScaling
from overdrive.train import Log, Settings, Text, Trainer, fit, load
from overdrive.train.log import Row
from tests.numerics import assert_same_bits

RECIPES = {
    "bf16": None,
    "delayed": DelayedScaling(amax_history_len=4),
    "current": Float8CurrentScaling(),
    "block": Float8BlockScaling(),
}
SENTENCES = "".join(f"{i} bottles of {'beer' if i % 3 else 'milk'} on wall number {i * i % 17}.\n" for i in range(400)).encode()


def config(**changes: Any) -> ModelConfig:
    """A model whose step takes milliseconds."""
    return ModelConfig(**{"layers": 2, "hidden": 32, "heads": 2, "ffn": 64, "context": 16} | changes)


def settings(model: ModelConfig | None = None, **changes: Any) -> Settings:
    """A run of a second."""
    values = {"batch": 2, "steps": 6, "warmup": 2, "save_every": 2, "validate_every": 3, "deterministic": True}
    return Settings(model or config(), **values | changes)


def text(folder: Path, length: int = 16) -> Text:
    """A text that a tiny model can learn something of."""
    path = folder / "text.txt"
    path.write_bytes(SENTENCES)
    return Text([path], length)


def trainer(run: Settings, folder: Path, device: str) -> Trainer:
    """A fresh one."""
    return Trainer(run, text(folder, run.model.context), RECIPES[run.recipe], torch.device(device))


def train(made: Trainer, folder: Path, stop_at: int | None = None, name: str = "run") -> list[Row]:
    """`fit` up to step `stop_at`, from the checkpoint in `folder` if there is one: the rows so far."""
    checkpoint = folder / f"{name}.pt"
    if checkpoint.exists():
        made.resume(checkpoint)
    with Log(folder / f"{name}.csv", until=made.step) as log:
        fit(made, checkpoint, log, lambda: made.step == stop_at)
        return log.rows


def numbers(rows: list[Row]) -> list[tuple[Any, ...]]:
    """What of the rows does not depend on the clock."""
    return [(row.step, row.loss, row.gradient_norm, row.learning_rate, row.validation_loss) for row in rows]


CLOCK = ("seconds", "mark")


def assert_same_state(actual: Any, expected: Any, name: str = "checkpoint") -> None:
    """Fail unless every number and every bit agrees, but for the clock."""
    if isinstance(expected, torch.Tensor):
        assert_same_bits(actual, expected, name)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), name
        for key in expected.keys() - {*CLOCK}:
            assert_same_state(actual[key], expected[key], f"{name}.{key}")
    elif isinstance(expected, list):
        assert len(actual) == len(expected), name
        for index, value in enumerate(expected):
            assert_same_state(actual[index], value, f"{name}[{index}]")
    else:
        assert actual == expected, name


def assert_same_checkpoints(actual: Path, expected: Path) -> None:
    """Fail unless two checkpoints hold the same run at the same step."""
    assert_same_state(load(actual), load(expected))
