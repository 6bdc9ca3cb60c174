"""Training steps whose every result is compared bit for bit: outputs, gradients, parameters, scaling state."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

import overdrive.pytorch as te
from overdrive.recipe import DelayedScaling, Float8BlockScaling, Float8CurrentScaling, Recipe
from tests.numerics import assert_same_bits

RECIPES: dict[str, Recipe | None] = {
    "plain": None,
    "delayed": DelayedScaling(amax_history_len=3),
    "current": Float8CurrentScaling(),
    "block": Float8BlockScaling(),
}
SIZE, TOKENS = 64, 32

MODULES: dict[str, Callable[..., torch.nn.Module]] = {
    "linear": lambda **kw: te.Linear(SIZE, SIZE, **kw),
    "layernorm": lambda **kw: te.LayerNorm(SIZE, **kw),
    "rmsnorm": lambda **kw: te.RMSNorm(SIZE, **kw),
    "layernorm_linear": lambda **kw: te.LayerNormLinear(SIZE, SIZE, parameters_split=("q", "k"), **kw),
    "layernorm_mlp": lambda **kw: te.LayerNormMLP(SIZE, 2 * SIZE, activation="swiglu", **kw),
    "checkpointing_mlp": lambda **kw: te.LayerNormMLP(SIZE, 2 * SIZE, checkpoint=True, **kw),
    "attention": lambda **kw: te.MultiheadAttention(SIZE, 4, attention_dropout=0.0, input_layernorm=True, qkv_format="bshd", **kw),
    "transformer_layer": lambda **kw: te.TransformerLayer(SIZE, 2 * SIZE, 4, attention_dropout=0.0, attn_input_format="bshd", **kw),
}
"""Layers [batch, TOKENS / batch, SIZE] -> the same shape."""


def stack(*names: str, device: str, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> torch.nn.Sequential:
    """The named layers in a row, the same weights for the same seed, large enough for every layer to matter."""
    torch.manual_seed(seed)
    layers = torch.nn.Sequential(*(MODULES[name](device=device, params_dtype=dtype) for name in names))
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.add_(torch.randn(parameter.shape).to(parameter) * 0.1)
    return layers


def fp8(recipe: Recipe | None, on: bool = True) -> contextlib.AbstractContextManager[Any]:
    """The autocast of a recipe, nothing where there is none or it is not `on`."""
    return te.autocast(recipe=recipe) if on and recipe is not None else contextlib.nullcontext()


def states(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every scaling state below the module, by name."""
    return {name: value for name, value in module.state_dict().items() if name.endswith("_extra_state")}


def batch(step: int, device: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The input of a step; each is larger than the last, so that scales must follow."""
    numbers = torch.randn(2, TOKENS // 2, SIZE, generator=torch.Generator().manual_seed(step))
    return (numbers * (1 + step)).to(device, dtype).requires_grad_()


Results = dict[str, torch.Tensor]


def step(module: torch.nn.Module, call: Callable[[torch.Tensor], torch.Tensor], number: int) -> Results:
    """One step of gradient descent on call(x): everything that came out."""
    x = batch(number, next(module.parameters()).device.type)
    module.zero_grad()
    torch.manual_seed(number)
    y = call(x)
    (y.float() * torch.randn(y.shape).to(y.device)).sum().backward()
    results = {"y": y.detach().clone(), "dx": x.grad.clone()}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            results[f"d{name}"] = parameter.grad.clone()
            parameter.sub_(parameter.grad, alpha=1e-3)
    return results | states(module)


def train(
    module: torch.nn.Module, call: Callable[[torch.Tensor], torch.Tensor] | None = None, steps: int = 3, first: int = 0
) -> list[Results]:
    """`step` for step in first .. first + steps - 1."""
    return [step(module, call or module, number) for number in range(first, first + steps)]


def assert_same(actual: list[Results] | Results, expected: list[Results] | Results) -> None:
    """Fail unless both name the same tensors and every bit agrees."""
    if isinstance(actual, dict):
        actual, expected = [actual], [expected]
    assert len(actual) == len(expected)
    for number, (got, want) in enumerate(zip(actual, expected)):
        assert got.keys() == want.keys()
        for name in want:
            assert_same_bits(got[name], want[name], f"step {number}: {name}")
