"""`overdrive train` and `overdrive generate`: whole runs, refusals, and runs that are ended from outside."""

from __future__ import annotations

import errno
import math
import os
import random
import signal
import time

import pytest
import torch
from typer.testing import CliRunner

from overdrive import models
from overdrive.cli import train
from overdrive.cli.main import app
from overdrive.models.config import KINDS
from overdrive.train import checkpoint, load, log, loop, save
from tests.train.process import start
from tests.train.runs import SENTENCES, assert_same_checkpoints, numbers

TINY = ["--layers", "1", "--hidden", "32", "--heads", "2", "--sequence", "16", "--batch", "2", "--size", "tiny", "--deterministic"]


def invoke(*arguments: object):
    """Run the command with a terminal wide enough for its longest line."""
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, [*map(str, arguments)])


@pytest.fixture
def text(tmp_path):
    """A text file."""
    path = tmp_path / "text.txt"
    path.write_bytes(SENTENCES)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a short run of two recipes, and what was printed."""
    folder = tmp_path_factory.mktemp("finished")
    text = folder / "text.txt"
    text.write_bytes(SENTENCES)
    flags = ["--steps", "20", "--validate-every", "10", "--warmup", "2", "--recipe", "bf16", "--recipe", "delayed"]
    found = invoke("train", text, *TINY, *flags, "--out", folder / "run")
    assert found.exit_code == 0, found.output
    return folder, found.output


def test_a_run_prints_its_progress_and_leaves_logs_chart_and_checkpoints(finished):
    folder, output = finished
    assert sorted(os.listdir(folder / "run")) == ["bf16.csv", "bf16.pt", "delayed.csv", "delayed.pt", "loss.png"]
    assert (folder / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    for recipe in ("bf16", "delayed"):
        rows = log.read(folder / "run" / f"{recipe}.csv")
        assert [row.step for row in rows] == list(range(1, 21))
        assert [row.step for row in rows if row.validation_loss is not None] == [10, 20]
        assert load(folder / "run" / f"{recipe}.pt")["step"] == 20
        for step in (10, 20):
            row = rows[step - 1]
            assert f"{recipe} step {step}: loss {row.loss:.3f} val {row.validation_loss:.3f}" in output
        assert f"{rows[-1].validation_loss:.4f}" in output
    assert "1 layers, hidden 32, 2 heads" in output
    assert f"overdrive generate {folder / 'run' / 'delayed.pt'}" in output


def test_recipes_begin_alike_and_differ_by_rounding(finished):
    plain, quantized = (log.read(finished[0] / "run" / f"{recipe}.csv") for recipe in ("bf16", "delayed"))
    assert [row.loss for row in plain] != [row.loss for row in quantized]
    assert quantized[-1].validation_loss == pytest.approx(plain[-1].validation_loss, rel=0.02)


def test_compare_trains_with_every_recipe_that_runs_here(text, tmp_path, monkeypatch):
    usable = train.usable
    monkeypatch.setattr(train, "usable", lambda recipe: (False, "no") if recipe.float8_block_scaling() else usable(recipe))
    found = invoke("train", text, *TINY, "--steps", 2, "--compare", "--out", tmp_path / "run")
    assert found.exit_code == 0, found.output
    assert {path.stem for path in (tmp_path / "run").glob("*.pt")} == {"bf16", "delayed", "current"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_standard_library_is_the_default_and_every_switch_works(kind, tmp_path):
    flags = ["--model", kind, "--amp", "--recompute", "--accumulate", 2, "--untied", "--dropout", 0.1, "--clip", 0, "--seed", 3]
    found = invoke("train", *TINY, *flags, "--steps", 2, "--out", tmp_path / "run")
    assert found.exit_code == 0, found.output
    settings = load(tmp_path / "run" / "delayed.pt")["settings"]
    assert settings["texts"] == []
    assert (settings["amp"], settings["recompute"], settings["accumulate"], settings["clip"]) == (True, True, 2, 0.0)
    assert (settings["model"]["kind"], settings["model"]["tied"], settings["model"]["dropout"]) == (kind, False, 0.1)


def test_recipes_that_were_not_asked_for_by_name_must_run_here_too(text, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "usable", lambda recipe: (False, "this chip is too old"))
    found = invoke("train", text, *TINY, "--steps", 2, "--out", tmp_path / "run")
    refused(found, "--recipe", "'delayed' cannot run here: this chip is too old")


def test_time_that_is_up_is_mentioned(text, tmp_path):
    found = invoke("train", text, *TINY, "--steps", 100_000, "--minutes", 0.01, "--out", tmp_path / "run")
    assert found.exit_code == 0, found.output
    step = load(tmp_path / "run" / "delayed.pt")["step"]
    assert f"delayed: the time was up after {step} of 100000 steps" in found.output


def test_flags_win_over_the_size(text, tmp_path):
    assert invoke("train", text, *TINY, "--steps", 1, "--out", tmp_path / "run").exit_code == 0
    settings = load(tmp_path / "run" / "delayed.pt")["settings"]
    assert settings["minutes"] is None, "--steps replaces the size's minutes"
    assert (settings["batch"], settings["model"]["layers"], settings["model"]["ffn"]) == (2, 1, 128)


def test_resuming_with_more_steps_goes_on(text, tmp_path):
    run = ["train", text, *TINY, "--out", tmp_path / "run"]
    assert invoke(*run, "--steps", 3).exit_code == 0
    found = invoke("train", "--resume", "--steps", 5, "--out", tmp_path / "run")
    assert found.exit_code == 0, found.output
    assert [row.step for row in log.read(tmp_path / "run" / "delayed.csv")] == [1, 2, 3, 4, 5]


def test_resuming_adds_recipes_that_have_not_run(text, tmp_path):
    assert invoke("train", text, *TINY, "--steps", 2, "--out", tmp_path / "run").exit_code == 0
    before = (tmp_path / "run" / "delayed.pt").read_bytes()
    found = invoke("train", "--resume", "--recipe", "bf16", "--recipe", "delayed", "--out", tmp_path / "run")
    assert found.exit_code == 0, found.output
    assert load(tmp_path / "run" / "bf16.pt")["step"] == 2
    assert (tmp_path / "run" / "delayed.pt").read_bytes() == before


def test_resuming_what_never_began_begins(text, tmp_path):
    found = invoke("train", text, *TINY, "--steps", 2, "--resume", "--out", tmp_path / "run")
    assert found.exit_code == 0, found.output
    assert f"No checkpoint in {tmp_path / 'run'} yet: the run starts." in found.output


def refused(found, *words: str) -> None:
    """A usage error that says all of `words`."""
    assert found.exit_code == 2, found.output
    for word in words:
        assert word in found.output


def test_a_run_is_not_overwritten_unasked(text, tmp_path):
    run = ["train", text, *TINY, "--steps", 1, "--out", tmp_path / "run"]
    assert invoke(*run).exit_code == 0
    before = (tmp_path / "run" / "delayed.pt").read_bytes()
    refused(invoke(*run), "--out", "holds a run", "--resume", "--overwrite")
    refused(invoke(*run, "--resume", "--overwrite"), "--overwrite", "--resume")
    refused(invoke(*run, "--overwrite", "--heads", 5), "--heads")
    assert (tmp_path / "run" / "delayed.pt").read_bytes() == before
    assert invoke(*run, "--overwrite", "--recipe", "bf16").exit_code == 0
    assert {path.name for path in (tmp_path / "run").glob("*.pt")} == {"bf16.pt"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--heads", "7"], ("--heads", "7 heads do not divide the hidden size 32")),
        (["--groups", "3"], ("--groups", "3 groups")),
        (["--sequence", "100000"], ("--sequence", "100000", "at least 200002")),
        (["--sequence", "0"], ("--sequence", "at least 1")),
        (["--recipe", "fp3"], ("--recipe", "'fp3'", "bf16, delayed, current, block")),
        (["--recipe", "mxfp8"], ("--recipe", "'mxfp8' cannot run here", "not built")),
        (["--recipe", "bf16", "--compare"], ("--compare", "--recipe")),
        (["--model", "rnn"], ("--model", "'rnn'", "gpt, llama")),
        (["--size", "175B"], ("--size", "'175B'", "124M")),
        (["--learning-rate", "nan"], ("--learning-rate", "nan", "from 0.0 to 10.0")),
        (["--dropout", "2"], ("--dropout", "from 0.0 to 1.0")),
        (["--minutes", "0"], ("--minutes", "from 0.01")),
        (["--minutes", "inf"], ("--minutes", "'inf'")),
        (["--steps", "0"], ("--steps", "at least 1")),
        (["--steps", "many"], ("--steps", "'many'")),
        (["--accumulate", "0"], ("--accumulate", "at least 1")),
        (["--seed", str(2**64)], ("--seed", "from 0 to")),
        (["--device", "abacus"], ("--device", "cpu")),
    ],
)
def test_a_bad_flag_is_named_with_what_came_and_what_is_allowed(text, tmp_path, flags, words):
    refused(invoke("train", text, *TINY, *flags, "--out", tmp_path / "run"), *words)
    assert not list(tmp_path.glob("run/*"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ("cannot be read", "No such file")),
        (b"", ("is empty",)),
        (b"MZ\0\0", ("is binary", "byte 2 is NUL")),
        ("folder", ("is a folder",)),
    ],
    ids=["missing", "empty", "binary", "folder"],
)
def test_a_bad_text_is_named(tmp_path, content, words):
    path = tmp_path / "story.txt"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    refused(invoke("train", path, *TINY, "--out", tmp_path / "run"), "'TEXT'", str(path), *words)


def test_an_out_that_is_a_file_is_refused(text):
    refused(invoke("train", text, *TINY, "--out", text), "--out", str(text))
    refused(invoke("train", text, *TINY, "--out", text / "below"), "--out", "cannot be made")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--hidden", "64"], ("--hidden", "64 came", "has 32")),
        (["--model", "llama"], ("--model", "'llama' came", "has 'gpt'")),
        (["--size", "124M"], ("--layers", "12 came", "has 1")),
        (["--learning-rate", "0.5"], ("--learning-rate", "0.5 came", "has 0.003")),
        (["--batch", "4"], ("--batch", "4 came", "has 2")),
        (["--accumulate", "2"], ("--accumulate", "2 came", "has 1")),
        (["--seed", "1"], ("--seed", "1 came", "has 0")),
        (["--amp"], ("--amp", "True came", "has False")),
        (["--warmup", "9"], ("--warmup", "9 came", "has 2")),
    ],
)
def test_a_resumed_run_keeps_what_its_numbers_depend_on(finished, flags, words):
    refused(invoke("train", "--resume", "--out", finished[0] / "run", *flags), *words)


def test_a_resumed_run_keeps_its_text(finished, tmp_path):
    same, other = tmp_path / "same.txt", tmp_path / "other.txt"
    same.write_bytes(SENTENCES)
    other.write_bytes(SENTENCES[::-1])
    assert invoke("train", same, "--resume", "--out", finished[0] / "run").exit_code == 0
    refused(invoke("train", other, "--resume", "--out", finished[0] / "run"), "'TEXT'", "another text")


def test_a_resumed_run_names_a_bad_checkpoint(text, tmp_path):
    assert invoke("train", text, *TINY, "--steps", 1, "--out", tmp_path / "run").exit_code == 0
    path = tmp_path / "run" / "delayed.pt"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    refused(invoke("train", "--resume", "--out", tmp_path / "run"), "--resume", str(path), "truncated")
    path.write_bytes(data)
    state = load(path)
    state["model"]["embedding"] = torch.zeros(256, 64)
    save(path, state)
    refused(
        invoke("train", "--resume", "--steps", 2, "--out", tmp_path / "run"), "--resume", str(path), "size mismatch", "embedding"
    )


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(text, tmp_path, monkeypatch):
    torch_save, run = torch.save, ["train", text, *TINY, "--steps", 6, "--save-every", 2, "--out", tmp_path / "run"]

    def full(state, file):
        torch_save(state, file)
        if state["step"] == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint.torch, "save", full)
    found = invoke(*run)
    assert found.exit_code == 1
    assert f"{tmp_path / 'run' / 'delayed.pt'} could not be written: No space left on device" in found.output
    assert "Traceback" not in found.output
    assert load(tmp_path / "run" / "delayed.pt")["step"] == 2
    assert not list(tmp_path.glob("run/.*"))
    monkeypatch.undo()
    assert invoke("train", "--resume", "--out", tmp_path / "run").exit_code == 0
    assert load(tmp_path / "run" / "delayed.pt")["step"] == 6


def test_a_run_that_diverges_says_so(text, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "cosine", lambda *_: math.nan)
    found = invoke("train", text, *TINY, "--out", tmp_path / "run")
    assert found.exit_code == 1
    assert "Step 2 has loss nan and gradient norm nan: training diverged. Take a lower learning rate" in found.output
    assert load(tmp_path / "run" / "delayed.pt")["step"] == 0


def test_generate_writes_the_prompt_and_as_many_bytes_as_asked(finished):
    path = finished[0] / "run" / "bf16.pt"
    greedy = [invoke("generate", path, "--prompt", "12 bott", "--tokens", 30, "--temperature", 0) for _ in range(2)]
    assert greedy[0].exit_code == 0, greedy[0].output
    assert greedy[0].output == greedy[1].output
    assert greedy[0].output.startswith("12 bott")
    anew = invoke("generate", path, "--prompt", "12 bott", "--tokens", 30, "--temperature", 0, "--no-cache")
    assert anew.output == greedy[0].output
    assert invoke("generate", path, "--prompt", "abc", "--tokens", 0).output == "abc\n"
    drawn = {invoke("generate", path, "--tokens", 40, "--temperature", 1.5, "--top-p", 1, "--seed", s).output for s in (1, 1, 2)}
    assert len(drawn) == 2


def test_generate_streams_whole_characters(finished, monkeypatch):
    monkeypatch.setattr(models, "generate", lambda *_: iter("né€\n".encode() + b"\xff"))
    assert invoke("generate", finished[0] / "run" / "bf16.pt", "--prompt", "ü").output == "üné€\n\ufffd\n"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tokens", "-1"], ("--tokens", "at least 0")),
        (["--temperature", "-2"], ("--temperature", "from 0 to 100")),
        (["--top-p", "1.5"], ("--top-p", "from 0 to 1")),
        (["--seed", "-1"], ("--seed", "from 0 to")),
        (["--device", "abacus"], ("--device", "cpu")),
    ],
)
def test_generate_names_a_bad_flag(finished, flags, words):
    refused(invoke("generate", finished[0] / "run" / "bf16.pt", *flags), *words)


def test_generate_names_a_bad_checkpoint(finished, tmp_path):
    path = tmp_path / "run.pt"
    refused(invoke("generate", path), "'CHECKPOINT'", str(path), "No such file")
    data = (finished[0] / "run" / "bf16.pt").read_bytes()
    path.write_bytes(data[:-100])
    refused(invoke("generate", path), "'CHECKPOINT'", str(path), "truncated")
    path.write_bytes(data)
    state = load(path)
    state["settings"]["model"]["layers"] = 2
    save(path, state)
    refused(invoke("generate", path), "'CHECKPOINT'", str(path), "Missing key")


# --- ended from outside ---------------------------------------------------------------------------------------------------------


def command(text, folder, steps):
    """A run that saves at every step, and goes on if it has begun."""
    flags = ["--recipe", "delayed", "--dropout", 0.1, "--accumulate", 2, "--save-every", 1, "--validate-every", 1000, "--resume"]
    return ["train", text, *TINY, *flags, "--steps", steps, "--out", folder]


def saved(path) -> int:
    """When a checkpoint was written."""
    return path.stat().st_mtime_ns if path.exists() else -1


def wait_for_saves(process, path, count: int) -> None:
    """Return when the checkpoint has been replaced `count` times, or the process has ended."""
    last, deadline = saved(path), time.monotonic() + 120
    while count and process.is_alive():
        assert time.monotonic() < deadline, "no checkpoint in two minutes"
        if saved(path) != last:
            last, count = saved(path), count - 1
        time.sleep(0.001)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_the_run_well(text, tmp_path, kind):
    path, output = tmp_path / "run" / "delayed.pt", tmp_path / "output"
    process = start(command(text, tmp_path / "run", 100_000), output)
    wait_for_saves(process, path, 3)
    os.kill(process.pid, kind)
    process.join(60)
    assert process.exitcode == 0, output.read_text()
    assert f"overdrive train --resume --out {tmp_path / 'run'}" in " ".join(output.read_text().split())
    rows = log.read(tmp_path / "run" / "delayed.csv")
    assert load(path)["step"] == rows[-1].step >= 2


def kill_often(text, tmp_path, kills: int) -> None:
    """Kill a run `kills` times at random moments, most within a step or the writing of its checkpoint; it must lose nothing."""
    steps, chance, folder, output = 10 * kills, random.Random(kills), tmp_path / "killed", tmp_path / "output"
    path, reached = folder / "delayed.pt", -1
    for number in range(kills):
        process = start(command(text, folder, steps), output)
        if number:
            wait_for_saves(process, path, chance.randint(1, 3))
        time.sleep(chance.random() * 0.05)
        assert process.is_alive(), output.read_text()
        process.kill()
        process.join()
        if path.exists():
            step = load(path)["step"]
            assert step >= reached, "steps were lost that had been saved"
            reached = step
    assert 0 < reached < steps
    for name in ("killed", "whole"):
        process = start(command(text, tmp_path / name, steps), output)
        process.join(250)
        assert process.exitcode == 0, output.read_text()
    killed, whole = (log.read(tmp_path / name / "delayed.csv") for name in ("killed", "whole"))
    assert numbers(killed) == numbers(whole)
    assert len(whole) == steps
    assert_same_checkpoints(path, tmp_path / "whole" / "delayed.pt")


def test_a_run_that_is_killed_loses_only_steps_since_its_last_checkpoint(text, tmp_path):
    kill_often(text, tmp_path, 5)


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times(text, tmp_path):
    kill_often(text, tmp_path, 20)
