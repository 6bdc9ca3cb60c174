"""The turn of a delayed-scaling step, for a whole model at once: roll the histories, find the peaks, make and snapshot the scales.

Shapes: S slots, the first C of them in the snapshot, L entries of the history ring; a program takes BS slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from overdrive.kernels.launch import launch
from overdrive.ops.scaling import _FP32_MAX, FIRST_GRADIENT_SLOT, RESTORED, SLOTS_PER_GEMM, TENANTS, UNTOUCHED, arena

_UNTOUCHED: tl.constexpr = tl.constexpr(UNTOUCHED)
_RESTORED: tl.constexpr = tl.constexpr(RESTORED)
_MAX: tl.constexpr = tl.constexpr(_FP32_MAX)
_PER_GEMM: tl.constexpr = tl.constexpr(SLOTS_PER_GEMM)
_FIRST_GRADIENT: tl.constexpr = tl.constexpr(FIRST_GRADIENT_SLOT)


@triton.jit(do_not_specialize=["tenant", "S", "L", "C", "length"])
def _begin_step(args, tenant, S, L, C, length, max_forward, max_backward, headroom,
                ROLL: tl.constexpr, BL: tl.constexpr, BS: tl.constexpr):  # fmt: skip
    """args: (counter, amax, reduced, owner, history, position, scale, snapshot), reduced being amax after the group's maximum.

    length: entries of the ring that count, 1 for "most_recent".
    """
    counter, amax, reduced, owner, history, position, scale, snapshot = args
    pid = tl.program_id(0)
    if pid == 0:
        tl.store(counter, tl.load(counter) + 1)
    slots = pid * BS + tl.arange(0, BS)
    old = tl.load(scale + slots, slots < S, 1.0)
    if ROLL:
        peak = tl.load(reduced + slots, slots < S, _UNTOUCHED)
        whose = tl.load(owner + slots, slots < S, -1)
        touched = ((whose == tenant) | (whose == _RESTORED)) & (peak != _UNTOUCHED) & (slots < S)
        steps = tl.load(position + slots, touched, 0)
        newest = steps % L
        # integers order amaxes as floats do and keep NaN on top; entry 0 is the new one, the others lie behind it in the ring
        bits = peak.to(tl.int32, bitcast=True)
        for first in range(1, length, BL):
            entry = first + tl.arange(0, BL)
            row = newest[None, :] - entry[:, None]
            row = tl.where(row < 0, row + L, row)
            mask = touched[None, :] & (entry < length)[:, None]
            values = tl.load(history + row.to(tl.int64) * S + slots[None, :], mask, 0.0)
            bits = tl.maximum(bits, tl.max(values.to(tl.int32, bitcast=True), 0))
        tl.store(history + newest.to(tl.int64) * S + slots, peak, touched)
        tl.store(position + slots, steps + 1, touched)
        tl.store(amax + slots, _UNTOUCHED, touched)
        peak = bits.to(tl.float32, bitcast=True)
        fp8_max = tl.where(slots % _PER_GEMM >= _FIRST_GRADIENT, max_backward, max_forward) * headroom
        new = tl.div_rn(fp8_max, peak)
        new = tl.where((peak > 0) & (peak <= _MAX), new, old)
        new = tl.where(new > _MAX, _MAX, new)
        old = tl.where(touched, new, old)
        tl.store(scale + slots, old, touched)
    tl.store(snapshot + slots, old, slots < C)


def begin_step(counter: torch.Tensor, capacity: int, tenant: int) -> torch.Tensor:
    """overdrive::begin_step. Recipes with callables roll as the reference does, one torch op after the other."""
    state, recipe = arena(counter.device), TENANTS[tenant].recipe if tenant >= 0 else None
    state.reserve(capacity, 1 if recipe is None else recipe.amax_history_len)
    if recipe is not None and (callable(recipe.amax_compute_algo) or recipe.scaling_factor_compute_algo is not None):
        state.roll(tenant)
        recipe = None
    reduced, length, limits, headroom = state.amax, 0, (1.0, 1.0), 1.0
    if recipe is not None:
        length = 1 if recipe.amax_compute_algo == "most_recent" else recipe.amax_history_len
        formats, group = recipe.fp8_format.value, TENANTS[tenant].group
        limits = formats.max_fwd, formats.max_bwd
        headroom = 2.0**-recipe.margin
        if group is not None:
            reduced = torch.where(state.owned_by(tenant), state.amax, UNTOUCHED)
            torch.distributed.all_reduce(reduced.view(torch.int32), torch.distributed.ReduceOp.MAX, group=group)
    if torch.cuda.is_current_stream_capturing():
        state.captured = True
    snapshot = state.scale.new_empty(capacity)
    args = (state.counter, state.amax, reduced, state.owner, state.history, state.position, state.scale, snapshot)
    launch(
        _begin_step, (-(-state.capacity // 8), 1, 1), counter.get_device(),
        (args, tenant, state.capacity, state.history.shape[0], capacity, length, *limits, headroom),
        (recipe is not None, 1024, 8), 8,
    )  # fmt: skip
    return snapshot
