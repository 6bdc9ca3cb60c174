"""What a command of the bench hands back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Outcome:
    """rows: what was measured, in values that JSON can hold. skipped: what was not, and why, in one line each."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


class NothingSelectedError(ValueError):
    """No name contains what was asked for."""


def selected(names: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """The names that are, or else contain, any of `wanted`; all of them where nothing is wanted."""
    names, wanted = list(names), list(wanted)
    kept = set() if wanted else set(names)
    for text in wanted:
        found = {text} & set(names) or {name for name in names if text in name}
        if not found:
            raise NothingSelectedError(f"{text!r} is part of no name; there are {', '.join(names)}.")
        kept |= found
    return [name for name in names if name in kept]
