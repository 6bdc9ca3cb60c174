"""Delayed scaling against a step-by-step simulation of its rules, bit for bit, over 1000 steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import overdrive.pytorch as te
from overdrive.ops.quantize import Mode, quantize
from overdrive.ops.scaling import arena, begin_step, tenant_id
from overdrive.recipe import DelayedScaling, Format
from overdrive.scaling.arena import SlotRange
from tests.numerics import E4M3, assert_close, assert_same_bits
from tests.ops.quantized import encode
from tests.scaling.simulation import SimulatedSlot, tensors

STEPS = 1000
SHAPE = (16, 16)


def between(history: torch.Tensor) -> torch.Tensor:
    """Halfway from the newest amax to the largest."""
    return history[0] / 2 + history.amax(0) / 2


def halfway(amax: torch.Tensor, scale: torch.Tensor, fp8_max: torch.Tensor, recipe: DelayedScaling) -> torch.Tensor:
    """Moves the scale halfway, unless the amax says nothing."""
    return torch.where((amax > 0) & amax.isfinite(), (scale + fp8_max / amax.clamp(min=1e-30)) / 2, scale)


def simulated_between(history: list[np.float32]) -> np.float32:
    return history[0] / np.float32(2) + np.max(history) / np.float32(2)


def simulated_halfway(amax: np.float32, scale: np.float32, fp8_max: float) -> np.float32:
    if not (np.isfinite(amax) and amax > 0):
        return scale
    return (scale + np.float32(fp8_max) / max(amax, np.float32(1e-30))) / np.float32(2)


def simulated(recipe: DelayedScaling, fp8_max: float) -> SimulatedSlot:
    algo = simulated_between if recipe.amax_compute_algo is between else recipe.amax_compute_algo
    scale_algo = simulated_halfway if recipe.scaling_factor_compute_algo is halfway else None
    return SimulatedSlot(fp8_max, recipe.amax_history_len, algo, recipe.margin, scale_algo)


RECIPES = {
    "default": DelayedScaling(),
    "one step": DelayedScaling(amax_history_len=1),
    "three": DelayedScaling(amax_history_len=3),
    "sixteen, E4M3": DelayedScaling(amax_history_len=16, fp8_format=Format.E4M3),
    "margin": DelayedScaling(amax_history_len=3, margin=2),
    "odd margin": DelayedScaling(amax_history_len=16, margin=0.3),
    "most recent": DelayedScaling(amax_history_len=16, amax_compute_algo="most_recent"),
    "most recent, E4M3, margin": DelayedScaling(amax_compute_algo="most_recent", fp8_format=Format.E4M3, margin=1),
    "callable": DelayedScaling(amax_history_len=16, amax_compute_algo=between),
    "callable of one": DelayedScaling(amax_history_len=1, amax_compute_algo=between),
    "scale algo": DelayedScaling(amax_history_len=3, scaling_factor_compute_algo=halfway),
    "both algos": DelayedScaling(amax_history_len=3, amax_compute_algo=between, scaling_factor_compute_algo=halfway),
}


@pytest.mark.parametrize("name", RECIPES)
def test_ops(name, device):
    """begin_step and quantize on an input, a weight and a gradient slot, each used once, twice or not at all in a step."""
    recipe, own = RECIPES[name], SlotRange(1, torch.device(device))
    fp8 = recipe.fp8_format.value
    first, layer, tenant = own.start, own.indices(torch.device(device)), tenant_id(recipe, None)
    where, state = layer.device, arena(layer.device)
    odd = 0.1 if recipe.amax_history_len <= 16 else 0.003  # an inf or NaN stops the scale as long as the history holds it
    slots = [
        (slot, dtype, simulated(recipe, largest), tensors(SHAPE, seed, odd))
        for slot, dtype, largest, seed in ((0, fp8.fwd, fp8.max_fwd, 1), (1, fp8.fwd, fp8.max_fwd, 2), (3, fp8.bwd, fp8.max_bwd, 3))
    ]
    rng = np.random.default_rng(0)
    scales = set()
    for step in range(STEPS):
        snapshot = begin_step(state.counter, state.capacity, tenant)
        for slot, dtype, simulation, inputs in slots:
            what = f"step {step}, slot {slot}"
            simulation.end_step()
            scales.add(float(simulation.scale))
            assert_same_bits(snapshot[first + slot], torch.tensor(simulation.scale), f"{what}: scale")
            for _ in range(rng.choice([0, 1, 1, 1, 2])):
                x = next(inputs)
                out = quantize(x.to(where), False, Mode.DELAYED, dtype, snapshot, layer, slot, tenant, False, True, False)
                data, _, scale_inv, *_ = out
                simulation.record(x.numpy())
                with np.errstate(over="ignore", invalid="ignore"):
                    expected = torch.from_numpy(encode(x.numpy() * simulation.scale, dtype)).view(dtype)
                assert_same_bits(data, expected, f"{what}: data")
                assert_same_bits(scale_inv, torch.tensor([np.float32(1) / simulation.scale]), f"{what}: scale_inv")
        if step % 100 == 99:
            for slot, _, simulation, _ in slots:
                newest = state._newest_first(len(simulation.history))[:, first + slot]
                assert_same_bits(newest, torch.tensor(np.array(simulation.history)), f"step {step}, slot {slot}: history")
    assert len(scales) > 20, "the scales hardly moved: this test would not see much"


@pytest.mark.parametrize("name", ["three", "sixteen, E4M3", "most recent", "margin"])
def test_linear(name, device):
    """A Linear trained under autocast: the scales of its input, weight and output gradient, and its output, step by step."""
    recipe = RECIPES[name]
    fp8 = recipe.fp8_format.value
    layer = te.Linear(16, 16, bias=False, device=device, params_dtype=torch.bfloat16)
    tracked = (
        (0, simulated(recipe, fp8.max_fwd), tensors(SHAPE, 1, odd=0.05)),
        (1, simulated(recipe, fp8.max_fwd), tensors(SHAPE, 2, odd=0.05)),
        (3, simulated(recipe, fp8.max_bwd), tensors(SHAPE, 3, odd=0.05)),
    )
    slots = layer._slots.tolist()
    state = arena(layer._slots.device)
    rng = np.random.default_rng(0)
    outputs = 0
    for step in range(STEPS):
        x, weight, dy = (next(inputs).bfloat16() for *_, inputs in tracked)
        with torch.no_grad():
            layer.weight.copy_(weight)
        skips_backward = rng.random() < 0.1
        with te.autocast(recipe=recipe):
            y = layer(x.to(device))
        if not skips_backward:
            y.backward(dy.to(device))
        if rng.random() < 0.1:
            with torch.no_grad(), te.autocast(recipe=recipe):
                layer(x.to(device))  # evaluation ends no step
        what = f"step {step}"
        for slot, simulation, _ in tracked:
            simulation.end_step()
            assert_same_bits(state.scale[slots[slot]], torch.tensor(simulation.scale), f"{what}, slot {slot}: scale")
        values = []
        for (_, simulation, _), value in zip(tracked, (x, weight, dy)):
            if value is dy and skips_backward:
                continue
            simulation.record(value.float().numpy())
            with np.errstate(over="ignore", invalid="ignore"):
                data = torch.from_numpy(encode(value.float().numpy() * simulation.scale, E4M3)).view(E4M3)
            values.append(data.double() / float(simulation.scale))
        expected = values[0] @ values[1].t()
        if expected.isfinite().all() and expected.bfloat16().isfinite().all() and expected.norm() > 1e-30:
            assert_close(y, expected, torch.bfloat16, what=f"{what}: output")
            outputs += 1
    assert outputs > 0.6 * STEPS
