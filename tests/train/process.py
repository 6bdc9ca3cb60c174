"""Commands in processes of their own that need not import torch first: they are forked from a server that has."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["overdrive.cli.main", "matplotlib.figure", "matplotlib.backends.backend_agg"])


def run_command(arguments: list[str], output: str) -> None:
    """`overdrive <arguments>`, what it prints going to the file `output`; the process's main function."""
    from overdrive.cli.main import app

    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    with contextlib.suppress(OSError):
        sys.stdin.close()
    app(arguments)


def start(arguments: list[object], output: Path) -> multiprocessing.process.BaseProcess:
    """Start `overdrive <arguments>`."""
    process = CONTEXT.Process(target=run_command, args=([str(a) for a in arguments], str(output)))
    process.start()
    return process
