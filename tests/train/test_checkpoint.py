"""Files that are whole at any moment, and what a checkpoint that is not one says."""

from __future__ import annotations

import builtins
import errno
import os
import pickle
import stat

import pytest
import torch

from overdrive.train import CheckpointError, DiskError, Log, Row, checkpoint, load, read_model, read_settings, save
from overdrive.train.checkpoint import FORMAT, replace_file
from tests.train.runs import config, settings, train, trainer

STATE = {"settings": {}, "model": {"weight": torch.arange(50000.0)}}


@pytest.fixture
def saved(tmp_path):
    """A checkpoint, alone in its folder."""
    path = tmp_path / "folder" / "run.pt"
    path.parent.mkdir()
    save(path, STATE)
    return path


def test_it_holds_what_was_saved(saved):
    state = load(saved)
    assert torch.equal(state["model"]["weight"], STATE["model"]["weight"])
    assert state["format"] == FORMAT
    assert os.listdir(saved.parent) == ["run.pt"]


def test_a_reader_keeps_what_it_opened(saved):
    with saved.open("rb") as reader:
        before = saved.read_bytes()
        save(saved, {**STATE, "step": 7})
        assert reader.read() == before
    assert load(saved)["step"] == 7


def test_the_new_file_is_on_the_disk_before_it_takes_the_name(saved, monkeypatch):
    """Data, then the name, then the folder: the order that survives a power cut."""
    order = []

    def fsync(descriptor):
        order.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")

    def replace(source, target):
        order.append("name")
        assert os.path.dirname(source) == os.path.dirname(target)
        os.rename(source, target)

    monkeypatch.setattr(checkpoint.os, "fsync", fsync)
    monkeypatch.setattr(checkpoint.os, "replace", replace)
    save(saved, STATE)
    assert order == ["file", "name", "folder"]


def test_what_a_killed_process_left_is_overwritten(saved):
    (saved.parent / ".run.pt.writing").write_bytes(b"half")
    save(saved, {**STATE, "step": 2})
    assert os.listdir(saved.parent) == ["run.pt"]


class FullDisk:
    """Opens files that take no more than `room` bytes."""

    def __init__(self, room: int) -> None:
        self.room = room

    def __call__(self, path, mode):
        self.file = builtins.open(path, mode)  # noqa: SIM115
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.file.close()

    def write(self, data):
        data = memoryview(data).cast("B")
        self.file.write(data[: self.room])
        if len(data) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(data)
        return len(data)

    def flush(self):
        self.file.flush()

    def fileno(self):
        return self.file.fileno()


@pytest.mark.parametrize("room", [0, 1, 100, 1000, 100_000, 199_990, 200_400])
def test_a_full_disk_leaves_the_old_checkpoint(saved, monkeypatch, room):
    before = saved.read_bytes()
    assert len(before) > 200_400
    monkeypatch.setattr(checkpoint, "open", FullDisk(room), raising=False)
    with pytest.raises(DiskError, match=r"run\.pt could not be written: No space left.*What was there before is untouched"):
        save(saved, {**STATE, "step": 2})
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == ["run.pt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_late_leaves_the_old_checkpoint(saved, monkeypatch, call):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    before = saved.read_bytes()
    monkeypatch.setattr(checkpoint.os, call, fail)
    with pytest.raises(DiskError, match="Input/output error"):
        save(saved, {**STATE, "step": 2})
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == ["run.pt"]


def test_a_bug_is_not_called_a_full_disk(saved):
    def bug(file):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match=r"^a bug$"):
        replace_file(saved, bug)


def test_a_full_disk_under_the_log_is_named(tmp_path):
    with Log(tmp_path / "log.csv") as log:
        log._file.close()
        log._file = FullDisk(10)(tmp_path / "log.csv", "ab")
        with pytest.raises(DiskError, match=r"log\.csv could not be written: No space left"):
            log.write([Row(1, 2.0, 1.0, 1e-3, 1e6, 0.1)])


def refused(path, words):
    """Every reader refuses `path` and names it."""
    for reader in (load, read_settings, lambda path: read_model(path, torch.device("cpu"))):
        with pytest.raises(CheckpointError, match=words) as caught:
            reader(path)
        assert path.name in str(caught.value)


