"""bias_dropout_add: values, gradients, dropout, stochastic depth."""

from __future__ import annotations

import pytest
import torch

import overdrive.pytorch as te
from overdrive.functional.residual import bias_dropout_add, dropout_seed
from overdrive.ops.residual import dropout_scale
from tests.numerics import assert_close

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def draw(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape).to(device, dtype).requires_grad_()


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 3, 24), (1, 7), (0, 4, 16), (2, 2, 2, 33)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients(shape, dtype, p, with_bias, device):
    x, residual = draw(*shape, dtype=dtype, device=device), draw(*shape, dtype=dtype, device=device)
    bias = draw(shape[-1], dtype=dtype, device=device) if with_bias else None
    inputs = [t for t in (x, residual, bias) if t is not None]
    torch.manual_seed(0)
    out = bias_dropout_add(x, bias, residual, p)
    dout = torch.randn(shape).to(device, dtype)
    grads = torch.autograd.grad(out, inputs, dout)

    torch.manual_seed(0)
    seed = dropout_seed(p, x.device)
    rows = x.numel() // shape[-1]
    keep = 1.0 if seed is None else dropout_scale(rows, shape[-1], p, seed).cpu().double().view(shape)
    doubles = [t.detach().cpu().double().requires_grad_() for t in inputs]
    expected = doubles[1] + keep * (doubles[0] + (doubles[2] if with_bias else 0))
    wanted = torch.autograd.grad(expected, doubles, dout.cpu().double())
    assert out.dtype == dtype
    for what, actual, want in zip(("out", "dx", "dresidual", "dbias"), (out, *grads), (expected, *wanted)):
        assert_close(actual, want, dtype, what=what)


def test_strided_inputs(device):
    x, residual = draw(4, 6, 16, device=device).transpose(0, 1), draw(1, 1, 16, device=device).expand(6, 4, 16)
    bias = draw(16, device=device)
    out = bias_dropout_add(x, bias, residual)
    out.backward(torch.ones(6, 16, 4, device=device).transpose(1, 2))
    assert_close(out, (x + bias + residual).detach().cpu().double(), torch.float32)
    assert_close(bias.grad, torch.full((16,), 24.0).double(), torch.float32)


def test_the_residual_decides_the_dtype(device):
    x, bias, residual = draw(3, 8, dtype=torch.bfloat16, device=device), draw(8, device=device), draw(3, 8, device=device)
    out = bias_dropout_add(x, bias, residual, 0.2)
    assert out.dtype == torch.float32
    grads = torch.autograd.grad(out, (x, bias, residual), torch.ones_like(out))
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32, torch.float32]


def test_dropout_follows_the_seed(device):
    x, residual = torch.ones(64, 256, device=device), torch.zeros(64, 256, device=device)
    torch.manual_seed(1)
    first, second = bias_dropout_add(x, None, residual, 0.25), bias_dropout_add(x, None, residual, 0.25)
    torch.manual_seed(1)
    assert torch.equal(bias_dropout_add(x, None, residual, 0.25), first)
    assert not torch.equal(first, second)
    assert abs((first == 0).double().mean().item() - 0.25) < 0.015
    assert first.unique().tolist() == pytest.approx([0.0, 4 / 3])


@pytest.mark.parametrize("batch_dim", [0, 1])
def test_drop_path_drops_whole_samples(batch_dim, device):
    x, residual, bias = draw(64, 64, 8, device=device), draw(64, 64, 8, device=device), draw(8, device=device)
    out = bias_dropout_add(x, bias, residual, 0.0, 0.25, batch_dim).detach()
    samples = (out - residual).detach().movedim(batch_dim, 0)
    branch = (x + bias).detach().movedim(batch_dim, 0)
    dropped = [not sample.any() for sample in samples]
    assert 4 <= sum(dropped) <= 32  # of 64, expecting 16
    for drop, sample, whole in zip(dropped, samples, branch):
        if not drop:
            torch.testing.assert_close(sample, whole / 0.75, rtol=1e-4, atol=1e-4)


def test_drop_path_drops_whole_packed_samples(device):
    """Tokens behind the last count as its own."""
    lengths = [index % 4 for index in range(64)]
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    x, residual = draw(int(bounds[-1]) + 5, 8, device=device), draw(int(bounds[-1]) + 5, 8, device=device)
    out = (bias_dropout_add(x, None, residual, 0.0, 0.25, bounds) - residual).detach()
    ends = [*bounds.tolist()[1:-1], len(x)]
    dropped = 0
    for start, end in zip(bounds.tolist(), ends):
        if start < end and not out[start:end].any():
            dropped += 1
        else:
            torch.testing.assert_close(out[start:end], x[start:end].detach() / 0.75, rtol=1e-4, atol=1e-4)
    assert 3 <= dropped <= 24  # of 48, expecting 12


def test_another_branch_as_bias(device):
    x, other, residual = (draw(4, 5, 8, device=device) for _ in range(3))
    out = bias_dropout_add(x, other, residual)
    assert_close(out, (x + other + residual).detach().cpu().double(), torch.float32)
    grads = torch.autograd.grad(out, (x, other, residual), torch.ones_like(out))
    assert all((grad == 1).all() for grad in grads)


@pytest.mark.parametrize("fused", ["apart", "before", "around"])
def test_gradients_of_both_branches_are_not_one_memory(device, fused):
    """Without dropout both leaves get the same gradient; adding into one must not change the other."""
    x, residual = (torch.randn(4, 32, device=device, requires_grad=True) for _ in range(2))
    mlp = te.LayerNormMLP(32, 64, device=device)
    if fused == "apart":
        out = bias_dropout_add(x, None, residual)
    elif fused == "before":
        out = mlp.forward_fused_residual(x, None, residual, 0.0)[1]
    else:
        out = mlp.forward_between_residuals(x, residual)
    out.sum().backward()
    before = residual.grad.clone()
    x.grad.add_(1)
    assert torch.equal(residual.grad, before)
