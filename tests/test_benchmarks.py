"""The scripts in benchmarks/ that run without a GPU do so."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def test_generation(monkeypatch, tmp_path):
    """What is eager, with every sequence's logits checked; a failure would be an entry of "failed", not an exception."""
    pytest.importorskip("transformers", minversion="4.56")
    sizes = "--hidden 64 --layers 3 --heads 4 --groups 2 --ffn 128 --vocabulary 300 --context 64 --prompt 32 --tokens 4 --rounds 1"
    options = [*sizes.split(), "--batches", "1", "3", "--only", "eager", "--device", "cpu", "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["generation.py", *options])
    runpy.run_path(str(FOLDER / "generation.py"), run_name="__main__")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["weight_bytes"]["FP8"] < found["weight_bytes"]["bf16"]
    for row in found["rows"]:
        assert row["failed"] == {}
        assert row["times"].keys() == row["errors"].keys() == {"transformers eager", "overdrive eager", "overdrive FP8 eager"}
