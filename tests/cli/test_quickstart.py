"""`overdrive quickstart` at a tiny size: every stage, real sharing, clear refusals."""

import dataclasses

import pytest
import torch
from typer.testing import CliRunner

import overdrive.cli.main as main
from overdrive.bench.plain import Size
from overdrive.cli import quickstart
from overdrive.cli.recipes import RecipeName

TINY = ["--hidden", "64", "--heads", "4", "--sequence", "32", "--batch", "2", "--iterations", "1", "--warmup", "0"]
SETTINGS = quickstart.Settings(
    size=Size(hidden=64, ffn=256, heads=4, sequence=32, batch=2),
    dtype=torch.float32,
    device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    recipes=(RecipeName.DELAYED, RecipeName.CURRENT, RecipeName.BLOCK),
    dropout=0.1,
    causal=False,
    iterations=1,
    warmup=0,
    seed=0,
)


def invoke(*flags: object):
    """Run the command with a terminal wide enough for its longest line."""
    return CliRunner(env={"COLUMNS": "200"}).invoke(main.app, ["quickstart", *map(str, flags)])


def test_the_command_prints_every_stage_and_saves_the_chart(tmp_path):
    chart = tmp_path / "bars.png"
    found = invoke(*TINY, "--chart", chart)
    assert found.exit_code == 0, found.output
    for stage in quickstart.stages(SETTINGS):
        assert f" {stage.name} " in found.output
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert str(chart) in found.output


@pytest.mark.parametrize("causal", [False, True])
def test_full_precision_agrees_with_the_plain_layer_and_fp8_nearly(causal):
    for result in quickstart.run(dataclasses.replace(SETTINGS, causal=causal)):
        assert result.milliseconds > 0
        assert result.peak_bytes > 0
        low, high = (1e-3, 0.15) if result.name.startswith("FP8") else (0, 1e-4)
        if result.reason:
            continue
        assert low <= result.output_error <= high, result
        assert low <= result.gradient_error <= high, result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_stages_stay_close(dtype):
    for result in quickstart.run(dataclasses.replace(SETTINGS, dtype=dtype, recipes=())):
        assert 0 < result.output_error < 0.02, result
        assert 0 < result.gradient_error < 0.02, result


def test_every_stage_counts_for_the_progress_bar():
    ticks = []
    settings = dataclasses.replace(SETTINGS, recipes=(RecipeName.DELAYED, RecipeName.MXFP8))
    quickstart.run(settings, ticks.append)
    assert len(ticks) == quickstart.PARTS * len(quickstart.stages(settings))


def test_a_stage_that_holds_a_copy_is_caught(monkeypatch, tmp_path):
    def copy_parameters(target, source):
        target.load_state_dict(source.state_dict())

    stages = [dataclasses.replace(quickstart.stages(SETTINGS)[0], name="copier", share=copy_parameters)]
    with pytest.raises(quickstart.NotSharedError, match="copier"):
        quickstart.measure(quickstart.Bench(SETTINGS), stages[0], lambda _: None)
    for module in (main, quickstart):
        monkeypatch.setattr(module, "stages", lambda settings: stages)
    found = invoke(*TINY, "--chart", tmp_path / "no.png")
    assert found.exit_code == 1
    assert "copier" in found.output


def test_an_unusable_recipe_is_reported_with_its_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(quickstart, "usable", lambda recipe: (False, "needs a chip from next year"))
    found = invoke(*TINY, "--recipe", "block", "--chart", tmp_path / "bars.png")
    assert found.exit_code == 0, found.output
    assert "FP8 block is not usable here: needs a chip from next year" in found.output


@pytest.mark.parametrize(
    ("flag", "value", "allowed"),
    [
        ("--hidden", "0", "at least 1"),
        ("--ffn", "-4", "at least 1"),
        ("--batch", "two", "at least 1"),
        ("--sequence", "0", "at least 1"),
        ("--heads", "7", "divide the hidden size 64"),
        ("--warmup", "-1", "at least 0"),
        ("--iterations", "0", "at least 1"),
        ("--dropout", "1.5", "from 0 to 1"),
        ("--dropout", "nan", "from 0 to 1"),
        ("--dtype", "int8", "'bf16'"),
        ("--recipe", "fp3", "'delayed'"),
        ("--device", "abacus", "cpu"),
        ("--device", "cuda:99", "cpu"),
        ("--chart", "bars.pdf", "PNG"),
        ("--chart", "/no/such/folder/bars.png", "folder that does not exist"),
    ],
)
def test_a_bad_flag_is_named_with_what_came_and_what_is_allowed(flag, value, allowed):
    found = invoke(*TINY, flag, value)
    assert found.exit_code == 2
    for words in (flag, value, allowed):
        assert words in found.output
