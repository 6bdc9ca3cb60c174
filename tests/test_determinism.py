"""The same inputs give the same bits twice: sums are in f32 and in one order, also across the programs of a kernel.

Attention is out of overdrive's hands: the backward of cuDNN, flash and efficient attention may add gradients in any order. The
plain backend repeats itself.
"""

from __future__ import annotations

import copy

import pytest
import torch

import overdrive.pytorch as te
from tests.numerics import assert_same_bits
from tests.steps import RECIPES, fp8, stack, states

SHAPES = [(3, 700, 64), (1, 33, 64)]
LAYERS = ("linear", "layernorm", "rmsnorm", "layernorm_linear", "layernorm_mlp")


def run(layer: torch.nn.Module, recipe: str, shape: tuple[int, ...], device: str) -> list[torch.Tensor]:
    out = []
    for seed in range(2):  # the second step's scales come from the first
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, torch.bfloat16).requires_grad_()
        dy = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 7)).to(device, torch.bfloat16)
        with fp8(RECIPES[recipe]):
            y = layer(x)
        y.backward(dy)
        out += [y, x.grad]
    return [*out, *(parameter.grad for parameter in layer.parameters()), *states(layer).values()]


@pytest.mark.filterwarnings("ignore:.*token counts divisible by 16:UserWarning")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_layers_repeat_themselves(recipe, name, shape, device):
    first = stack(name, device=device)
    again = copy.deepcopy(first)
    for i, (a, b) in enumerate(zip(run(first, recipe, shape, device), run(again, recipe, shape, device))):
        assert_same_bits(a, b, f"result {i}")


@pytest.mark.filterwarnings("ignore:.*token counts divisible by 16:UserWarning")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_transformer_layer_on_plain_attention_repeats_itself(recipe, device, monkeypatch):
    """With dropout from the same seed."""
    monkeypatch.setenv("OVERDRIVE_ATTENTION", "math")
    first = te.TransformerLayer(64, 128, 4, attn_input_format="bshd", params_dtype=torch.bfloat16, device=device)
    again = copy.deepcopy(first)
    results = []
    for layer in (first, again):
        torch.manual_seed(5)
        results.append(run(layer, recipe, (2, 300, 64), device))
    for i, (a, b) in enumerate(zip(*results)):
        assert_same_bits(a, b, f"result {i}")
