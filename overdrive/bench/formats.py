"""How the bench quantizes by hand: the modes of each recipe, as the ops take them."""

from __future__ import annotations

import torch

from overdrive.ops.quantize import Mode, Quantization
from overdrive.ops.scaling import arena, tenant_id
from overdrive.recipe import DelayedScaling
from overdrive.scaling.arena import SlotRange, with_index

MODES = {
    "delayed": {"delayed": Mode.DELAYED},
    "current": {"current": Mode.CURRENT},
    "block": {"block 1d": Mode.BLOCK_1D, "block 2d": Mode.BLOCK_2D},
}
"""Recipe -> its modes by name; block scaling quantizes activations in 1x128, weights in 128x128 blocks."""

E4M3 = torch.float8_e4m3fn
SCALE = 16.0
"""Delayed scaling's scale: the products of two normal values that some kernels make stay below E4M3's largest."""


class Formats:
    """Quantizations that record their amaxes in slots of their own."""

    def __init__(self, device: torch.device) -> None:
        self._range = SlotRange(1, device)  # held, or the slots would be handed out again
        self.slots = self._range.indices(device)
        arena(with_index(device)).reserve(self._range.end)
        self.scales = torch.full((self._range.end,), SCALE, device=device)
        self.tenant = tenant_id(DelayedScaling(), None)

    def __call__(self, mode: Mode, transposed: bool = True) -> Quantization:
        """The tail of an op's arguments for E4M3 data; transposed: with the copy that a weight gradient reads."""
        if mode == Mode.DELAYED:
            return Quantization(mode, E4M3, self.scales, self.slots, 0, self.tenant, col=transposed)
        return Quantization(mode, E4M3, power_of_2=mode in (Mode.BLOCK_1D, Mode.BLOCK_2D), col=transposed)
