"""`autocast`: which recipe the layers inside of it use, and when delayed scaling's steps begin."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from overdrive.ops.library import capturing
from overdrive.ops.scaling import begin_step
from overdrive.recipe import DelayedScaling, Recipe
from overdrive.scaling import recompute
from overdrive.scaling.arena import SLOTS, SlotRange, tenant_of, with_index
from overdrive.scaling.quantizers import Rules, rules_for
from overdrive.scaling.support import usable


@dataclass
class Context:
    """What an autocast asks of the layers inside.

    rules: how to quantize, None for high precision. tenant: delayed scaling's number of the recipe and group. snapshots: this
    step's scales by device. replayed: this repeats a forward for a checkpoint, whose amaxes are recorded already. captured: it was
    entered while a CUDA graph was being captured.
    """

    rules: Rules | None = None
    tenant: int = -1
    snapshots: dict[torch.device, torch.Tensor] | None = None
    replayed: bool = False
    captured: bool = False

    def snapshot_on(self, device: torch.device, slots: SlotRange) -> torch.Tensor:
        """The scales on `device`, those of `slots` too; taken now for layers built or moved since the autocast began."""
        assert self.snapshots is not None
        snapshot = self.snapshots.get(device)
        if snapshot is not None and is_dynamo_compiling():
            return snapshot  # slots differ from layer to layer: compiled code must not look at them
        if not self.captured and capturing(device):
            raise RuntimeError(
                "a CUDA graph is being captured inside of an autocast that was entered before the capture: every replay would use "
                "today's scales. Enter autocast in the function that is captured, or use overdrive.pytorch.make_graphed_callables"
            )
        if snapshot is None or snapshot.numel() < slots.end:
            SLOTS.use_on(device)
            snapshot = self.renew(device)
        return snapshot

    def renew(self, device: torch.device) -> torch.Tensor:
        """Take the scales on `device` anew, without ending a step."""
        assert self.snapshots is not None
        snapshot = self.snapshots[device] = begin_step(SLOTS.counters[device], SLOTS.capacity, -1)
        return snapshot


OFF = Context()


class _State:
    """An instance, as torch 2.11's tracer refuses to set attributes of a class."""

    def __init__(self) -> None:
        self.context = OFF


STATE = _State()


def get_default_recipe() -> Recipe:
    """The recipe of an `autocast` that names none: DelayedScaling()."""
    return DelayedScaling()


def _snapshots(tenant: int, recording: bool) -> dict[torch.device, torch.Tensor]:
    return {device: begin_step(counter, SLOTS.capacity, tenant if recording else -1) for device, counter in SLOTS.counters.items()}


def _rules(recipe: Recipe, group: Any, quantizes: bool) -> tuple[Rules, int]:
    """(rules, tenant) of a recipe."""
    tenant = -1
    if isinstance(recipe, DelayedScaling):
        length, compute_amax, compute_scale = recipe.amax_history_len, recipe.amax_compute_algo, recipe.scaling_factor_compute_algo
        tenant = tenant_of(group, recipe.margin, recipe.fp8_format, length, compute_amax, compute_scale, recipe.reduce_amax)
    return rules_for(recipe, tenant, quantizes), tenant


_known_rules = functools.cache(_rules)


