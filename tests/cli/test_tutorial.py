"""The tutorial's helpers: timing, plain layers, and parameters that are really shared."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import overdrive.pytorch as te
from overdrive.bench.plain import Size
from overdrive.cli import tutorial
from overdrive.cli.layers import FusedLayer, PlainLayer, causal_mask
from overdrive.common.recipe import DelayedScaling

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SIZE = Size(hidden=32, ffn=64, heads=4, sequence=16, batch=2)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def whole(**kwargs):
    """The tutorial's TransformerLayer."""
    return te.TransformerLayer(
        SIZE.hidden, SIZE.ffn, SIZE.heads, hidden_dropout=0.0, attention_dropout=0.0, self_attn_mask_type="no_mask", **kwargs
    )


MODELS = {
    "basic": (lambda: PlainLayer(SIZE, 0.0, te.Linear, te.LayerNorm), tutorial.share_parameters_with_basic_te_model),
    "fused": (lambda: FusedLayer(SIZE, 0.0), tutorial.share_parameters_with_fused_te_model),
    "TransformerLayer": (whole, tutorial.share_parameters_with_transformerlayer_te_model),
    "TransformerLayer, one QKV weight": (
        lambda: whole(fuse_qkv_params=True),
        tutorial.share_parameters_with_transformerlayer_te_model,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_sharing_survives_a_change_of_the_plain_layer(name):
    torch.manual_seed(0)
    make, share = MODELS[name]
    plain, model = PlainLayer(SIZE, 0.0).to(DEVICE), make().to(DEVICE)
    x = torch.randn(SIZE.sequence, SIZE.batch, SIZE.hidden, device=DEVICE)
    share(model, plain)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(2):
        torch.testing.assert_close(model(x, attention_mask=None), plain(x, attention_mask=None), rtol=1e-4, atol=1e-4)
        plain(x, attention_mask=None).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_attention(causal):
    q, k, v = (torch.randn(SIZE.sequence, 2, 4, 8, dtype=torch.float64) for _ in range(3))
    mask = causal_mask(SIZE, torch.device("cpu")) if causal else None
    got = tutorial.DotProductAttention(4, 8, 0.0)(q, k, v, mask)
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=causal).permute(2, 0, 1, 3).flatten(2)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"autocast_kwargs": {"enabled": True, "recipe": DelayedScaling()}},
        {"fp8_autocast_kwargs": {"enabled": True, "fp8_recipe": DelayedScaling()}},
    ],
    ids=["plain", "autocast", "fp8_autocast"],
)
def test_speedometer_prints_the_mean_it_returns(kwargs, capsys):
    layer = te.Linear(32, 32).to(DEVICE)
    x = torch.randn(16, 32, device=DEVICE)
    milliseconds = tutorial.speedometer(layer, x, torch.ones_like(x), timing_iters=3, warmup_iters=1, **kwargs)
    assert milliseconds > 0
    assert capsys.readouterr().out == f"Mean time: {milliseconds:.3f} ms\n"
    assert layer.weight.grad is not None


def test_speedometer_takes_one_name_of_autocast():
    x = torch.randn(4, 4)
    with pytest.raises(ValueError, match="not both"):
        tutorial.speedometer(torch.nn.Linear(4, 4), x, x, autocast_kwargs={}, fp8_autocast_kwargs={})


def test_the_example_runs_all_its_steps():
    command = [sys.executable, "-W", "error", EXAMPLES / "quickstart.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert [line[0] for line in lines] == list("12345")
    assert all(line.endswith(" ms") for line in lines)


def test_the_readme_example_runs():
    code = re.search(r"## FP8\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code
    names: dict[str, object] = {}
    exec(code[1], names)
    layer = names["layer"]
    assert isinstance(layer, te.TransformerLayer)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
