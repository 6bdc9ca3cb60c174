"""The arena of delayed scaling: every tensor's amax, history and scale on one device, and the op that turns a step over.

No op takes the arena as an argument, so autograd never sees it change: ops read scales from a snapshot that `begin_step` returns,
and record amaxes as a hidden side effect (DESIGN: delayed scaling that compiles).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from overdrive.ops.library import define
from overdrive.recipe import DelayedScaling

SLOTS_PER_GEMM = 5  # input, weight, output, grad_output, grad_input; arenas are cut in whole GEMMs
FIRST_GRADIENT_SLOT = 3
UNTOUCHED = -1.0  # pending amax of a slot that recorded nothing since the last step; below every true amax
RESTORED = -2  # owner of pending amaxes that came out of a state dict: the next tenant to end a step takes them
_FP32_MAX = torch.finfo(torch.float32).max
_SMALLEST_ARENA = 1024


@dataclass(frozen=True)
class Tenant:
    """Whose rules a recorded slot follows: a recipe and the process group its amaxes are reduced over."""

    recipe: DelayedScaling
    group: Any = None


TENANTS: list[Tenant] = []


@functools.cache
def tenant_id(recipe: DelayedScaling, group: Any) -> int:
    """Index in TENANTS of this recipe and group; ops carry the index."""
    TENANTS.append(Tenant(recipe, group if recipe.reduce_amax else None))
    return len(TENANTS) - 1


class Arena:
    """Delayed scaling's mutable state on one device, one column per slot.

    amax: f32 [slots], largest |x| recorded since the last step, UNTOUCHED if none.
    owner: i32 [slots], the tenant that recorded last, or RESTORED.
    history: f32 [length, slots], a ring. position: i32 [slots], steps rolled.
    scale: f32 [slots]. counter: i32 [1], only there to order `begin_step` calls under torch.compile. captured: a CUDA graph knows
    the addresses, so nothing may move.
    """

    @torch.inference_mode(False)  # lives on, so its tensors are normal ones wherever the first FP8 call happens
    def __init__(self, device: torch.device) -> None:
        self.counter = torch.zeros(1, dtype=torch.int32, device=device)
        self.captured = False
        self._allocate(_SMALLEST_ARENA, 1)

    @torch.inference_mode(False)
    def _allocate(self, slots: int, length: int) -> None:
        device = self.counter.device
        self.amax = torch.full((slots,), UNTOUCHED, dtype=torch.float32, device=device)
        self.amax_bits = self.amax.view(torch.int32)  # an integer maximum orders non-negative floats and keeps NaN on top
        self.owner = torch.full((slots,), -1, dtype=torch.int32, device=device)
        self.history = torch.zeros(length, slots, dtype=torch.float32, device=device)
        self.position = torch.zeros(slots, dtype=torch.int32, device=device)
        self.scale = torch.ones(slots, dtype=torch.float32, device=device)

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return self.amax.numel()

    def reserve(self, slots: int, length: int = 1) -> None:
        """Grow to at least this many slots and this long a history, keeping what is there."""
        kept = self.capacity
        slots = max(kept, 1 << (slots - 1).bit_length())
        if slots == kept and length <= self.history.shape[0]:
            return
        if self.captured:
            raise RuntimeError(
                f"delayed scaling's state on {self.counter.device} must grow to {slots} slots and a history of {length} steps, but "
                "a CUDA graph was captured that has its addresses; build all layers and enter every recipe once before the capture"
            )
        by_age, old = self.chronological(), self.__dict__.copy()
        self._allocate(slots, max(length, by_age.shape[0]))
        for name in ("amax", "owner", "scale"):
            getattr(self, name)[:kept] = old[name]
        self.history[: by_age.shape[0], :kept] = by_age
        self.position[:kept] = old["position"].clamp(max=by_age.shape[0])

    def chronological(self) -> torch.Tensor:
        """History with row 0 the oldest entry of each slot; slots with fewer entries are padded with zeros at the end."""
        length = self.history.shape[0]
        start = torch.where(self.position > length, self.position % length, 0)
        rows = (start + torch.arange(length, device=start.device, dtype=torch.int32)[:, None]) % length
        return self.history.gather(0, rows.long())

    def record(self, slots: torch.Tensor, slot: int, amax: torch.Tensor, tenant: int) -> None:
        """Raise the slot's pending amax to `amax`; NaN wins."""
        index = slots[slot : slot + 1]  # stays on the device: a Python index would synchronise
        self.amax[index] = torch.maximum(self.amax[index], amax.reshape(1))
        self.owner[index] = tenant

    def owned_by(self, tenant: int) -> torch.Tensor:
        """Which slots the tenant's next step takes."""
        return (self.owner == tenant) | (self.owner == RESTORED)

    def roll(self, tenant: int) -> None:
        """End a step for every slot this tenant recorded into: reduce, roll the history, compute the new scale."""
        rules = TENANTS[tenant]
        recipe = rules.recipe
        self.reserve(self.capacity, recipe.amax_history_len)
        mine = self.owned_by(tenant)
        if self.scale.device.type == "cpu" and not bool(mine.any()):
            return  # also keeps a group of GPUs out of an arena that it cannot reduce
        amax = torch.where(mine, self.amax, UNTOUCHED)
        if rules.group is not None:
            bits = amax.view(torch.int32)  # as floats, NaN would lose on some backends
            torch.distributed.all_reduce(bits, torch.distributed.ReduceOp.MAX, group=rules.group)
        touched = mine & (amax != UNTOUCHED)
        length = self.history.shape[0]
        row = (self.position % length).long()[None]
        self.history.scatter_(0, row, torch.where(touched, amax, self.history.gather(0, row)[0])[None])
        self.position += touched
        peak = amax if recipe.amax_compute_algo == "most_recent" else self._peak(recipe)
        self.scale.copy_(torch.where(touched, self._scale_for(peak, recipe), self.scale))
        self.amax.masked_fill_(touched, UNTOUCHED)

    def _newest_first(self, length: int) -> torch.Tensor:
        rows = (self.position - 1 - torch.arange(length, device=self.scale.device, dtype=torch.int32)[:, None]).long()
        return self.history.gather(0, rows % self.history.shape[0])

    def _peak(self, recipe: DelayedScaling) -> torch.Tensor:
        if recipe.amax_compute_algo == "max" and recipe.amax_history_len == self.history.shape[0]:
            return self.history.amax(0)  # all of the ring, in any order
        history = self._newest_first(recipe.amax_history_len)
        return recipe.amax_compute_algo(history) if callable(recipe.amax_compute_algo) else history.amax(0)

    def _scale_for(self, amax: torch.Tensor, recipe: DelayedScaling) -> torch.Tensor:
        limits = recipe.fp8_format.value
        is_gradient = torch.arange(self.capacity, device=amax.device) % SLOTS_PER_GEMM >= FIRST_GRADIENT_SLOT
        fp8_max = torch.where(is_gradient, limits.max_bwd, limits.max_fwd).float()
        if recipe.scaling_factor_compute_algo is not None:
            return recipe.scaling_factor_compute_algo(amax, self.scale, fp8_max, recipe)
        scale = fp8_max * 2.0**-recipe.margin / amax
        scale = torch.where((amax > 0) & amax.isfinite(), scale, self.scale)
        return torch.where(scale.isinf(), _FP32_MAX, scale)


