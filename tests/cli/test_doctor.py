"""`overdrive doctor`: everything a bug report needs, in Markdown and in JSON."""

import json

import pytest
import torch
from typer.testing import CliRunner

import overdrive.pytorch as te
from overdrive.cli import doctor
from overdrive.cli.main import app
from overdrive.cli.recipes import RECIPES
from overdrive.scaling.support import usable


def said(*flags: str) -> str:
    """What the command prints."""
    found = CliRunner().invoke(app, ["doctor", *flags])
    assert found.exit_code == 0, found.output
    return found.output


def test_json_holds_versions_devices_and_every_answer():
    found = json.loads(said("--json"))
    assert found["versions"]["overdrive"] == te.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert len(found["devices"]) == 1 + torch.cuda.device_count()
    assert set(found["recipes"]) == {name.value for name in RECIPES}
    assert set(found["attention backends"]) == set(te.attention_backends())


@pytest.mark.parametrize("section", ["recipes", "attention backends", "optional kernels"])
def test_whatever_is_not_usable_has_a_reason(section):
    for name, answer in json.loads(said("--json"))[section].items():
        assert answer["usable"] or answer["reason"], name


def test_markdown_says_the_same():
    text = said()
    assert text.startswith("# overdrive doctor\n")
    for heading in ("Versions", "Devices", "Recipes", "Attention backends", "Optional kernels"):
        assert f"\n## {heading}\n" in text
    for name, recipe in RECIPES.items():
        assert f"\n- {name.value}: {'yes' if usable(recipe)[0] else 'no'}" in text


def test_variables_that_are_set_are_reported(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert doctor.examine()["environment"]["CUDA_VISIBLE_DEVICES"] == "3"
    assert "- CUDA_VISIBLE_DEVICES: 3" in said()


def test_the_driver_is_asked_for_and_its_failure_told(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 580.95.05\necho 580.95.05\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.driver() == "580.95.05"
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert doctor.driver().startswith("unknown (")
    tool.unlink()
    assert doctor.driver() == "none"
