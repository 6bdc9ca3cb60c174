"""What backward keeps: LayerNormMLP frees its saved intermediates as it goes, unless the graph is to be kept."""

import pytest
import torch

import overdrive.pytorch as te
from tests.steps import RECIPES


def step(layer, x, recipe, **kept):
    saved = []

    def remember(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor), te.autocast(recipe is not None, recipe=recipe):
        out = layer(x)
    out.sum().backward(**kept)
    return out, saved


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_large_intermediates_are_freed_during_backward(device, recipe):
    layer = te.LayerNormMLP(32, 64, device=device)
    x = torch.randn(16, 32, device=device, requires_grad=True)
    _, saved = step(layer, x, recipe)
    freed = [tensor for tensor in saved if tensor.untyped_storage().nbytes() == 0 and tensor.numel()]
    assert sum(tuple(tensor.shape) == (16, 64) for tensor in freed) >= 1  # fc1's output
    assert len(freed) == (2 if recipe is None else 3)  # and the activation's, and the weight quantized for this step
    assert all(parameter.untyped_storage().nbytes() for parameter in layer.parameters())
    assert x.untyped_storage().nbytes()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_kept_graph_can_be_used_again(device, recipe):
    layer = te.LayerNormMLP(32, 64, device=device)
    x = torch.randn(16, 32, device=device, requires_grad=True)
    out, _ = step(layer, x, recipe, retain_graph=True)
    once = x.grad.clone()
    x.grad = None
    out.sum().backward()
    assert torch.equal(x.grad, once)


def test_a_weight_kept_for_the_next_microbatch_is_not_freed(device):
    layer = te.LayerNormMLP(32, 64, device=device)
    grads = []
    for first in (True, False):
        x = torch.ones(16, 32, device=device, requires_grad=True)
        with te.autocast(recipe=RECIPES["current"]):
            out = layer(x, is_first_microbatch=first)
        out.sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)
