"""A small byte-level GPT learns the standard library's sources as well in FP8 as in bf16, from the same batches."""

from __future__ import annotations

import functools
import math
import sysconfig
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import overdrive.pytorch as te
from overdrive.recipe import DelayedScaling, Float8BlockScaling, Float8CurrentScaling
from tests.steps import fp8

STEPS, BATCH, LENGTH, HIDDEN, LAYERS, HEADS = 300, 8, 64, 64, 2, 4
RECIPES = {
    "delayed": DelayedScaling(amax_history_len=16),
    "most recent": DelayedScaling(amax_history_len=16, amax_compute_algo="most_recent", margin=1),
    "current": Float8CurrentScaling(),
    "block": Float8BlockScaling(),
}


@functools.cache
def text() -> torch.Tensor:
    """About a megabyte of Python, as bytes."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    data = b"".join(file.read_bytes() for file in files)[: 1 << 20]
    assert len(data) > 100_000, "this interpreter has no sources of its standard library"
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()


class GPT(torch.nn.Module):
    """Bytes [B, S] -> logits [B, S, 256]; embedding and head in bf16, the layers as the autocast says."""

    def __init__(self, device: str, **layer) -> None:
        super().__init__()
        self.checkpoint = False
        bf16 = {"device": device, "dtype": torch.bfloat16}
        self.embedding = torch.nn.Embedding(256, HIDDEN, **bf16)
        self.position = torch.nn.Parameter(torch.randn(LENGTH, HIDDEN, **bf16) * 0.1)
        options = {"attn_input_format": "bshd", "hidden_dropout": 0.0, "attention_dropout": 0.0, "device": device, **layer}
        blocks = [te.TransformerLayer(HIDDEN, 4 * HIDDEN, HEADS, params_dtype=torch.bfloat16, **options) for _ in range(LAYERS)]
        self.layers = torch.nn.ModuleList(blocks)
        self.norm = te.RMSNorm(HIDDEN, params_dtype=torch.bfloat16, device=device)
        self.head = torch.nn.Linear(HIDDEN, 256, bias=False, **bf16)

    def run_layers(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = te.checkpoint(layer, x, use_reentrant=False) if self.checkpoint else layer(x)
        return x

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.run_layers(self.embedding(tokens) + self.position)))


class MasterAdam:
    """Adam on float32 copies of bf16 parameters, whose own steps would round away."""

    def __init__(self, parameters, lr: float) -> None:
        self.parameters = list(parameters)
        self.masters = [parameter.detach().float() for parameter in self.parameters]
        self.adam, self.lr = torch.optim.Adam(self.masters, lr), lr

    def step(self, progress: float) -> None:
        """Take the gradients; the rate warms up, then falls along a cosine. progress: 0 to 1."""
        self.adam.param_groups[0]["lr"] = self.lr * min(1.0, progress * 20) * (0.55 + 0.45 * math.cos(math.pi * progress))
        for parameter, master in zip(self.parameters, self.masters):
            master.grad, parameter.grad = parameter.grad.float(), None
        self.adam.step()
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.masters)


def losses(device: str, recipe, steps: int = STEPS, wrap=lambda model: model, **layer) -> list[float]:
    """The loss of every step, with the same weights at first and the same batches each time."""
    torch.manual_seed(0)
    model = GPT(device, **layer)
    optimizer, generator, found = MasterAdam(model.parameters(), 4e-3), torch.Generator().manual_seed(1), []
    run = wrap(model)
    for number in range(steps):
        starts = torch.randint(0, len(text()) - LENGTH - 1, (BATCH, 1), generator=generator)
        tokens = text()[starts + torch.arange(LENGTH + 1)].to(device)
        with fp8(recipe):
            logits = run(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step(number / steps)
        found.append(loss.detach())
    return torch.stack(found).tolist()


def final(values: list[float]) -> float:
    """Mean of the last 20 steps."""
    return sum(values[-20:]) / 20


@pytest.fixture(scope="module")
def bf16_loss(device) -> float:
    values = losses(device, None)
    assert final(values) < 0.6 * values[0], "it does not learn"
    return final(values)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_ends_within_one_percent_of_bf16(device, recipe, bf16_loss):
    values = losses(device, RECIPES[recipe])
    assert all(map(math.isfinite, values))
    assert final(values) == pytest.approx(bf16_loss, rel=0.01)


@pytest.mark.parametrize("recipe", ["delayed", "block"])
def test_the_first_steps_follow_bf16(device, recipe):
    """What fits into every run of the suite: 25 steps within 1 % of each other."""
    plain, quantized = (losses(device, r, 25) for r in (None, RECIPES[recipe]))
    assert plain != quantized
    assert sum(quantized[-5:]) == pytest.approx(sum(plain[-5:]), rel=0.01)
    assert sum(plain[-5:]) / 5 < 0.8 * plain[0]


def checkpointed(model: GPT) -> GPT:
    """The same model, each layer recomputed in backward."""
    model.checkpoint = True
    return model


def compiled(model: GPT) -> GPT:
    """The same model in one graph."""
    return torch.compile(model, fullgraph=True, backend="aot_eager")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("wrap", [checkpointed, compiled])
def test_checkpointed_and_compiled_training_is_plain_training(device, wrap):
    """To the last bit of every loss."""
    layer = {"normalization": "RMSNorm", "activation": "swiglu"}
    assert losses(device, RECIPES["delayed"], 12, wrap, **layer) == losses(device, RECIPES["delayed"], 12, **layer)