@pytest.mark.parametrize("part", [0, 0.0001, 0.3, 0.7, 0.999, 0.99999])
def test_a_truncated_checkpoint_is_refused(saved, part):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(len(data) * part)])
    refused(saved, "is truncated, or no checkpoint at all")


def test_a_damaged_checkpoint_is_refused(saved):
    data = bytearray(saved.read_bytes())
    data[len(data) // 2] ^= 4
    saved.write_bytes(data)
    refused(saved, "is damaged: the checksum of .* is wrong")


def test_a_missing_checkpoint_is_named(tmp_path):
    refused(tmp_path / "nowhere.pt", "cannot be read: No such file")


@pytest.mark.parametrize("content", [b"hello " * 1000, pickle.dumps({"format": FORMAT})], ids=["text", "pickle"])
def test_another_file_is_refused(tmp_path, content):
    path = tmp_path / "run.pt"
    path.write_bytes(content)
    refused(path, "no checkpoint at all")


@pytest.mark.parametrize("other", [{"weight": torch.ones(2)}, [1, 2], {"format": FORMAT, "model": {}}, {"format": "else", **STATE}])
def test_another_programs_checkpoint_is_refused(tmp_path, other):
    torch.save(other, tmp_path / "run.pt")
    refused(tmp_path / "run.pt", "is no checkpoint of overdrive train")


class Bomb:
    """Calls `exec` when unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    torch.save({"format": FORMAT, **STATE, "bomb": Bomb()}, tmp_path / "run.pt")
    refused(tmp_path / "run.pt", "holds more than the tensors and numbers")


def change(path, edit):
    """Rewrite a checkpoint after `edit(state)`."""
    state = load(path)
    edit(state)
    save(path, state)


def grow(state):
    state["settings"]["model"]["hidden"] = 64


EDITS = {
    "another model": (grow, "size mismatch"),
    "a parameter is missing": (lambda state: state["model"].pop("position"), "Missing key.*position"),
    "unknown settings": (lambda state: state["settings"]["model"].update(wings=2), "wings"),
    "impossible settings": (lambda state: state["settings"]["model"].update(heads=5), "5 heads do not divide"),
    "no embedding": (lambda state: state["model"].pop("embedding"), "embedding"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_checkpoint_that_contradicts_itself_is_refused(tmp_path, name):
    edit, words = EDITS[name]
    train(trainer(settings(steps=2), tmp_path, "cpu"), tmp_path)
    path = tmp_path / "run.pt"
    change(path, edit)
    with pytest.raises(CheckpointError, match=f"(?s)run.pt does not fit: .*{words}"):
        read_model(path, torch.device("cpu"))


RESUMED = {
    "another model": (grow, "hidden=64, not 32"),
    "parameters of another model": (lambda state: state["model"].update(embedding=torch.zeros(256, 64)), "size mismatch"),
    "no optimizer state": (lambda state: state["optimizer"].pop("adam"), "adam"),
    "masters of another model": (lambda state: state["optimizer"]["masters"].pop(), "other shapes"),
    "another seed": (lambda state: state["settings"].update(seed=5), "seed=5, not 0"),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_only_from_its_own_checkpoint(tmp_path, name):
    edit, words = RESUMED[name]
    train(trainer(settings(steps=2), tmp_path, "cpu"), tmp_path)
    path = tmp_path / "run.pt"
    change(path, edit)
    with pytest.raises(CheckpointError, match=f"(?s)run.pt does not fit: .*{words}"):
        trainer(settings(steps=2), tmp_path, "cpu").resume(path)


def test_the_model_comes_back_as_it_was_trained(tmp_path):
    for amp, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        made = trainer(settings(config(tied=False), steps=3, amp=amp), tmp_path, "cpu")
        save(tmp_path / "run.pt", made.state_dict())
        model = read_model(tmp_path / "run.pt", torch.device("cpu"))
        assert {p.dtype for p in model.parameters()} == {dtype}
        for name, tensor in made.model.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name
        assert read_settings(tmp_path / "run.pt") == made.settings
