"""Training: one step, one run, and going on where it stopped."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import overdrive.pytorch as te
from overdrive.functional.attention_backends import VARIABLE as ATTENTION
from overdrive.models.language import build
from overdrive.recipe import Recipe
from overdrive.train.checkpoint import load, of_another_run, save
from overdrive.train.data import Text
from overdrive.train.log import Log, Row
from overdrive.train.optimizer import MasterAdamW
from overdrive.train.schedule import cosine
from overdrive.train.settings import Settings, conflict

VALIDATION_BATCHES = 8
SETTLED = 10
"""Steps after which the pace is a run's own, not that of compiling and tuning."""
REPORT_SECONDS = 0.5
"""How long losses may wait on the GPU for being looked at."""
KEYS = ("step", "total", "seconds", "mark", "optimizer", "rng")


class DivergedError(ArithmeticError):
    """The loss or the gradient is no number any more."""


class Trainer:
    """A model, its optimizer and where in the run they are. The same settings, text and device give the same bits.

    recipe: of the FP8 autocast, None for bf16. On a GPU bits are the same only with settings.deterministic.
    """

    def __init__(self, settings: Settings, text: Text, recipe: Recipe | None, device: torch.device) -> None:
        self.settings, self.text, self.recipe, self.device = settings, text, recipe, device
        torch.manual_seed(settings.seed)
        self.model = build(settings.model, device, torch.float32 if settings.amp else torch.bfloat16)
        self.optimizer = MasterAdamW(self.model, settings.weight_decay, settings.clip)
        self.step, self.seconds, self.total = 0, 0.0, settings.steps
        self._mark = (0, 0.0)  # step and seconds from which the pace counts
        self._validation = text.validation(VALIDATION_BATCHES, settings.batch)

    @property
    def finished(self) -> bool:
        """Whether all steps are taken or the time is up."""
        minutes = self.settings.minutes
        return (self.total is not None and self.step >= self.total) or (minutes is not None and self.seconds >= 60 * minutes)

    def advance(self) -> tuple[Tensor, Tensor, float]:
        """Take a step: (loss f32 [], gradient norm f32 [], learning rate). Waits for no GPU."""
        settings, loss = self.settings, torch.zeros((), device=self.device)
        count = settings.accumulate
        rate = cosine(self.step, settings.learning_rate, settings.warmup, self.total)
        with deterministic(settings.deterministic, self.device):
            for number in range(count):
                tokens = self.text.batch(settings.seed, self.step * count + number, settings.batch)
                # FP8 weights are quantized by the first microbatch and kept for the others.
                part = self.loss(tokens, number == 0 if count > 1 else None) / count
                part.backward()
                self.optimizer.take_gradients()
                loss += part.detach()
            norm = self.optimizer.step(rate)
        self.step += 1
        return loss, norm, rate

    def loss(self, tokens: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        """Mean cross entropy f32 [], in nats per byte, of windows u8 [B, S + 1]."""
        if self.device.type == "cuda":
            tokens = tokens.pin_memory().to(self.device, non_blocking=True)
        tokens = tokens.long()
        with self.precision():
            logits = self.model(tokens[:, :-1], is_first_microbatch, self.settings.recompute and self.model.training)
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """What a forward runs under."""
        with (
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp),
            te.autocast(enabled=self.recipe is not None, recipe=self.recipe),
        ):
            yield

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss on held-out text, the same text each time."""
        self.model.eval()
        losses = [self.loss(tokens) for tokens in self._validation]
        self.model.train()
        return torch.stack(losses).mean().item()

    def plan(self) -> None:
        """Once the pace is known, settle how many steps fit into the minutes."""
        settled, minutes = max(self.settings.warmup, SETTLED), self.settings.minutes
        if self.step == settled // 2:
            self._mark = (self.step, self.seconds)
        if self.total is None and minutes is not None and self.step >= settled and self.step > self._mark[0]:
            pace = (self.seconds - self._mark[1]) / (self.step - self._mark[0])
            self.total = self.step + max(int((60 * minutes - self.seconds) / pace), 0)

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on; the data's position is the step."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "settings": self.settings.to_dict(),
            "step": self.step,
            "total": self.total,
            "seconds": self.seconds,
            "mark": list(self._mark),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": rng,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave; ValueError, RuntimeError, KeyError or TypeError if it is of another run or model."""
        saved = Settings.from_dict(state["settings"])
        if found := conflict(self.settings, saved):
            raise ValueError("it was made with {0}={2!r}, not {1!r}".format(*found))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self._mark = state["step"], state["seconds"], tuple(state["mark"])
        if (self.settings.steps, self.settings.minutes) == (saved.steps, saved.minutes):
            self.total = state["total"]
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)

    def resume(self, path: Path) -> None:
        """Go on from the checkpoint `path`; CheckpointError if it cannot be read or is of another run or model."""
        state = load(path, KEYS)
        with of_another_run(path):
            self.load_state_dict(state)


