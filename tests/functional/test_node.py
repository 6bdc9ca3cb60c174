"""A forward that nothing records: the same numbers without a node, and no silent derivative."""

import pytest
import torch
from torch.autograd import forward_ad

import overdrive.pytorch as te
from tests.numerics import assert_same_bits


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_unrecorded_forward_is_the_recorded_one(mode, device):
    layer = te.LayerNormMLP(32, 64, device=device).eval()
    x = torch.randn(24, 32, device=device, requires_grad=True)
    recorded = layer.forward_with_residual(x)
    with mode():
        plain = layer.forward_with_residual(x)
    for got, expected in zip(plain, recorded):
        assert expected.grad_fn is not None
        assert got.grad_fn is None
        assert_same_bits(got, expected.detach())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # forward_ad uses it
def test_forward_mode_derivatives_are_refused_where_gradients_are_off(device):
    layer, x = te.LayerNorm(16, device=device), torch.randn(4, 16, device=device)
    with forward_ad.dual_level(), torch.no_grad(), pytest.raises(NotImplementedError, match="jvp"):
        layer(forward_ad.make_dual(x, torch.ones_like(x)))
