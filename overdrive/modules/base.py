"""What all layers share: parameters that may be split yet stay one buffer, slots and their state, input checks, GEMM options."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from overdrive.functional.gemm import GemmOptions
from overdrive.functional.linear import Parameters
from overdrive.modules.checks import InitMethod, mark_parallel, mark_sequence_parallel
from overdrive.modules.linear_names import LinearNames
from overdrive.modules.quantized_weights import QuantizedWeights
from overdrive.modules.weight_grad import WeightGradStore
from overdrive.ops.quantize import PAD
from overdrive.scaling.arena import SlotRange, with_index
from overdrive.scaling.autocast import Context, renew_snapshot
from overdrive.scaling.float8_tensor import Float8Tensor
from overdrive.scaling.quantized_init import applied
from overdrive.scaling.quantizers import Rules, Scales, fits_fp8
from overdrive.scaling.tensor import QuantizedTensor

_OWNERS = WeakIdKeyDictionary()
"""Whose buffer a split parameter is a view of: a module that shares it must not take it away."""


class Module(QuantizedWeights):
    """Base of the layers. A layer with GEMMs calls `_add_slots` and `_add_linear` when it is built."""

    _slots: torch.Tensor

    def __init__(self, name: str | None = None) -> None:
        super().__init__()
        self.name = name
        self._slot_range: SlotRange | None = None
        self._weight_cache: dict[int, QuantizedTensor] = {}
        self._weight_grads = WeightGradStore()
        self._warned = False

    @property
    def _label(self) -> str:
        kind = type(self).__name__
        return f"{kind} {self.name!r}" if self.name else kind

    # --- parameters -------------------------------------------------------------------------------------------------

    def _add_linear(
        self,
        prefix: str,
        rows: int,
        cols: int,
        bias: bool,
        *,
        dtype: torch.dtype,
        device: torch.device,
        init: InitMethod,
        sizes: dict[str, int] | None = None,
        get_rng_state_tracker: Any = None,
        partition_dim: int = 0,
    ) -> None:
        names = LinearNames(prefix, sizes, rows, bias)
        self._linears.append(names)
        fork = get_rng_state_tracker().fork() if get_rng_state_tracker is not None else contextlib.nullcontext()
        quantizer = self._weight_quantizer
        if quantizer is not None and not fits_fp8(rows, cols):
            self._warn_once(
                f"FP8 GEMMs need feature counts divisible by {PAD}, this layer has {cols} x {rows}: its weight stays in {dtype}"
            )
            quantizer = None
        with fork:
            if quantizer is not None:
                self._init_quantized(quantizer, torch.empty(rows, cols, dtype=dtype, device=device), init)
            else:
                for name, size in zip(names.weights, names.sizes):
                    weight = nn.Parameter(torch.empty(size, cols, dtype=dtype, device=device))
                    if device.type != "meta":
                        with torch.no_grad():
                            init(weight)
                    self.register_parameter(name, weight)
        for name in names.weights:
            mark_parallel(getattr(self, name), partition_dim)
        for name, size in zip(names.biases, names.sizes):
            vector = nn.Parameter(torch.zeros(size, dtype=dtype, device=device))
            if partition_dim == 0:
                mark_parallel(vector, 0)
            else:  # a row-parallel layer's bias is whole on every rank
                mark_sequence_parallel(vector)
            self.register_parameter(name, vector)
        if not bias:
            setattr(self, names.fused[1], torch.empty(0, dtype=dtype, device=device))
        self._fuse()

    def _fuse(self) -> None:
        """Make the parts of every split weight and bias views of one buffer, so that the products need no concatenation."""
        for index, linear in enumerate(self._linears):
            for fused, names in zip(linear.fused, (linear.weights, linear.biases)):
                if index in self._quantized and names is linear.weights:
                    continue
                if linear.split and names and not self._adjacent(fused, names):
                    self._fused.pop(fused, None)
                    parts = [getattr(self, name) for name in names]
                    if any(self._is_anothers(part) for part in parts):
                        continue
                    buffer = self._whole(fused, names)
                    for part, view in zip(parts, buffer.split(linear.sizes)):
                        part.data = view
                        _OWNERS[part] = weakref.ref(self)
                    self._fused[fused] = buffer

    def _is_anothers(self, part: nn.Parameter) -> bool:
        owner = _OWNERS[part]() if part in _OWNERS else None
        return owner is not None and owner is not self and any(part is other for other in owner._parameters.values())

    def _whole(self, fused: str, names: tuple[str, ...]) -> torch.Tensor:
        """The buffer of a split weight or bias; of one tied to another layer's, which has no buffer here, a copy."""
        buffer = self._fused.get(fused)
        return torch.cat([getattr(self, name).detach() for name in names]) if buffer is None else buffer

    def _adjacent(self, fused: str, names: tuple[str, ...]) -> bool:
        buffer = self._fused.get(fused)
        if buffer is None:
            return False
        address = buffer.data_ptr()
        for name in names:
            part = self._parameters[name]
            assert part is not None
            if part.data_ptr() != address or part.dtype != buffer.dtype or part.device != buffer.device:
                return False
            address += part.numel() * part.element_size()
        return True

    def _use_fused(self, index: int) -> None:
        """Turn a split weight and bias into one parameter each, as assigning `.weight` asks for."""
        linear = self._linears[index]
        self._linears[index] = LinearNames("", None, sum(linear.sizes), bool(linear.biases))
        for fused, names in zip(linear.fused, (linear.weights, linear.biases)):
            held = index in self._quantized and names is linear.weights
            buffer = self._whole(fused, names) if names and not held else None
            self._fused.pop(fused, None)
            for name in names:
                del self._parameters[name]
            if held:
                self._show_quantized(index)
            elif buffer is not None:
                super().register_parameter(fused, nn.Parameter(buffer))
            if names:
                mark_parallel(getattr(self, fused), 0)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter):
            if any(name == linear.fused[1] and not linear.biases for linear in self.__dict__.get("_linears", ())):
                raise ValueError(f"{self._label}: .{name} was assigned, but the layer adds none; build it with bias=True")
            if name in ("weight", "bias"):
                self._accept_whole(name)
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module's. A whole `weight` or `bias` given to a layer with split ones replaces the parts, and is shared, not
        copied.
        """
        if param is not None and name in ("weight", "bias"):
            self._accept_whole(name)
        for index, linear in enumerate(self.__dict__.get("_linears", ())):
            if param is not None and name in linear.weights:
                self._accept_quantized(index, name, param)
        super().register_parameter(name, param)
        for linear in self.__dict__.get("_linears", ()):
            if param is not None and name in (*linear.weights, *linear.biases) and self._fused.keys() & {*linear.fused}:
                self._fuse()  # another part has come

    def _accept_whole(self, name: str) -> None:
        for index, linear in enumerate(self.__dict__.get("_linears", ())):
            if linear.split and name in linear.fused and linear.weights[0] in self._parameters:
                self._use_fused(index)

    @property
    def has_split_parameters(self) -> bool:
        """Whether a weight is made of several parameters."""
        return any(linear.split for linear in self._linears)

    def _weights_of(self, index: int) -> tuple[nn.Parameter, ...]:
        """The parameters that make up the weight of GEMM number `index`."""
        return self._named(self._linears[index].weights)

    def _named(self, names: tuple[str, ...]) -> tuple[Any, ...]:
        """The parameters of these names, found sooner than by nn.Module's __getattr__; whatever has taken their place otherwise."""
        held: dict[str, Any] = self._parameters
        return tuple([held[name] if name in held else getattr(self, name) for name in names])

    def _parameters_of(self, index: int, weights: tuple[nn.Parameter, ...], with_bias: bool, dtype: torch.dtype) -> Parameters:
        """`weights`, from _weights_of, and their biases, in `dtype`."""
        linear = self._linears[index]
        if linear.split and not torch.compiler.is_compiling():
            self._fuse()
        held = index in self._quantized  # the weight comes from _cached_weight
        read: tuple[torch.Tensor | None, ...] = (None,) * len(weights) if held else weights
        biases = self._named(linear.biases) if with_bias else ()
        fused_weight = self._whole(linear.fused[0], linear.weights) if linear.split and not held else None
        fused_bias = self._whole(linear.fused[1], linear.biases) if linear.split and biases else None
        if weights[0].dtype != dtype:
            # torch.autocast: autograd casts the gradients back
            read, biases = tuple(None if w is None else w.to(dtype) for w in read), tuple(b.to(dtype) for b in biases)
            fused_weight, fused_bias = (None if t is None else t.to(dtype) for t in (fused_weight, fused_bias))
        return Parameters(read, biases, fused_weight, fused_bias)

    def _whole_bias(self, index: int, dtype: torch.dtype) -> torch.Tensor | None:
        """The bias as one tensor that gradients flow through, None without bias."""
        biases = [getattr(self, name) for name in self._linears[index].biases]
        if not biases:
            return None
        return (biases[0] if len(biases) == 1 else torch.cat(biases)).to(dtype)

    # --- slots and their state --------------------------------------------------------------------------------------

    def _add_slots(self, gemms: int, device: torch.device) -> None:
        self._slot_range = SlotRange(gemms, device)
        self.register_buffer("_slots", self._slot_range.indices(device), persistent=False)
        renew_snapshot(device)

    @property
    def _device(self) -> torch.device:
        return self._slots.device

    def _apply(self, fn: Any, recurse: bool = True) -> Module:
        before = None if self._slot_range is None else self._device
        views = self._views
        self._parameters.update(dict.fromkeys(views))
        try:
            super()._apply(fn, recurse)
            self._quantized = {index: applied(q, fn) for index, q in self._quantized.items()}
        finally:
            self._parameters.update(views)
        for index in self._quantized:
            self._show_quantized(index)
        self._weight_cache.clear()
        if self._slot_range is not None and before is not None:
            self._slots = self._slot_range.indices(self._device)  # to_empty() and type() spoil them
            if self._device != before and "meta" not in (self._device.type, before.type):
                state = self._slot_range.export(before)
                if state is not None:
                    self._slot_range.restore(state, self._device)
                renew_snapshot(self._device)
        self._fuse()
        return self

    def scaling_state(self) -> torch.Tensor | None:
        """Delayed scaling's state of this layer, None where nothing was recorded."""
        if self._slot_range is None or self._device.type == "meta":
            return None
        return self._slot_range.export(self._device)

    def set_scaling_state(self, state: torch.Tensor | None) -> None:
        """Go back to what scaling_state gave."""
        if self._slot_range is None or self._device.type == "meta":
            return
        if state is None:
            self._slot_range.reset(self._device)
        else:
            self._slot_range.restore(state, self._device)
        renew_snapshot(self._device)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state = self.scaling_state()
        if state is not None:
            destination[prefix + "_extra_state"] = state

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: Any,
        unexpected_keys: Any,
        error_msgs: Any,
    ) -> None:
        state = state_dict.pop(prefix + "_extra_state", None)
        given = {name: state_dict.get(prefix + name) for name in self._parameters}
        given = {name: value for name, value in given.items() if isinstance(value, Float8Tensor)}
        state_dict.update({prefix + name: value.dequantize() for name, value in given.items()})
        held, views, self._quantized = self._quantized, self._views, {}
        for index, q in held.items():  # load into high precision first
            linear = self._linears[index]
            for name, part in zip(linear.weights, q.dequantize().split(linear.sizes)):
                self._parameters[name] = nn.Parameter(part, requires_grad=False)
        try:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
            loaded = {name for name in views if prefix + name in state_dict}
            held = {index: self._loaded(index, q, loaded, given) for index, q in held.items()}
        finally:
            self._quantized = held
            self._parameters.update(views)
            for index in held:
                self._show_quantized(index)
        self._weight_cache.clear()
        self._fuse()
        if isinstance(state, torch.Tensor) and state.dtype == torch.float32 and state.numel() and self._slot_range is not None:
            try:
                self._slot_range.restore(state, self._device)
                renew_snapshot(self._device)
            except ValueError as error:
                error_msgs.append(f"{prefix}_extra_state: {error}")
        else:
            warn_of_foreign_state(f"{prefix}_extra_state", state)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy.deepcopy: the copy gets slots of its own with the same state."""
        state = self.__dict__.copy()
        if self._slot_range is not None:
            state["_slot_range"] = (len(self._linears) or 1, self.scaling_state())
        state["_fused"], state["_weight_cache"] = {}, {}
        state["_parameters"] = self._parameters | dict.fromkeys(self._views)  # made again from _quantized
        # as bytes: torch cannot read FP8 storages from a plain pickle
        state["_quantized"] = {
            i: replace(q, data=q.data.view(torch.uint8)) for i, q in self._quantized.items() if q.data is not None
        }
        state["_weight_grads"] = WeightGradStore(self._weight_grads.fuse, self._weight_grads.delay)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._slot_range is not None:
            gemms, exported = self._slot_range  # pyright: ignore[reportGeneralTypeIssues]
            self._slot_range = SlotRange(gemms, self._device)
            self._slots = self._slot_range.indices(self._device)
            if exported is not None:
                self._slot_range.restore(exported, self._device)
            renew_snapshot(self._device)
        for index, q in self._quantized.items():
            assert q.data is not None
            assert self._weight_quantizer is not None
            q.data = q.data.view(self._weight_quantizer.dtype)
            self._show_quantized(index)
        self._fuse()

    # --- one call ---------------------------------------------------------------------------------------------------

    def _check_input(self, inp: Any, features: int, parameter: torch.Tensor, what: str) -> torch.dtype:
        """The dtype to compute in, or an error that names what is wrong with `inp`."""
        if not isinstance(inp, torch.Tensor):
            raise TypeError(f"{self._label}: inp must be a tensor, got {type(inp).__name__}")
        if not inp.is_floating_point():
            raise TypeError(f"{self._label}: inp must have a floating-point dtype, got {inp.dtype}; convert it with .to()")
        if inp.dim() == 0 or inp.shape[-1] != features:
            raise ValueError(f"{self._label}: inp's last dimension must be {what}={features}, got shape {list(inp.shape)}")
        if inp.device != parameter.device:
            raise ValueError(
                f"{self._label}: inp is on {inp.device} but the parameters are on {parameter.device}; move one of them with .to()"
            )
        if autocasts(inp.device):
            return torch.get_autocast_dtype(inp.device.type)
        if inp.dtype != parameter.dtype:
            raise TypeError(
                f"{self._label}: inp has dtype {inp.dtype} but the parameters have {parameter.dtype}; convert one of them, set "
                "params_dtype, or use torch.autocast"
            )
        return inp.dtype

    def _rules(self, context: Context, training: bool, tokens: int, *features: int) -> Rules | None:
        """The rules this call follows; None where FP8 cannot take the layer's features, said once. Evaluation records no amaxes."""
        rules = context.rules
        if rules is None:
            return None
        if not fits_fp8(*features):
            self._warn_once(
                f"FP8 GEMMs need feature counts divisible by {PAD}, this layer has {' x '.join(map(str, features))}: it runs in "
                f"high precision. Round its sizes up to multiples of {PAD} to run it in FP8."
            )
            return None
        if training and tokens % PAD and rules.quantizes:  # decoding has few tokens by nature
            self._warn_once(
                f"FP8 GEMMs need token counts divisible by {PAD}, this layer got {tokens}: it runs padded to "
                f"{-(-tokens // PAD) * PAD}. Use a batch x sequence divisible by {PAD} to avoid the extra work."
            )
        silent = context.replayed or (rules.quantizes and not training)
        return rules.at(0, record=False) if silent else rules

    def _warn_once(self, message: str) -> None:
        if not torch.compiler.is_compiling() and not self._warned:
            self._warned = True
            warnings.warn(f"{self._label}: {message}", stacklevel=4)

    def _scales(self, context: Context) -> Scales:
        if context.snapshots is None or self._slot_range is None:
            return Scales()
        slots = self._slots
        return Scales(context.snapshot_on(with_index(slots.device), self._slot_range), slots)

    def _gemm_options(
        self,
        index: int,
        rules: Rules | None,
        dtype: torch.dtype,
        weights: tuple[nn.Parameter, ...],
        biases: tuple[torch.Tensor, ...],
        input_grad: bool,
        training: bool,
        first: bool | None,
    ) -> GemmOptions:
        """Options of GEMM number `index`. weights: from _weights_of. input_grad: whether a gradient must leave by its input."""
        weight_grad = training and any(weight.requires_grad for weight in weights)
        if weight_grad and index in self._quantized:
            raise NotImplementedError(
                f"{self._label}: training with FP8 primary weights (quantized_model_init) is not built yet; freeze them with "
                "requires_grad_(False), run under torch.no_grad(), or build the layer outside of quantized_model_init"
            )
        bias_grad = training and any(bias.requires_grad for bias in biases)
        at = None if rules is None else rules.at(index) if index else rules
        options = GemmOptions(at, dtype, input_grad and training, weight_grad, bias_grad, self._linears[index].sizes)
        return self._weight_grads.attach(options, weights, first) if weight_grad else options

    def _cached_weight(
        self, index: int, parameters: Parameters, options: GemmOptions, scales: Scales, first: bool | None
    ) -> QuantizedTensor | None:
        """The weight as quantized at the first microbatch: made anew if `first`, None where each call quantizes for itself.

        One held in FP8 is given as it is, or put into `parameters` in high precision.
        """
        if index in self._quantized:
            return self._as_read(index, parameters, options)
        if first is None or not options.quantizes:
            return None
        assert options.rules is not None
        quantizer = options.rules.weight
        cached = self._weight_cache.get(index)
        usable = cached is not None and cached.mode == quantizer.mode and (cached.data_t is not None or not options.input_grad)
        if first or not usable:
            with torch.no_grad():
                weight = parameters.weights[0] if parameters.fused_weight is None else parameters.fused_weight
                assert weight is not None
                cached = quantizer(weight.detach(), scales, row=True, col=True)[0]
            self._weight_cache[index] = cached
        return cached

    def backward_dw(self) -> None:
        """Compute the weight gradients that `delay_wgrad_compute=True` put off; call it after backward."""
        self._weight_grads.run()


def warn_of_foreign_state(key: str, state: Any) -> None:
    """Say that `state`, found in a state dict under `key`, is not read, unless there is nothing in it."""
    if state is None or (isinstance(state, torch.Tensor) and state.numel() == 0):
        return
    warnings.warn(
        f"{key} is not overdrive's and was not read (it may hold pickled code); FP8 scales start afresh and settle within a few "
        "steps",
        stacklevel=3,
    )


def autocasts(device: torch.device) -> bool:
    """Whether torch.autocast is on for a device."""
    return torch._C._is_any_autocast_enabled() and device.type != "meta" and torch.is_autocast_enabled(device.type)


_AS_IT_IS = contextlib.nullcontext()


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """torch.autocast off where it is on: the layers have cast their inputs, what happens inside is not its business."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else _AS_IT_IS
