"""A run that stopped and went on is the run that never stopped, to the last bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from overdrive.models.config import KINDS
from overdrive.train import load, save
from tests.train.runs import assert_same_checkpoints, config, numbers, settings, train, trainer

RUNS = {
    "bf16": {},
    "bf16, accumulated": {"accumulate": 3},
    "bf16, float32 parameters": {"amp": True},
    "delayed": {"recipe": "delayed"},
    "delayed, accumulated": {"recipe": "delayed", "accumulate": 3},
    "delayed, accumulated, recomputed": {"recipe": "delayed", "accumulate": 2, "recompute": True},
    "delayed, accumulated, recomputed, float32": {"recipe": "delayed", "accumulate": 2, "recompute": True, "amp": True},
    "current, accumulated": {"recipe": "current", "accumulate": 2},
    "block, accumulated, recomputed": {"recipe": "block", "accumulate": 2, "recompute": True},
}


class Killed(Exception):
    """Ends a run without a checkpoint."""


def scramble() -> None:
    """Leave torch's generators in another state than a run that goes on would find."""
    torch.manual_seed(12345)


@pytest.mark.parametrize("name", RUNS)
def test_it_goes_on_bit_for_bit(tmp_path, device, name):
    """With dropout, whose masks come from the generators, and other steps than those of checkpoints to stop at."""
    run = settings(config(dropout=0.1), **RUNS[name])
    expected = train(trainer(run, tmp_path, device), tmp_path, name="whole")
    for stop_at in (1, 4, 5, None):
        scramble()
        rows = train(trainer(run, tmp_path, device), tmp_path, stop_at, name="parts")
        assert rows[-1].step == (stop_at or 6)
    assert numbers(rows) == numbers(expected)
    assert_same_checkpoints(tmp_path / "parts.pt", tmp_path / "whole.pt")


@pytest.mark.parametrize("kind", KINDS)
def test_both_kinds_of_model_go_on(tmp_path, device, kind):
    run = settings(config(kind=kind, dropout=0.1, tied=False), recipe="delayed", accumulate=2)
    expected = train(trainer(run, tmp_path, device), tmp_path, name="whole")
    train(trainer(run, tmp_path, device), tmp_path, 3, name="parts")
    scramble()
    assert numbers(train(trainer(run, tmp_path, device), tmp_path, name="parts")) == numbers(expected)
    assert_same_checkpoints(tmp_path / "parts.pt", tmp_path / "whole.pt")


def test_steps_after_the_last_checkpoint_are_taken_again(tmp_path, device, monkeypatch):
    run = settings(config(dropout=0.1), recipe="delayed")
    expected = train(trainer(run, tmp_path, device), tmp_path, name="whole")
    made = trainer(run, tmp_path, device)
    validate = made.validate

    def die():
        if made.step == 3:
            raise Killed
        return validate()

    monkeypatch.setattr(made, "validate", die)
    with pytest.raises(Killed):
        train(made, tmp_path, name="parts")
    assert load(tmp_path / "parts.pt")["step"] == 2
    scramble()
    assert numbers(train(trainer(run, tmp_path, device), tmp_path, name="parts")) == numbers(expected)
    assert_same_checkpoints(tmp_path / "parts.pt", tmp_path / "whole.pt")


def forget_scales(state):
    for name in [name for name in state["model"] if name.endswith("_extra_state")]:
        del state["model"][name]


def nudge_a_master(state):
    state["optimizer"]["masters"][0] += 1e-4


FORGOTTEN = {
    "generators": lambda state: state["rng"].update({name: torch.Generator(name).get_state() for name in state["rng"]}),
    "FP8 scales": forget_scales,
    "moments": lambda state: state["optimizer"]["adam"]["state"][0]["exp_avg"].zero_(),
    "masters": nudge_a_master,
    "position in the data": lambda state: state.update(step=state["step"] - 1),
}


def delayed(**changes):
    """The run that `stopped` is of."""
    return settings(config(dropout=0.1), recipe="delayed", accumulate=2, **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, device):
    """(rows of a whole run, a folder with the same one up to step 3)."""
    folder = tmp_path_factory.mktemp("stopped")
    train(trainer(delayed(), folder, device), folder, 3)
    return train(trainer(delayed(), folder, device), folder, name="whole"), folder


@pytest.fixture
def stopped(whole, tmp_path):
    """A folder of its own with that run up to step 3."""
    return Path(shutil.copytree(whole[1], tmp_path / "stopped"))


@pytest.mark.parametrize("name", FORGOTTEN)
def test_whatever_is_missing_from_a_checkpoint_shows(whole, stopped, device, name):
    """The tests above would notice."""
    state = load(stopped / "run.pt")
    FORGOTTEN[name](state)
    save(stopped / "run.pt", state)
    rows = train(trainer(delayed(), stopped, device), stopped)
    assert [row.gradient_norm for row in rows[-3:]] != [row.gradient_norm for row in whole[0][-3:]]


def test_what_may_change_changes_no_number(whole, stopped, device):
    changes = {"texts": ["/elsewhere/text.txt"], "recipes": ["bf16", "delayed"]}
    changed = delayed(recompute=True, validate_every=1, save_every=1, **changes)
    rows = train(trainer(changed, stopped, device), stopped)
    assert [row.loss for row in rows] == [row.loss for row in whole[0]]
    assert rows[-1].validation_loss == whole[0][-1].validation_loss


def test_more_steps_stretch_the_schedule(tmp_path, device):
    train(trainer(settings(steps=4), tmp_path, device), tmp_path)
    rows = train(trainer(settings(steps=8), tmp_path, device), tmp_path)
    assert [row.step for row in rows] == list(range(1, 9))
    assert rows[4].learning_rate > rows[3].learning_rate
    assert rows[7].learning_rate < rows[6].learning_rate < rows[5].learning_rate


def test_a_finished_run_stays_as_it_is(tmp_path, device):
    train(trainer(settings(), tmp_path, device), tmp_path)
    before = (tmp_path / "run.pt").read_bytes()
    train(trainer(settings(), tmp_path, device), tmp_path)
    assert (tmp_path / "run.pt").read_bytes() == before
