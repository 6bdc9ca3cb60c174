"""Text as bytes: read, checked, split into what is learned from and what is held out, drawn from in batches."""

from __future__ import annotations

import hashlib
import random
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from overdrive.models.config import ArgumentError

HELD_OUT = 0.05


def standard_library() -> list[Path]:
    """The sources of this Python's standard library, without what is installed into it and its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    others = {"site-packages", "dist-packages", "test", "tests"}
    sources = sorted(path for path in root.rglob("*.py") if not others & {*path.relative_to(root).parts})
    found = [path for path in sources if path.stat().st_size]
    if not found:
        raise ArgumentError("texts", f"This Python has no sources of its standard library in {root}; name text files to train on.")
    return found


def read(path: Path) -> bytes:
    """What `path` holds. ArgumentError if it is missing, a folder, empty, or binary: has a NUL byte, which no text has in any
    encoding of bytes (UTF-16 and UTF-32 do have them and are refused). Bytes need not be UTF-8.
    """
    try:
        data = path.read_bytes()
    except IsADirectoryError as error:
        raise ArgumentError("texts", f"{str(path)!r} is a folder; name the files in it, such as {path}/*.txt.") from error
    except OSError as error:
        raise ArgumentError("texts", f"{str(path)!r} cannot be read: {error.strerror}.") from error
    if not data:
        raise ArgumentError("texts", f"{str(path)!r} is empty; give text to learn from.")
    if (nul := data.find(b"\0")) >= 0:
        raise ArgumentError(
            "texts", f"{str(path)!r} is binary: byte {nul} is NUL, which text has nowhere. Convert UTF-16 or UTF-32 to UTF-8 first."
        )
    return data


class Text:
    """Bytes to learn from (`training`, u8 [N]) and the last twentieth, held out for validation (`held_out`).

    Windows are `length` + 1 bytes long: the input and, one to the right, what it should predict. ArgumentError if either part is
    shorter than one window.
    """

    def __init__(self, paths: list[Path], length: int) -> None:
        data = b"\n".join(read(path) for path in paths)
        self.sha256, self.length = hashlib.sha256(data).hexdigest(), length
        split = len(data) - max(int(len(data) * HELD_OUT), length + 1)
        if split < length + 1:
            raise ArgumentError(
                "context",
                f"Sequences of {length} bytes need a text of at least {2 * (length + 1)} (one to learn from and one held out); "
                f"this one has {len(data)}. Take shorter sequences or more text.",
            )
        whole = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self.training, self.held_out = whole[:split], whole[split:]

    def batch(self, seed: int, number: int, size: int) -> Tensor:
        """u8 [size, length + 1]: random windows to learn from, the same ones whenever this batch is asked for."""
        draw = random.Random(f"{seed} {number}")
        last = len(self.training) - self.length - 1
        return self._windows(self.training, [draw.randint(0, last) for _ in range(size)])

    def validation(self, count: int, size: int) -> list[Tensor]:
        """`count` batches u8 [size, length + 1] of windows spread evenly over the held-out text."""
        last = len(self.held_out) - self.length - 1
        starts = [round(last * i / max(count * size - 1, 1)) for i in range(count * size)]
        return [self._windows(self.held_out, starts[i * size : (i + 1) * size]) for i in range(count)]

    def _windows(self, text: Tensor, starts: list[int]) -> Tensor:
        return torch.stack([text[start : start + self.length + 1] for start in starts])
