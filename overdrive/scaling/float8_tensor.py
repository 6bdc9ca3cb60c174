"""`Float8Tensor`: a quantized activation or weight as users see it; autograd follows it and no layer quantizes it again."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.utils._pytree import tree_map

from overdrive.ops.quantize import Mode
from overdrive.scaling.tensor import QuantizedTensor

_INNER = ("data", "data_t", "scale_inv", "scale_inv_t")
_SAME_VALUES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
_NEW_SHAPE = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default, torch.ops.aten.reshape.default)


class Float8Tensor(torch.Tensor):
    """An FP8 tensor that looks like one of its nominal dtype (bf16, say).

    Made by `fp8_output=True` and, as a frozen parameter, by `quantized_model_init`. The overdrive layers take its FP8 data as
    they are; any other operation dequantizes first. Saving it with torch.save stores the plain tensor of its values, so files
    hold no code of ours.
    """

    _data: torch.Tensor | None
    _data_t: torch.Tensor | None
    _scale_inv: torch.Tensor
    _scale_inv_t: torch.Tensor | None
    _initial: torch.Tensor | None = None

    @staticmethod
    def __new__(
        cls, inner: dict[str, torch.Tensor], mode: Mode, matrix: tuple[int, int], dtype: torch.dtype, shape
    ) -> Float8Tensor:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=inner["scale_inv"].device)

    def __init__(self, inner: dict[str, torch.Tensor], mode: Mode, matrix: tuple[int, int], dtype: torch.dtype, shape) -> None:
        self._inner_names = tuple(name for name in _INNER if name in inner)
        for name in _INNER:
            setattr(self, f"_{name}", inner.get(name))
        self._mode, self._matrix = Mode(mode), matrix  # torch.compile hands enums over as ints

    @classmethod
    def from_quantized(cls, q: QuantizedTensor, shape: Any) -> Float8Tensor:
        """Wrap quantized data [T, K] as a tensor of `shape` [..., K]."""
        inner = {name: getattr(q, name) for name in _INNER[:3] if getattr(q, name) is not None}
        if not q.mode.per_tensor and q.data_t is not None:
            inner["scale_inv_t"] = q.scale_inv_t
        return cls(inner, q.mode, q.shape, q.dtype, torch.Size(shape))

    @property
    def quantized(self) -> QuantizedTensor:
        """The FP8 data and scales."""
        return quantized_of(self)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The values as a plain tensor, in the nominal dtype unless told otherwise."""
        values = self.quantized.dequantize().view(self.shape)
        return values if dtype is None else values.to(dtype)

    def get_high_precision_init_val(self) -> torch.Tensor | None:
        """The values before the quantization, on the CPU; None unless this is a parameter that was built with
        `quantized_model_init(preserve_high_precision_init_val=True)`.
        """
        return self._initial

    def clear_high_precision_init_val(self) -> None:
        """Free what `get_high_precision_init_val` gives."""
        self._initial = None

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        fp8 = getattr(self, f"_{self._inner_names[0]}").dtype
        about = f"shape={list(self.shape)}, dtype={self.dtype}, fp8_dtype={fp8}, scaling={self._mode.name.lower()}"
        return f"Float8Tensor({about}, data={self.dequantize()})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dequantize().detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Float8Tensor:
        if id(self) not in memo:
            if not self.is_leaf:
                raise RuntimeError("only Float8Tensors that are leaves of autograd's graph can be deep-copied; use .detach() first")
            copied = Float8Tensor.from_quantized(copy.deepcopy(self.quantized, memo), self.shape)
            memo[id(self)] = copied.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __tensor_flatten__(self):
        return [f"_{name}" for name in self._inner_names], (self._mode, self._matrix, self.dtype)

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, outer_size, outer_stride):
        mode, matrix, dtype = meta
        return cls({name[1:]: tensor for name, tensor in inner.items()}, mode, matrix, dtype, outer_size)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in _SAME_VALUES:
            return cls.from_quantized(args[0].quantized, args[0].shape)
        if func in _NEW_SHAPE:
            shape = torch.empty(args[0].shape, device="meta").view(args[1]).shape
            if shape[-1:] == args[0].shape[-1:]:
                return cls.from_quantized(args[0].quantized, shape)

        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for i, argument in enumerate(func._schema.arguments):
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                if isinstance(value, Float8Tensor) and argument.alias_info is not None and argument.alias_info.is_write:
                    raise NotImplementedError(f"{func}: a Float8Tensor cannot be changed in place; change its .dequantize()")

        def plain(value: Any) -> Any:
            return value.dequantize() if isinstance(value, Float8Tensor) else value

        args, kwargs = tree_map(plain, (args, kwargs))
        return func(*args, **kwargs)


def quantized_of(x: Float8Tensor) -> QuantizedTensor:
    """The FP8 data and scales; a function, as torch.compile traces those and not properties of tensors."""
    scale_inv_t = x._scale_inv if x._scale_inv_t is None else x._scale_inv_t
    return QuantizedTensor(x._data, x._data_t, x._scale_inv, scale_inv_t, x._mode, x._matrix, x.dtype)
