"""`quantized_model_init`: layers built inside of it hold their weights in FP8 only, and what such a weight needs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from overdrive.ops.quantize import BLOCK, Mode, blocks, new_block_scales
from overdrive.recipe import Recipe
from overdrive.scaling.autocast import get_default_recipe
from overdrive.scaling.quantizers import Quantizer, Scales, rules_for
from overdrive.scaling.support import usable
from overdrive.scaling.tensor import QuantizedTensor


@dataclass
class _State:
    """quantizer: of the weights of layers built now, None for high precision. preserve: keep what they were initialised with."""

    quantizer: Quantizer | None = None
    preserve: bool = False


STATE = _State()


def _weight_quantizer(recipe: Recipe) -> Quantizer:
    weight = rules_for(recipe, tenant=-1).weight
    # a weight that stays as it is needs no history: its own amax is what delayed scaling would settle on
    return Quantizer(Mode.CURRENT, weight.dtype, weight.slot) if weight.mode == Mode.DELAYED else weight


@contextlib.contextmanager
def quantized_model_init(
    enabled: bool = True, recipe: Recipe | None = None, preserve_high_precision_init_val: bool = False
) -> Iterator[None]:
    """Layers built inside hold the weights of their GEMMs in FP8 only, for inference; biases and norms stay as they are.

    Each weight is initialised and quantized before the next one is made. It appears as a frozen `Float8Tensor` parameter; a
    forward that would owe its gradient raises NotImplementedError, while gradients of inputs, biases and norms flow. Inside of an
    `autocast` the FP8 data is used as it is, outside of one it is dequantized for each product. DelayedScaling and
    Float8CurrentScaling serve each other's weights, blocks of another shape raise RuntimeError in the forward. Weights whose sizes
    FP8 GEMMs do not take stay in high precision, with a warning.

    load_state_dict quantizes what it loads; so an existing model is quantized by building it again in here and loading its state
    dict, strict. A state dict holds the weights as `Float8Tensor`s, which load bit for bit into a model quantized alike, and as
    their values into any other; torch.save writes the values, so that files are those of ordinary models.

    enabled: False builds ordinary layers, also inside an enabled one. recipe: None means DelayedScaling(); weights have one scale
    from their own amax (DelayedScaling, without its margin, and Float8CurrentScaling) or one for each block.
    preserve_high_precision_init_val: keep the values from before the quantization on the CPU, for the parameters'
    `get_high_precision_init_val()` and `clear_high_precision_init_val()`. Raises TypeError for a recipe that is none,
    NotImplementedError for one that is not built or cannot run on this machine.
    """
    quantizer = None
    if enabled:
        recipe = get_default_recipe() if recipe is None else recipe
        if not isinstance(recipe, Recipe):
            raise TypeError(
                "quantized_model_init: recipe must be a recipe of overdrive.common.recipe (DelayedScaling(), "
                f"Float8CurrentScaling(), Float8BlockScaling()), got {type(recipe).__name__}: {recipe!r}"
            )
        available, reason = usable(recipe)
        if not available:
            raise NotImplementedError(f"quantized_model_init: {type(recipe).__name__} cannot run here: {reason}")
        quantizer = _weight_quantizer(recipe)
    outer = STATE.quantizer, STATE.preserve
    STATE.quantizer, STATE.preserve = quantizer, preserve_high_precision_init_val
    try:
        yield
    finally:
        STATE.quantizer, STATE.preserve = outer


fp8_model_init = quantized_model_init
"""The older name of `quantized_model_init`."""


def same_scaling(a: Mode, b: Mode) -> bool:
    """Whether data of one mode can stand where the other is asked for."""
    return a == b or (a.per_tensor and b.per_tensor)


def rows_of(q: QuantizedTensor, start: int, rows: int) -> QuantizedTensor:
    """Rows of a weight as a view of its data; 128x128 blocks cut through by `start` become 1x128 ones of the same scales."""
    assert q.data is not None
    mode, scale_inv, stop = q.mode, q.scale_inv, start + rows
    if mode == Mode.BLOCK_2D and start % BLOCK:
        scale_inv = scale_inv.repeat_interleave(BLOCK, 0)[start:stop, : blocks(q.shape[1])]
        mode = Mode.BLOCK_1D
    elif mode == Mode.BLOCK_2D:
        scale_inv = scale_inv[start // BLOCK : blocks(stop)]
    elif mode == Mode.BLOCK_1D:
        scale_inv = scale_inv[start:stop]
    scale_inv_t = scale_inv if mode.per_tensor else q.scale_inv_t
    return QuantizedTensor(q.data[start:stop], None, scale_inv, scale_inv_t, mode, (rows, q.shape[1]), q.dtype)


def joined(parts: Sequence[QuantizedTensor], mode: Mode, device: torch.device, dtype: torch.dtype) -> QuantizedTensor | None:
    """A copy of the weight that was cut into `parts`, None where they were not quantized together, or not for `mode`."""
    first, data, rows = parts[0], [], 0
    for part in parts:
        aligned = part.mode != Mode.BLOCK_2D or rows % BLOCK == 0
        if part.data is None or not aligned or part.mode != first.mode or not same_scaling(part.mode, mode):
            return None
        if part.mode.per_tensor and not torch.equal(part.scale_inv, first.scale_inv):
            return None
        data.append(part.data[: part.shape[0]].to(device))
        rows += part.shape[0]
    if first.mode.per_tensor:
        scale_inv = first.scale_inv.to(device, copy=True)
    elif first.mode == Mode.BLOCK_1D:  # rows fastest
        scale_inv = torch.cat([part.scale_inv.t().to(device) for part in parts], 1).t()
    else:
        scale_inv = torch.cat([part.scale_inv.to(device) for part in parts])
    scale_inv_t = scale_inv if first.mode.per_tensor else first.scale_inv_t.to(device)
    return QuantizedTensor(torch.cat(data), None, scale_inv, scale_inv_t, first.mode, (rows, first.shape[1]), dtype)


def with_transpose(q: QuantizedTensor, quantizer: Quantizer) -> QuantizedTensor:
    """A weight with the copy that an input gradient reads. 1x128 blocks are quantized again along the other dimension."""
    assert q.data is not None
    (rows, cols), data_t, scale_inv_t = q.shape, q.data.t().contiguous(), q.scale_inv
    if q.mode == Mode.BLOCK_1D:
        again = quantizer(q.dequantize(), Scales(), row=False, col=True)[0]
        data_t, scale_inv_t = again.data_t, again.scale_inv_t
    elif q.mode == Mode.BLOCK_2D:
        scale_inv_t = new_block_scales(q.scale_inv, q.mode, cols, rows).fill_(1)
        scale_inv_t[:, : blocks(rows)] = q.scale_inv[:, : blocks(cols)].t()
    return QuantizedTensor(q.data, data_t, q.scale_inv, scale_inv_t, q.mode, q.shape, q.dtype)


def applied(q: QuantizedTensor, function: Callable[[torch.Tensor], torch.Tensor]) -> QuantizedTensor:
    """What nn.Module._apply does to a parameter: `function` moves the bits and casts only the dtype they stand for."""

    def bits(tensor: torch.Tensor) -> torch.Tensor:
        raw = tensor.view(torch.uint8 if tensor.element_size() == 1 else torch.int32)
        result = function(raw)
        return (result if result.dtype == raw.dtype else raw.to(result.device)).view(tensor.dtype)

    assert q.data is not None
    dtype = function(torch.empty(0, dtype=q.dtype, device=q.data.device)).dtype
    scale_inv = bits(q.scale_inv)
    scale_inv_t = scale_inv if q.mode.per_tensor else bits(q.scale_inv_t)
    return QuantizedTensor(bits(q.data), None, scale_inv, scale_inv_t, q.mode, q.shape, dtype)
