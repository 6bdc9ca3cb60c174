"""Files that are whole at any moment, and checkpoints kept in them."""

from __future__ import annotations

import contextlib
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

from overdrive.models.language import LanguageModel, build
from overdrive.train.settings import Settings

FORMAT = "overdrive checkpoint 1"


class CheckpointError(ValueError):
    """A file that is no checkpoint of this program, is damaged, or belongs to another model."""


class DiskError(RuntimeError):
    """A file could not be written."""


@contextlib.contextmanager
def disk_errors(path: Path, advice: str = "") -> Iterator[None]:
    """Report an OSError, and what torch's writer makes of one, as a DiskError that names `path`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        raise DiskError(f"{path} could not be written: {cause.strerror}. {advice}".rstrip()) from error


def replace_file(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Put what `write` writes in the place of `path`, all of it or nothing, whenever the process or the machine dies.

    It goes into a temporary file in the same folder, to the disk, and then takes the name. DiskError if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.writing")  # one name: what a killed process left is overwritten
    with disk_errors(path, "What was there before is untouched." if path.exists() else ""):
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name itself
        finally:
            os.close(folder)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint in the place of an older one; see replace_file."""
    replace_file(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def load(path: Path, keys: tuple[str, ...] = ()) -> dict[str, Any]:
    """What `save` wrote, on the CPU. CheckpointError, which names the file, if it is missing, damaged or something else.

    Nothing in the file is executed: it is read by torch.load(weights_only=True). keys: what it must hold.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch writes checksums and does not read them
        if damaged is not None:
            raise CheckpointError(f"{path} is damaged: the checksum of {damaged} is wrong.")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except (zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(f"{path} is truncated, or no checkpoint at all: {error}.") from error
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} holds more than the tensors and numbers of a checkpoint; it was not loaded.") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or not state.keys() >= {"settings", "model", *keys}:
        raise CheckpointError(f"{path} is no checkpoint of overdrive train.")
    return state


@contextlib.contextmanager
def of_another_run(path: Path) -> Iterator[None]:
    """Report what goes wrong in using the values of a checkpoint as a CheckpointError that names it."""
    try:
        yield
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} does not fit: {error}") from error


def read_settings(path: Path) -> Settings:
    """Settings of the run that a checkpoint is of; CheckpointError as from `load`."""
    state = load(path)
    with of_another_run(path):
        return Settings.from_dict(state["settings"])


def read_model(path: Path, device: torch.device) -> LanguageModel:
    """The model of a checkpoint, in the precision it was trained in; CheckpointError as from `load`, or if its parameters are not
    those of its settings.
    """
    state = load(path)
    with of_another_run(path):
        model = build(Settings.from_dict(state["settings"]).model, device, state["model"]["embedding"].dtype)
        model.load_state_dict(state["model"])
        return model
