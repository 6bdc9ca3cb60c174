"""ops.scaling: the arena grows without forgetting, tenants keep their own rules, odd amaxes change no scale."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from overdrive.ops.scaling import UNTOUCHED, Arena, arena, begin_step, record_amax, tenant_id
from overdrive.recipe import DelayedScaling, Format
from overdrive.scaling.arena import SlotRange
from tests.numerics import assert_same_bits

FP32_MAX = torch.finfo(torch.float32).max


def tenant(length: int = 1, **fields) -> int:
    return tenant_id(DelayedScaling(amax_history_len=length, **fields), None)


class Slots:
    """An arena and the slots of two GEMMs in it, driven by the ops as a layer would."""

    def __init__(self, device: str) -> None:
        self.range = SlotRange(2, torch.device(device))
        self.indices = self.range.indices(torch.device(device))
        self.columns = slice(self.range.start, self.range.start + 8)
        self.state = arena(self.indices.device)

    def record(self, slot: int, amax: float, tenant: int) -> None:
        x = torch.tensor([[0.0, -amax, amax / 2]], device=self.indices.device)
        record_amax(self.state.counter, x, self.indices, slot, tenant)

    def step(self, tenant: int) -> list[float]:
        return begin_step(self.state.counter, self.state.capacity, tenant)[self.columns].tolist()


@pytest.fixture
def slots(device: str) -> Slots:
    return Slots(device)


def test_scale_is_the_one_from_before(slots):
    rules = tenant()
    assert slots.step(rules) == [1.0] * 8
    slots.record(0, 2.0, rules)
    slots.record(3, 2.0, rules)
    assert slots.step(-1) == [1.0] * 8, "a snapshot alone ends no step"
    assert slots.step(rules) == [224.0, 1, 1, 28672.0, 1, 1, 1, 1], "E4M3 forward, E5M2 for gradients"
    assert slots.step(rules) == [224.0, 1, 1, 28672.0, 1, 1, 1, 1], "what recorded nothing keeps its scale"


@pytest.mark.parametrize(("slot", "fp8_max"), [(0, 448), (1, 448), (2, 448), (3, 57344), (4, 57344), (5, 448), (7, 448)])
def test_format_by_slot(slots, slot, fp8_max):
    rules, e4m3 = tenant(), tenant(fp8_format=Format.E4M3)
    slots.record(slot, 4.0, rules)
    assert slots.step(rules)[slot] == fp8_max / 4
    slots.record(slot, 4.0, e4m3)
    assert slots.step(e4m3)[slot] == 448 / 4


@pytest.mark.parametrize("algo", ["max", "most_recent"])
@pytest.mark.parametrize(
    ("amax", "scale"),
    [(0.0, 7.0), (math.inf, 7.0), (math.nan, 7.0), (1e-45, FP32_MAX), (1e-37, FP32_MAX), (3.4e38, None), (448.0, 1.0)],
)
def test_odd_amaxes(slots, amax, scale, algo):
    """0, inf and NaN keep the scale; a scale that would be infinite is FP32_MAX."""
    rules = tenant(amax_compute_algo=algo)
    slots.state.scale[slots.columns.start + 1] = 7.0
    slots.record(1, amax, rules)
    amax = torch.tensor(amax)
    expected = (torch.tensor(448.0) / amax).item() if scale is None else scale
    assert slots.step(rules)[1] == expected
    assert_same_bits(slots.state.chronological()[0, slots.columns.start + 1], amax.abs(), "history")


def test_most_of_a_step_counts_and_nan_wins(slots):
    rules = tenant()
    for amax in (1.0, 4.0, 2.0):
        slots.record(0, amax, rules)
    for amax in (1.0, math.nan, 2.0):
        slots.record(1, amax, rules)
    assert slots.step(rules)[:2] == [112.0, 1.0]


@pytest.mark.parametrize("margin", [0, 1, 3, 0.5])
def test_margin(slots, margin):
    rules = tenant(margin=margin)
    slots.record(0, 3.0, rules)
    expected = torch.tensor(448.0) * torch.tensor(2.0**-margin) / 3
    assert slots.step(rules)[0] == expected.item()


@pytest.mark.parametrize("algo", ["max", lambda history: history.amax(0)])
def test_history_is_a_window(slots, algo):
    """An amax counts for as many steps as the history is long, then no more."""
    rules = tenant(3, amax_compute_algo=algo)
    seen = []
    for amax in (8.0, 1.0, 1.0, 1.0, 2.0, 1.0, 1.0, 1.0):
        slots.record(0, amax, rules)
        seen.append(448 / slots.step(rules)[0])
    assert seen == [8, 8, 8, 1, 2, 2, 2, 1]


def test_callable_sees_the_newest_step_first(slots):
    seen = []
    rules = tenant(4, amax_compute_algo=lambda history: seen.append(history[:, slots.columns.start].tolist()) or history[0])
    for amax in (1.0, 2.0, 3.0, 4.0, 5.0):
        slots.record(0, amax, rules)
        slots.step(rules)
    assert [row[: i + 1] for i, row in enumerate(seen[:4])] == [[1], [2, 1], [3, 2, 1], [4, 3, 2, 1]]
    assert seen[4] == [5, 4, 3, 2]
    assert {len(row) for row in seen} == {4}


def test_custom_scaling_factor(slots):
    """Called with (amax, scale, fp8_max, recipe); what it returns is the scale."""
    recipe = DelayedScaling(
        scaling_factor_compute_algo=lambda amax, scale, fp8_max, recipe: scale + fp8_max / amax + recipe.margin, margin=2
    )
    rules = tenant_id(recipe, None)
    slots.record(0, 4.0, rules)
    slots.record(3, 4.0, rules)
    assert slots.step(rules)[:5] == [1 + 112 + 2, 1, 1, 1 + 14336 + 2, 1]


def test_tenants_keep_apart(slots):
    """Recipes of different history lengths in one arena: each ends its own steps, by its own rules."""
    long, short = tenant(5), tenant(2)
    peaks = []
    for amax in (16.0, 8.0, 4.0, 2.0, 1.0, 1.0):
        slots.record(0, amax, long)
        slots.record(1, amax, short)
        after_long, after_short = slots.step(long), slots.step(short)
        assert after_long[0] == after_short[0], "a step of one tenant leaves the other's slots alone"
        peaks.append((448 / after_long[0], 448 / after_long[1], 448 / after_short[1]))
    assert peaks == [(16, 448, 16), (16, 16, 16), (16, 16, 8), (16, 8, 4), (16, 4, 2), (8, 2, 1)]
    assert slots.state.position[slots.columns][:3].tolist() == [6, 6, 0]


def test_reserve_keeps_everything(slots, device):
    state, rules = Arena(slots.state.counter.device), tenant(4)
    state.reserve(4, 4)
    one = torch.arange(8, dtype=torch.int32, device=device)
    for step in range(6):  # slot 0 wraps around its ring, slot 1 has room left
        state.record(one, 0, torch.tensor(2.0 + step, device=device), rules)
        if step % 3 == 0:
            state.record(one, 1, torch.tensor(20.0 + step, device=device), rules)
        state.roll(rules)
    state.record(one, 2, torch.tensor(9.0, device=device), rules)
    kept = {name: getattr(state, name)[:8].clone() for name in ("amax", "owner", "scale")}
    capacity = state.capacity
    state.reserve(capacity + 1, 7)
    assert (state.capacity, state.history.shape[0]) == (2 * capacity, 7)
    for name, value in kept.items():
        assert_same_bits(getattr(state, name)[:8], value, name)
    assert state.amax_bits.data_ptr() == state.amax.data_ptr()
    history = state.chronological()
    assert history[:, 0].tolist() == [4, 5, 6, 7, 0, 0, 0]
    assert history[:, 1].tolist() == [20, 23, 0, 0, 0, 0, 0]
    assert (state.amax[capacity:] == UNTOUCHED).all()
    assert (state.scale[capacity:] == 1).all()
    for amax, newest in ((1.0, [1, 7, 6, 5]), (2.0, [2, 1, 7, 6])):
        state.record(one, 0, torch.tensor(amax, device=device), rules)
        state.roll(rules)
        assert state._newest_first(4)[:, 0].tolist() == newest
    assert 448 / state.scale[0] == 7


def test_nothing_to_reserve_moves_nothing(slots):
    state = slots.state
    pointers = [t.data_ptr() for t in (state.amax, state.history, state.scale)]
    state.reserve(1)
    state.reserve(state.capacity, state.history.shape[0])
    assert pointers == [t.data_ptr() for t in (state.amax, state.history, state.scale)]


def test_equal_recipes_are_one_tenant():
    assert tenant(16, margin=1) == tenant(16, margin=1)
    assert len({tenant(16), tenant(17), tenant(16, amax_compute_algo="most_recent")}) == 3


@pytest.mark.parametrize("setting", ["default dtype", "inference mode"])
def test_an_arena_may_be_born_anywhere(setting, device):
    """The first FP8 call of a program may happen under torch.inference_mode or another default dtype."""
    where = torch.device(device, 0) if device == "cuda" else torch.device(device)
    if setting == "inference mode":
        with torch.inference_mode():
            state = Arena(where)
            state.reserve(2048, 3)
    else:
        torch.set_default_dtype(torch.bfloat16)
        try:
            state = Arena(where)
            state.roll(tenant(3))
        finally:
            torch.set_default_dtype(torch.float32)
    assert {t.dtype for t in (state.amax, state.history, state.scale)} == {torch.float32}
    state.record(torch.tensor([0], dtype=torch.int32, device=where), 0, torch.tensor(2.0, device=where), tenant(3))
    state.roll(tenant(3))
    assert state.scale[0] == 224


_RANKS = """
import os
import sys
import torch
from overdrive.ops.scaling import arena, begin_step, record_amax, tenant_id
from overdrive.recipe import DelayedScaling

rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", rank=rank, world_size=2, init_method="file://" + store)
state = arena(torch.device("cpu"))
slots = torch.arange(8, dtype=torch.int32)
for reduce_amax, start in ((True, 0), (False, 5)):
    tenant = tenant_id(DelayedScaling(amax_history_len=4, reduce_amax=reduce_amax), torch.distributed.group.WORLD)
    for slot, amaxes in enumerate(((4.0, 8.0), (2.0, float("nan")), (1.0, 0.0))):
        record_amax(state.counter, torch.tensor([[amaxes[rank]]]), slots, start + slot, tenant)
    begin_step(state.counter, state.capacity, tenant)
print(state.scale[:8].tolist(), state.history[0, :8].tolist(), sep=";", flush=True)
torch.distributed.barrier()
os._exit(0)  # gloo's threads may abort an interpreter that ends while its peer is gone
"""


def test_amaxes_are_reduced_over_the_group(tmp_path):
    """Two processes take the larger amax with reduce_amax, NaN being the largest, and each its own without."""
    commands = [[sys.executable, "-c", _RANKS, str(rank), str(tmp_path / "store")] for rank in range(2)]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for command in commands]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    scales, histories = zip(*(out.strip().splitlines()[-1].split(";") for out, _ in outputs))
    assert scales[0] == "[56.0, 1.0, 448.0, 1.0, 1.0, 112.0, 224.0, 448.0]"
    assert scales[1] == "[56.0, 1.0, 448.0, 1.0, 1.0, 56.0, 1.0, 1.0]"
    assert histories[0] == "[8.0, nan, 1.0, 0.0, 0.0, 4.0, 2.0, 1.0]"
    assert histories[1] == "[8.0, nan, 1.0, 0.0, 0.0, 8.0, nan, 0.0]"