def _new_context(enabled: bool, calibrating: bool, recipe: Recipe | None, group: Any, outer: Context, training: bool) -> Context:
    if not (enabled or calibrating):
        return OFF
    recipe = get_default_recipe() if recipe is None else recipe
    if not isinstance(recipe, Recipe):
        raise TypeError(
            "autocast: recipe must be a recipe of overdrive.common.recipe (DelayedScaling(), Float8CurrentScaling(), "
            f"Float8BlockScaling()), got {type(recipe).__name__}: {recipe!r}"
        )
    for name in ("fp8_dpa", "fp8_mha"):
        if getattr(recipe, name):
            raise NotImplementedError(f"autocast: {type(recipe).__name__}({name}=True) is not built yet; use {name}=False")
    if enabled:
        available, reason = usable(recipe)
        if not available:
            raise NotImplementedError(f"autocast: {type(recipe).__name__} cannot run here: {reason}")
    delayed = isinstance(recipe, DelayedScaling)
    if not (enabled or delayed):
        return OFF  # only delayed scaling has anything to calibrate
    rules, tenant = (_rules if torch.compiler.is_compiling() else _known_rules)(recipe, group if delayed else None, enabled)
    if not delayed:
        return Context(rules)
    if outer.tenant == tenant and outer.snapshots is not None:
        snapshots = outer.snapshots  # a nested autocast continues the step of its equal
    else:
        snapshots = _snapshots(tenant, training)
    captured = outer.captured
    if snapshots is not outer.snapshots:
        captured = not torch.compiler.is_compiling() and any(map(capturing, snapshots))
    return Context(rules, tenant, snapshots, captured=captured)


def _enter(enabled: bool, calibrating: bool, recipe: Recipe | None, group: Any, outer: Context) -> Context:
    if torch.compiler.is_compiling():
        return _new_context(enabled, calibrating, recipe, group, outer, torch.is_grad_enabled())
    running = recompute.current()
    earlier = None if running.repeated is None else running.repeated.next_entered(running.task)
    if earlier is not None:
        context = replace(earlier, replayed=True)
    else:
        training = torch.is_grad_enabled() or running is not recompute.OUTSIDE
        context = _new_context(enabled, calibrating, recipe, group, outer, training)
    if running.first:
        context = replace(context)  # known by its identity
    for recording in running.first:
        recording.entered.append(context)
    return context


@contextlib.contextmanager
def autocast(
    enabled: bool = True,
    calibrating: bool = False,
    recipe: Recipe | None = None,
    amax_reduction_group: Any = None,
    _graph: bool = False,
) -> Iterator[None]:
    """Run the overdrive layers inside in FP8, forward and (wherever it is called) backward.

    enabled: False runs them in high precision, also inside an enabled autocast. calibrating: record the amaxes that delayed
    scaling needs although FP8 is off. recipe: None means DelayedScaling(). amax_reduction_group: process group over which
    delayed scaling takes the maximum of amaxes (every rank must enter the autocast). _graph: accepted for compatibility; CUDA
    graphs need no flag here.

    Entering the outermost autocast with gradients enabled ends delayed scaling's previous step. Raises TypeError for a recipe
    that is none, NotImplementedError for one that is not built or cannot run on this machine.
    """
    outer = STATE.context
    STATE.context = _enter(enabled, calibrating, recipe, amax_reduction_group, outer)
    try:
        yield
    finally:
        STATE.context = outer


def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Recipe | None = None,
    fp8_group: Any = None,
    _graph: bool = False,
) -> contextlib.AbstractContextManager[None]:
    """The older name of `autocast`."""
    return autocast(enabled, calibrating, fp8_recipe, fp8_group, _graph)


def renew_snapshot(device: torch.device) -> None:
    """Tell the autocast that is on of slots handed out or restored since it was entered."""
    device = with_index(device)
    if STATE.context.snapshots is not None and device in SLOTS.counters:
        STATE.context.renew(device)


def current_context() -> tuple[Context, bool]:
    """(context, training): what a layer called now has to follow, and whether a backward may come.

    Inside of a checkpoint's recomputation that is the context of the forward it repeats.
    """
    context, training = STATE.context, torch.is_grad_enabled()
    if is_dynamo_compiling():
        return context, training
    running = recompute.current()
    if running is recompute.OUTSIDE:
        return context, training
    repeated = running.repeated
    if repeated is not None and repeated.around is not None and not context.replayed:
        context = replace(repeated.around, replayed=True)
    for recording in running.first:
        if not any(context is entered for entered in recording.entered):
            recording.around = context
    return context, True