def fit(
    trainer: Trainer,
    checkpoint: Path,
    log: Log,
    stop: Callable[[], bool] = lambda: False,
    report: Callable[[list[Row]], None] = lambda rows: None,
) -> None:
    """Train until the run is finished or `stop()`, which is asked after every step; the last thing done is a checkpoint.

    report: hears of the steps taken since it was last called. DivergedError, with the checkpoint as it was before, once a loss is
    not finite; DiskError if log or checkpoint cannot be written.
    """
    settings, origin = trainer.settings, time.perf_counter() - trainer.seconds
    if trainer.step == 0:
        save(checkpoint, trainer.state_dict())  # so that there always is one
    taken: list[tuple[Tensor, Tensor, float]] = []
    began, stopping = time.perf_counter(), stop()
    while not (trainer.finished or stopping):
        taken.append(trainer.advance())
        trainer.seconds, stopping = time.perf_counter() - origin, stop()
        validating, saving = (trainer.step % every == 0 for every in (settings.validate_every, settings.save_every))
        waiting = time.perf_counter() - began > REPORT_SECONDS
        if not (validating or saving or waiting or stopping or trainer.finished or trainer.total is None):
            continue
        rows = _rows(trainer, taken, log.rows[-1].seconds if log.rows else 0.0, began)
        trainer.seconds = time.perf_counter() - origin
        trainer.plan()
        if validating or trainer.finished:
            rows[-1].validation_loss = trainer.validate()
        log.write(rows)
        if saving or stopping or trainer.finished:
            log.sync()
            save(checkpoint, trainer.state_dict())
        report(rows)
        taken, began = [], time.perf_counter()


def _rows(trainer: Trainer, taken: list[tuple[Tensor, Tensor, float]], before: float, began: float) -> list[Row]:
    """The last steps, once the device has done them; they share the time since `began` evenly, after `before` seconds."""
    numbers = torch.stack([torch.stack((loss, norm)) for loss, norm, _ in taken]).tolist()  # waits
    each, first = (time.perf_counter() - began) / len(taken), trainer.step - len(taken) + 1
    rows = []
    for index, ((loss, norm), (_, _, rate)) in enumerate(zip(numbers, taken)):
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise DivergedError(
                f"Step {first + index} has loss {loss:g} and gradient norm {norm:g}: training diverged. Take a lower learning rate "
                "or a longer warm-up."
            )
        speed = trainer.settings.step_tokens / each
        rows.append(Row(first + index, loss, norm, rate, speed, before + each * (index + 1)))
    return rows


@contextlib.contextmanager
def deterministic(on: bool, device: torch.device) -> Iterator[None]:
    """Only kernels that give the same bits each time; torch raises for what has none. A CPU has no others."""
    if not on or device.type == "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    attention = os.environ.get(ATTENTION)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it
    os.environ[ATTENTION] = attention or "flash"  # cuDNN adds up the query's gradient in any order
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        os.environ[ATTENTION] = attention or ""
