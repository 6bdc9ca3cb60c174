"""`LayerNorm` and `RMSNorm`, drop-ins for torch's."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from overdrive.functional.norm import NormOptions, layer_norm
from overdrive.modules.base import Module, without_autocast
from overdrive.modules.checks import default_device, epsilon, mark_sequence_parallel, positive_int, refuse
from overdrive.scaling.autocast import current_context


def sm_margins(module: str, sm_margin: int | dict[str, int]) -> dict[str, int]:
    """sm_margin as one number each for "forward", "backward" and "inference"."""
    names = ("forward", "backward", "inference")
    margins: dict[str, int] = sm_margin if isinstance(sm_margin, dict) else dict.fromkeys(names, sm_margin)
    for name, margin in margins.items():
        if name not in names or isinstance(margin, bool) or not isinstance(margin, int) or margin < 0:
            raise ValueError(
                f"{module}: sm_margin must be an int >= 0, or a dict of them for {', '.join(map(repr, names))}; got {sm_margin!r}"
            )
    return {name: margins.get(name, 0) for name in names}


class _NormModule(Module):
    """Shapes: inp [..., *normalized_shape]; weight and bias of normalized_shape."""

    _rms = False

    def __init__(
        self,
        normalized_shape: int | Iterable[int] | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        sm_margin: int | dict[str, int] = 0,
        bias: bool = True,
        elementwise_affine: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if normalized_shape is None:
            normalized_shape = hidden_size
        if normalized_shape is None:
            raise TypeError(f"{self._label}: give normalized_shape, the size (or sizes) of the last dimension(s)")
        refuse(self._label, {"sequence_parallel": (sequence_parallel or None, None)})
        shape = tuple(normalized_shape) if isinstance(normalized_shape, Iterable) else (normalized_shape,)
        if not shape:
            raise ValueError(f"{self._label}: normalized_shape must have at least one dimension, got {normalized_shape!r}")
        self.normalized_shape = tuple(positive_int(self._label, "normalized_shape", size) for size in shape)
        self.eps = epsilon(self._label, eps)
        self.zero_centered_gamma, self.elementwise_affine = zero_centered_gamma, elementwise_affine
        self._margins = sm_margins(self._label, sm_margin)
        dtype = params_dtype or dtype or torch.get_default_dtype()
        device = default_device(device)
        self._add_slots(1, device)
        weight = torch.empty(self.normalized_shape, dtype=dtype, device=device)
        if elementwise_affine:
            self.weight = nn.Parameter(weight)
        else:  # a constant gain, kept out of state dicts as torch.nn.LayerNorm does
            self.register_buffer("weight", weight, persistent=False)
        has_bias = bias and elementwise_affine and not self._rms
        self.bias = nn.Parameter(torch.empty_like(weight)) if has_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gain 1 (0 where zero-centred), bias 0."""
        if self.weight.device.type != "meta":
            nn.init.constant_(self.weight, 0.0 if self.zero_centered_gamma else 1.0)
            if self.bias is not None:
                nn.init.zeros_(self.bias)
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                mark_sequence_parallel(parameter)

    def forward(self, inp: torch.Tensor, fp8_output: bool = False) -> torch.Tensor:
        """Norm of inp over its last dimension(s), in its dtype. fp8_output: a Float8Tensor where an `autocast` is on."""
        if not isinstance(inp, torch.Tensor):
            raise TypeError(f"{self._label}: inp must be a tensor, got {type(inp).__name__}")
        size = self.weight.numel()
        lead = inp.shape[: inp.dim() - len(self.normalized_shape)]
        if tuple(inp.shape[len(lead) :]) != self.normalized_shape:
            raise ValueError(f"{self._label}: inp must end in {list(self.normalized_shape)}, got shape {list(inp.shape)}")
        flat = inp if len(self.normalized_shape) == 1 else inp.reshape(*lead, size)
        dtype = self._check_input(flat, size, self.weight, "normalized_shape")
        context, training = current_context()
        margin = self._margins["forward" if training else "inference"]
        options = NormOptions(self.eps, self.zero_centered_gamma, self._rms, margin, self._margins["backward"])
        with without_autocast(inp.device):
            flat = flat if flat.dtype == dtype else flat.to(dtype)
            gamma = self.weight.reshape(-1)
            beta = None if self.bias is None else self.bias.reshape(-1)
            if fp8_output:
                rules = self._rules(context, training, flat.numel() // size, size)
                out = layer_norm(flat, gamma, beta, options, rules, self._scales(context), training)
            else:
                out = layer_norm(flat, gamma, beta, options)
        return out if flat.dim() == inp.dim() else out.reshape(inp.shape)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, zero_centered_gamma={self.zero_centered_gamma}"


class LayerNorm(_NormModule):
    """y = (x - mean) / sqrt(var + eps) * weight + bias (arXiv:1607.06450), statistics and affine map in f32.

    zero_centered_gamma: the gain is 1 + weight. sm_margin: SMs that the kernels leave free, an int or a dict with "forward",
    "backward", "inference". bias, elementwise_affine: as torch.nn.LayerNorm's.
    """


class RMSNorm(_NormModule):
    """y = x / sqrt(mean(x^2) + eps) * weight (arXiv:1910.07467); arguments as LayerNorm's, there is no bias."""

    _rms = True