ARENAS: list[Arena] = []
"""Of all devices that have one."""


@functools.cache
def arena(device: torch.device) -> Arena:
    """The arena of a device, made on first use. `device` must carry its index ("cuda:0", not "cuda")."""
    ARENAS.append(Arena(device))
    return ARENAS[-1]


def _begin_step(counter: torch.Tensor, capacity: int, tenant: int) -> torch.Tensor:
    state = arena(counter.device)
    state.reserve(capacity)
    state.counter.add_(1)
    if tenant >= 0:
        state.roll(tenant)
    return state.scale[:capacity].clone()


begin_step = define(
    "begin_step(Tensor(a!) counter, int capacity, int tenant) -> Tensor",
    reference=_begin_step,
    kernel=("scaling", "begin_step"),
    fake=lambda counter, capacity, tenant: counter.new_empty(capacity, dtype=torch.float32),
)
"""End the step of `tenant` on the counter's device and return a snapshot, f32 [capacity], of all scales (tenant < 0: only the
snapshot). The counter is mutated so that calls are neither merged nor dropped."""


def _record_amax(counter: torch.Tensor, x: torch.Tensor, slots: torch.Tensor, slot: int, tenant: int) -> None:
    counter.add_(1)
    if x.numel():
        arena(x.device).record(slots, slot, x.abs().amax().float(), tenant)


record_amax = define(
    "record_amax(Tensor(a!) counter, Tensor x, Tensor slots, int slot, int tenant) -> ()",
    reference=_record_amax,
    kernel=_record_amax,
    fake=lambda counter, x, slots, slot, tenant: None,
)
"""Record a tensor's amax without quantizing it (calibration)."""
