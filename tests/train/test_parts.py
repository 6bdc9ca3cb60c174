"""Schedule, optimizer, log: the parts of a step."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from overdrive.train import Log, Row
from overdrive.train.log import read
from overdrive.train.optimizer import MasterAdamW
from overdrive.train.schedule import cosine
from tests.numerics import assert_same_bits


def test_the_rate_rises_in_a_line_and_falls_along_a_cosine():
    rates = [cosine(step, 1.0, 4, 24) for step in range(30)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[14] == pytest.approx(0.55)
    assert rates[24:] == pytest.approx([0.1] * 6)
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))


def test_the_rate_waits_for_an_end_that_is_not_known():
    assert [cosine(step, 2.0, 2, None) for step in (0, 1, 2, 500)] == [1.0, 2.0, 2.0, 2.0]
    assert cosine(0, 2.0, 0, 0) == 2.0
    assert cosine(3, 2.0, 8, 4) == 1.0


def layer(device, dtype):
    torch.manual_seed(0)
    return nn.Linear(8, 4, device=device, dtype=dtype)


def test_in_float32_it_is_adamw(device):
    ours, theirs = layer(device, torch.float32), layer(device, torch.float32)
    optimizer = MasterAdamW(ours, weight_decay=0.2, clip=0.0)
    groups = [{"params": [theirs.weight], "weight_decay": 0.2}, {"params": [theirs.bias], "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95))
    for step in range(4):
        for module in (ours, theirs):
            torch.manual_seed(step)
            module(torch.randn(5, 8).to(device)).square().sum().backward()
        norm = torch.cat([p.grad.flatten() for p in theirs.parameters()]).norm()
        optimizer.take_gradients()
        torch.testing.assert_close(optimizer.step(0.1), norm)
        adam.step()
        adam.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b)


def test_updates_too_small_for_bf16_add_up_in_the_masters(device):
    module = layer(device, torch.bfloat16)
    optimizer = MasterAdamW(module, weight_decay=0.0, clip=0.0)
    before, moved = module.weight.detach().clone(), []
    large = before.abs() > 2**-3  # where half a step of bf16 is at least 2^-11
    for _ in range(64):
        module.weight.grad, module.bias.grad = torch.ones_like(module.weight), torch.ones_like(module.bias)
        optimizer.take_gradients()
        optimizer.step(2**-13)
        moved.append(bool((module.weight != before)[large].all()))
    assert not moved[0]
    assert moved[-1]
    torch.testing.assert_close(optimizer.masters[0], before.float() - 64 * 2**-13, atol=1e-5, rtol=0)
    assert_same_bits(module.weight.detach(), optimizer.masters[0].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_microbatches_add_up_in_float32(device, dtype):
    module = layer(device, dtype)
    optimizer = MasterAdamW(module, weight_decay=0.0, clip=0.0)
    for part in (1.0, 2**-9, 2**-9):  # in bf16 1 + 2^-9 is 1
        (module.weight.sum() * part + module.bias.sum() * part).backward()
        optimizer.take_gradients()
    assert (optimizer.masters[0].grad == 1 + 2**-8).all()
    optimizer.step(0.1)
    assert all(p.grad is None for p in (*module.parameters(), *optimizer.masters))


def test_the_norm_of_all_gradients_is_clipped(device):
    module, seen = layer(device, torch.float32), []
    optimizer = MasterAdamW(module, weight_decay=0.0, clip=0.5)
    optimizer.adam.register_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in optimizer.masters))
    (module.weight.sum() * 3 + module.bias.sum() * 4).backward()
    gradients = [p.grad.clone() for p in module.parameters()]
    norm = optimizer.step(0.1)
    torch.testing.assert_close(norm, torch.cat([g.flatten() for g in gradients]).norm())
    for clipped, gradient in zip(seen, gradients):
        torch.testing.assert_close(clipped, gradient * 0.5 / norm, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_state_goes_on_bit_for_bit(device, dtype):
    def steps(module, optimizer, count):
        for step in range(count):
            torch.manual_seed(step)
            module(torch.randn(5, 8).to(device, dtype)).square().sum().backward()
            optimizer.take_gradients()
            optimizer.step(0.01)

    first, second = layer(device, dtype), layer(device, dtype)
    optimizer, resumed = (MasterAdamW(module, 0.1, 1.0) for module in (first, second))
    steps(first, optimizer, 3)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(first, optimizer, 3)
    steps(second, resumed, 3)
    assert_same_bits(second.weight.detach(), first.weight.detach())
    assert_same_bits(resumed.masters[0].detach(), optimizer.masters[0].detach())


def test_state_of_other_parameters_is_refused(device):
    optimizer = MasterAdamW(layer(device, torch.bfloat16), 0.1, 1.0)
    state = optimizer.state_dict()
    state["masters"] = [torch.zeros(3, device=device), *state["masters"][1:]]
    with pytest.raises(ValueError, match="other shapes"):
        optimizer.load_state_dict(state)


def row(step, validation=None):
    return Row(step, 1 / 3 + step, 0.1, 1e-3, 1e6 / 7, 0.3 * step, validation)


def test_a_log_can_be_read_while_it_is_written_and_goes_on(tmp_path):
    path = tmp_path / "log.csv"
    with Log(path) as log:
        log.write([row(1), row(2, 0.7)])
        assert read(path) == [row(1), row(2, 0.7)]
        log.write([row(3)])
        log.sync()
    with Log(path, until=2) as log:
        assert log.rows == read(path) == [row(1), row(2, 0.7)]
        log.write([row(3, 0.1)])
    assert read(path) == [row(1), row(2, 0.7), row(3, 0.1)]
    with Log(path):
        assert read(path) == []


@pytest.mark.parametrize("torn", ["3,1.2", "3,1.2,0.1,0.001,5.0,1.0,", "3,1.2,0.1\n", "three,1,1,1,1,1,\n", "\n"])
def test_a_row_that_was_being_written_is_dropped(tmp_path, torn):
    path = tmp_path / "log.csv"
    with Log(path) as log:
        log.write([row(1), row(2)])
    with path.open("a") as file:
        file.write(torn)
    assert read(path) == [row(1), row(2)]
    with Log(path, until=5) as log:
        log.write([row(3)])
    assert read(path) == [row(1), row(2), row(3)]


def test_there_need_not_be_a_log_to_go_on_from(tmp_path):
    with Log(tmp_path / "log.csv", until=7) as log:
        log.write([row(8)])
    assert read(tmp_path / "log.csv") == [row(8)]
