"""The record of a run: a CSV file with one row a step."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from overdrive.train.checkpoint import disk_errors, replace_file


@dataclasses.dataclass
class Row:
    """What a step showed. step: from 1. Losses in nats per byte. seconds: spent on steps since the run began, not on validation,
    checkpoints and charts. validation_loss: where it was measured after the step.
    """

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens_per_second: float
    seconds: float
    validation_loss: float | None = None


COLUMNS = [field.name for field in dataclasses.fields(Row)]


class Log:
    """Rows in memory and in a file at once. What is in the file beyond step `until` belongs to steps that are taken again."""

    def __init__(self, path: Path, until: int = 0) -> None:
        self.path = path
        self.rows = [row for row in read(path) if row.step <= until] if until else []
        replace_file(path, lambda file: file.write(_lines([COLUMNS, *map(_values, self.rows)])))
        self._file = open(path, "ab")  # noqa: SIM115 (closed by __exit__)

    def write(self, rows: list[Row]) -> None:
        """Append `rows`, for anyone to read at once. DiskError if the disk is full."""
        with disk_errors(self.path):
            self._file.write(_lines(map(_values, rows)))
            self._file.flush()
        self.rows += rows

    def sync(self) -> None:
        """Have all rows on the disk, before a checkpoint that counts on them."""
        with disk_errors(self.path):
            os.fsync(self._file.fileno())

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *exception: Any) -> None:
        with contextlib.suppress(OSError):  # all was flushed; what the disk refused, `write` has reported
            self._file.close()


def _values(row: Row) -> list[Any]:
    return [getattr(row, name) for name in COLUMNS]


def _lines(rows: Iterable[list[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)  # floats in full, None as nothing
    return text.getvalue().encode()


def read(path: Path) -> list[Row]:
    """The rows of a log, up to the first that is not whole; none if there is no file."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    rows = []
    for values in csv.reader(line for line in lines[1:] if line.endswith("\n")):
        try:
            step, loss, norm, rate, speed, seconds = int(values[0]), *map(float, values[1:6])
            rows.append(Row(step, loss, norm, rate, speed, seconds, float(values[6]) if values[6] else None))
        except (ValueError, IndexError):
            break
    return rows
