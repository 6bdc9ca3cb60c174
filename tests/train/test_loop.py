"""Steps and runs: what is computed, when it ends, what is measured."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

from overdrive.models.config import KINDS
from overdrive.train import DivergedError, Log, Settings, conflict, fit, load, loop
from tests.train.runs import RECIPES, config, numbers, settings, text, train, trainer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_it_learns(tmp_path, device, kind, recipe):
    """As far as in bf16, which is far below the 3.0 that the frequencies of bytes alone would give."""
    run = settings(config(kind=kind), recipe=recipe, batch=8, steps=60, warmup=5, learning_rate=1e-2, validate_every=60)
    rows = train(trainer(run, tmp_path, device), tmp_path)
    assert rows[0].loss == pytest.approx(math.log(256), rel=0.02)
    assert rows[-1].loss < 2.2
    assert rows[-1].validation_loss < 2.4


def test_the_first_microbatch_quantizes_the_weights_for_all(tmp_path, device):
    seen = []
    for count in (1, 3):
        made = trainer(settings(recipe="delayed", accumulate=count), tmp_path, device)
        made.model.layers[0].register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["is_first_microbatch"]), with_kwargs=True
        )
        made.advance()
        made.advance()
    assert seen == [None, None] + 2 * [True, False, False]


def test_fp8_weights_are_quantized_once_a_step(tmp_path, device):
    """Microbatches after the first use the weights as the first left them, whatever happens to them."""
    made = trainer(settings(recipe="current", accumulate=2), tmp_path, device)
    tokens, weight = made.text.batch(0, 0, 2), made.model.layers[0].layernorm_mlp.fc1_weight
    with torch.no_grad():
        first = made.loss(tokens, True)
        weight.add_(1.0)
        assert made.loss(tokens, False) == first
        assert made.loss(tokens, True) != first


class Fixed:
    """A text whose batches are the rows of one matrix in order."""

    def __init__(self, whole) -> None:
        self.rows = whole.batch(seed=0, number=0, size=8)
        self.validation = whole.validation

    def batch(self, seed, number, size):
        return self.rows[number * size : (number + 1) * size]


@pytest.mark.parametrize("amp", [False, True])
def test_microbatches_make_the_step_of_their_whole_batch(tmp_path, device, amp):
    steps = []
    for batch, count in ((8, 1), (2, 4)):
        made = trainer(settings(batch=batch, accumulate=count, amp=amp), tmp_path, device)
        made.text = Fixed(text(tmp_path))
        loss, norm, _ = made.advance()
        moved = torch.cat([master.detach().flatten() for master in made.optimizer.masters])
        steps.append((loss.item(), norm.item(), moved))
    assert steps[1][0] == pytest.approx(steps[0][0], rel=1e-3)
    assert steps[1][1] == pytest.approx(steps[0][1], rel=1e-2)


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("recipe", ["bf16", "delayed"])
def test_precision_of_parameters_and_layers(tmp_path, device, amp, recipe):
    made = trainer(settings(amp=amp, recipe=recipe), tmp_path, device)
    assert {p.dtype for p in made.model.parameters()} == {torch.float32 if amp else torch.bfloat16}
    assert {m.dtype for m in made.optimizer.masters} == {torch.float32}
    seen = []
    made.model.layers[1].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    made.advance()
    assert seen == [torch.bfloat16]


def test_validation_and_checkpoints_change_no_step(tmp_path, device):
    rows = {}
    for every in (1, 100):
        run = settings(config(dropout=0.1), recipe="delayed", validate_every=every, save_every=every)
        rows[every] = train(trainer(run, tmp_path, device), tmp_path, name=str(every))
    assert [row.loss for row in rows[1]] == [row.loss for row in rows[100]]
    assert [row.validation_loss is None for row in rows[1]] == [False] * 6
    assert [row.validation_loss is None for row in rows[100]] == [True] * 5 + [False]


def test_runs_after_one_another_in_a_process_do_not_touch(tmp_path, device):
    run = settings(config(dropout=0.1), recipe="delayed")
    alone = train(trainer(run, tmp_path, device), tmp_path, name="alone")
    train(trainer(settings(recipe="delayed", learning_rate=0.1), tmp_path, device), tmp_path, name="other")
    assert numbers(train(trainer(run, tmp_path, device), tmp_path, name="again")) == numbers(alone)


def test_the_held_out_text_is_not_learned_from(tmp_path, device):
    made = trainer(settings(), tmp_path, device)
    before = made.validate()
    assert made.model.training
    assert made.validate() == before
    assert before == pytest.approx(math.log(256), rel=0.02)
    assert all(p.grad is None for p in made.model.parameters())


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(tmp_path, device):
    made = trainer(settings(), tmp_path, device)
    advance = made.advance

    def poisoned():
        if made.step == 2:
            with torch.no_grad():
                made.model.norm.weight.fill_(torch.nan)
        return advance()

    made.advance = poisoned
    with pytest.raises(DivergedError, match=r"Step 3 has loss nan .*lower learning rate"):
        train(made, tmp_path)
    state = load(tmp_path / "run.pt")
    assert state["step"] == 2
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


class Clock:
    """Stands in for `time`: a step takes `pace` seconds."""

    def __init__(self, made, pace) -> None:
        self.now, advance = 100.0, made.advance

        def timed():
            self.now += pace(made.step)
            return advance()

        made.advance = timed

    def perf_counter(self):
        return self.now


def timed(tmp_path, device, monkeypatch, pace, stop_at=None, **changes):
    """(rows, trainer) of a run on a clock of its own."""
    made = trainer(settings(batch=1, validate_every=100, save_every=100, **changes), tmp_path, device)
    monkeypatch.setattr(loop, "time", Clock(made, pace))
    return train(made, tmp_path, stop_at), made


def test_minutes_make_as_many_steps_as_fit(tmp_path, device, monkeypatch):
    """The first steps, slow as they compile, do not count for the pace."""
    rows, made = timed(tmp_path, device, monkeypatch, lambda step: 10.0 if step == 0 else 1.0, steps=None, minutes=1.0)
    assert made.total == len(rows) == 51
    assert rows[-1].learning_rate == pytest.approx(0.1 * made.settings.learning_rate, rel=0.05)
    assert rows[-1].seconds == pytest.approx(60)
    assert rows[-1].tokens_per_second == pytest.approx(16)


def test_minutes_end_a_run_that_slows_down(tmp_path, device, monkeypatch):
    rows, made = timed(tmp_path, device, monkeypatch, lambda step: 1.0 if step < 30 else 5.0, steps=None, minutes=1.0)
    assert made.total == 60
    assert len(rows) == 36
    assert rows[-1].validation_loss is not None
    assert load(tmp_path / "run.pt")["step"] == 36


@pytest.mark.parametrize(("minutes", "expected"), [(0.1, 6), (10.0, 20)])
def test_of_steps_and_minutes_the_first_to_come_ends_the_run(tmp_path, device, monkeypatch, minutes, expected):
    rows, _ = timed(tmp_path, device, monkeypatch, lambda step: 1.0, steps=20, minutes=minutes)
    assert len(rows) == expected


def test_a_resumed_run_keeps_its_planned_end_and_its_clock(tmp_path, device, monkeypatch):
    expected, _ = timed(tmp_path / "..", device, monkeypatch, lambda step: 1.0, stop_at=1000, steps=None, minutes=0.5)
    (tmp_path / ".." / "run.pt").unlink()
    for stop_at, pace in ((4, 1.0), (15, 1.0), (None, 0.1)):
        rows, made = timed(tmp_path, device, monkeypatch, lambda step, pace=pace: pace, stop_at, steps=None, minutes=0.5)
    assert made.total == 30
    assert numbers(rows) == numbers(expected)
    assert made.seconds == pytest.approx(15 + 15 * 0.1)


def test_other_minutes_plan_anew(tmp_path, device, monkeypatch):
    timed(tmp_path, device, monkeypatch, lambda step: 1.0, stop_at=15, steps=None, minutes=0.5)
    rows, made = timed(tmp_path, device, monkeypatch, lambda step: 1.0, steps=None, minutes=1.0)
    assert made.total == len(rows) == 60


def test_stopping_saves_the_step_that_was_under_way(tmp_path, device):
    rows = train(trainer(settings(save_every=100), tmp_path, device), tmp_path, stop_at=4)
    assert rows[-1].step == load(tmp_path / "run.pt")["step"] == 4
    assert rows[-1].validation_loss is None


def test_a_run_that_is_stopped_at_once_can_go_on(tmp_path, device):
    made = trainer(settings(), tmp_path, device)
    with Log(tmp_path / "run.csv") as log:
        fit(made, tmp_path / "run.pt", log, stop=lambda: True)
    assert load(tmp_path / "run.pt")["step"] == 0
    assert len(train(trainer(settings(), tmp_path, device), tmp_path)) == 6


def test_reports_cover_every_step_once(tmp_path, device):
    made, heard = trainer(settings(), tmp_path, device), []
    with Log(tmp_path / "run.csv") as log:
        fit(made, tmp_path / "run.pt", log, report=heard.extend)
    assert [row.step for row in heard] == [1, 2, 3, 4, 5, 6]
    assert heard == log.rows


@pytest.mark.parametrize("before", [(False, False), (True, True)])
def test_determinism_is_left_as_it_was_found(before, monkeypatch):
    monkeypatch.setenv("OVERDRIVE_ATTENTION", "")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    try:
        with loop.deterministic(True, torch.device("cuda")):
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            assert os.environ["OVERDRIVE_ATTENTION"] == "flash"
        assert torch.are_deterministic_algorithms_enabled() == before[0]
        assert torch.is_deterministic_algorithms_warn_only_enabled() == before[1]
        assert os.environ["OVERDRIVE_ATTENTION"] == ""
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    finally:
        torch.use_deterministic_algorithms(False)


def test_settings_survive_a_checkpoint_and_tell_what_differs():
    run = settings(config(groups=1), minutes=2.0, texts=["a"])
    assert Settings.from_dict(run.to_dict()) == run
    assert conflict(run, run) is None
    assert conflict(run, settings(config(groups=1), steps=9, recompute=True)) is None
    assert conflict(run, settings(config())) == ("groups", 1, 2)
    assert conflict(run, settings(config(groups=1), learning_rate=1.0)) == ("learning_rate", 3e-3, 1.0)


def test_the_library_of_training_needs_no_command_line():
    code = (
        "import sys, overdrive.train, overdrive.models\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('typer', 'rich', 'matplotlib') or m.startswith('overdrive.cli')])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout.strip() == "[]"
