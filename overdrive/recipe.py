"""FP8 recipes: which formats a layer's GEMMs use and how the scales are found. Values only; nothing here touches a tensor."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import InitVar, dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch


class FormatSpec(NamedTuple):
    """Dtypes of one format: ``fwd`` for inputs and weights, ``bwd`` for gradients (None where torch has no such dtype)."""

    fwd: torch.dtype | None
    bwd: torch.dtype | None
    max_fwd: float
    max_bwd: float


class Format(Enum):
    """Number formats. E4M3 reaches 448, E5M2 57344; HYBRID takes E4M3 forward and E5M2 for gradients (arXiv:2209.05433)."""

    E2M1 = FormatSpec(None, None, 6.0, 6.0)
    E4M3 = FormatSpec(torch.float8_e4m3fn, torch.float8_e4m3fn, 448.0, 448.0)
    E5M2 = FormatSpec(torch.float8_e5m2, torch.float8_e5m2, 57344.0, 57344.0)
    HYBRID = FormatSpec(torch.float8_e4m3fn, torch.float8_e5m2, 448.0, 57344.0)

    @property
    def fwd(self) -> torch.dtype | None:
        """Dtype of inputs and weights."""
        return self.value.fwd

    @property
    def bwd(self) -> torch.dtype | None:
        """Dtype of gradients."""
        return self.value.bwd


class MMParams(NamedTuple):  # no dataclass: torch.compile cannot hold one as a default of a recipe made inside compiled code
    """How a GEMM accumulates: ``use_split_accumulator=True`` keeps full fp32 sums, False allows the faster tensor-core sums."""

    use_split_accumulator: bool = True


_FAST = MMParams(use_split_accumulator=False)
_SPLIT = MMParams(use_split_accumulator=True)


class Recipe:
    """Base of all recipes; the predicates tell which one it is."""

    fp8_format: Format
    fp8_dpa: bool
    fp8_mha: bool
    fp8_gemm_fprop: MMParams = _FAST
    fp8_gemm_dgrad: MMParams = _SPLIT
    fp8_gemm_wgrad: MMParams = _SPLIT

    def delayed(self) -> bool:
        """True for DelayedScaling."""
        return isinstance(self, DelayedScaling)

    def float8_current_scaling(self) -> bool:
        """True for Float8CurrentScaling."""
        return isinstance(self, Float8CurrentScaling)

    def float8_per_tensor_scaling(self) -> bool:
        """True where one scale serves a whole tensor."""
        return isinstance(self, DelayedScaling | Float8CurrentScaling)

    def float8_block_scaling(self) -> bool:
        """True for Float8BlockScaling."""
        return isinstance(self, Float8BlockScaling)

    def mxfp8(self) -> bool:
        """True for MXFP8BlockScaling."""
        return isinstance(self, MXFP8BlockScaling)

    def nvfp4(self) -> bool:
        """True for NVFP4BlockScaling."""
        return isinstance(self, NVFP4BlockScaling)

    def _check_format(self, *allowed: Format) -> None:
        if self.fp8_format not in allowed:
            names = ", ".join(f"Format.{f.name}" for f in allowed)
            why = " (E5M2 has too few mantissa bits for activations and weights)" if self.fp8_format is Format.E5M2 else ""
            raise ValueError(f"{type(self).__name__}: fp8_format must be one of {names}, got {self.fp8_format}{why}")

    def _check_margin(self, margin: float) -> None:
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin) or margin < 0:
            raise ValueError(
                f"{type(self).__name__}: margin must be a number >= 0 (the scale is divided by 2**margin), got {margin!r}"
            )

    def _check_mm(self) -> None:
        for name in ("fp8_gemm_fprop", "fp8_gemm_dgrad", "fp8_gemm_wgrad"):
            if not isinstance(getattr(self, name), MMParams):
                raise TypeError(f"{type(self).__name__}: {name} must be an MMParams, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class DelayedScaling(Recipe):
    """One scale per tensor, from the amaxes of earlier steps: scale = FP8_MAX / amax / 2**margin.

    margin: powers of two of head-room. amax_history_len: steps remembered. amax_compute_algo: "max" over the history,
    "most_recent", or a callable(amax_history [steps, tensors]) -> amax [tensors], newest step first.
    scaling_factor_compute_algo: callable(amax, scale, fp8_max, recipe) -> scale, replacing the formula above.
    reduce_amax: take the maximum over the process group given to ``autocast``.
    ``interval`` and ``override_linear_precision`` are retired and ignored with a DeprecationWarning.
    """

    margin: float = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: str | Callable[[torch.Tensor], torch.Tensor] = "max"
    scaling_factor_compute_algo: Callable[..., torch.Tensor] | None = None
    reduce_amax: bool = True
    fp8_dpa: bool = False
    fp8_mha: bool = False
    interval: InitVar[Any] = None
    override_linear_precision: InitVar[Any] = None

    def __post_init__(self, interval: Any, override_linear_precision: Any) -> None:
        for name, value in (("interval", interval), ("override_linear_precision", override_linear_precision)):
            if value is not None:
                warnings.warn(f"DelayedScaling: {name} is retired and has no effect; drop it", DeprecationWarning, stacklevel=3)
        if override_linear_precision is not None and any(override_linear_precision):
            raise NotImplementedError(
                f"DelayedScaling: override_linear_precision must be (False, False, False), got {override_linear_precision!r}"
            )
        self._check_format(Format.HYBRID, Format.E4M3)
        self._check_margin(self.margin)
        length = self.amax_history_len
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ValueError(f"DelayedScaling: amax_history_len must be an int >= 1, got {length!r}")
        if self.amax_compute_algo not in ("max", "most_recent") and not callable(self.amax_compute_algo):
            raise ValueError(
                'DelayedScaling: amax_compute_algo must be "max", "most_recent" or a callable(amax_history) -> amax, '
                f"got {self.amax_compute_algo!r}"
            )
        if self.scaling_factor_compute_algo is not None and not callable(self.scaling_factor_compute_algo):
            raise TypeError(
                "DelayedScaling: scaling_factor_compute_algo must be a callable(amax, scale, fp8_max, recipe) -> scale, "
                f"got {self.scaling_factor_compute_algo!r}"
            )


@dataclass(frozen=True)
class Float8CurrentScaling(Recipe):
    """One scale per tensor, from its own amax; ``use_power_2_scales`` rounds scales down to powers of two."""

    use_power_2_scales: bool = False
    fp8_format: Format = Format.HYBRID
    fp8_gemm_fprop: MMParams = _FAST
    fp8_gemm_dgrad: MMParams = _SPLIT
    fp8_gemm_wgrad: MMParams = _SPLIT
    fp8_dpa: bool = False
    fp8_mha: bool = False

    def __post_init__(self) -> None:
        self._check_format(Format.HYBRID, Format.E4M3)
        self._check_mm()


@dataclass(frozen=True)
class Float8BlockScaling(Recipe):
    """One scale per 1x128 (dim 1) or 128x128 (dim 2) block, from the block's own amax (DeepSeek-V3, arXiv:2412.19437).

    Scales are powers of two unless ``use_f32_scales``. Of the two operands of any GEMM at most one may use 128x128 blocks.
    """

    use_f32_scales: bool = False
    fp8_format: Format = Format.E4M3
    x_block_scaling_dim: int = 1
    w_block_scaling_dim: int = 2
    grad_block_scaling_dim: int = 1
    fp8_gemm_fprop: MMParams = _SPLIT
    fp8_gemm_dgrad: MMParams = _SPLIT
    fp8_gemm_wgrad: MMParams = _SPLIT
    fp8_dpa: bool = False
    fp8_mha: bool = False

    def __post_init__(self) -> None:
        self._check_format(Format.E4M3)
        self._check_mm()
        names = ("x_block_scaling_dim", "w_block_scaling_dim", "grad_block_scaling_dim")
        dims = [getattr(self, name) for name in names]
        for name, dim in zip(names, dims, strict=True):
            if dim not in (1, 2):
                raise ValueError(f"Float8BlockScaling: {name} must be 1 (1x128 blocks) or 2 (128x128 blocks), got {dim!r}")
        if dims.count(2) > 1:
            raise ValueError(
                "Float8BlockScaling: at most one of x_, w_ and grad_block_scaling_dim may be 2, as no FP8 GEMM multiplies "
                f"two operands of 128x128 blocks; got {dict(zip(names, dims, strict=True))}"
            )


@dataclass(frozen=True)
class MXFP8BlockScaling(Recipe):
    """1x32 blocks with E8M0 scales (OCP MX 1.0). Importable; using it raises NotImplementedError for now."""

    margin: float = 0
    fp8_format: Format = Format.E4M3
    fp8_dpa: bool = False
    fp8_mha: bool = False


@dataclass(frozen=True)
class NVFP4BlockScaling(Recipe):
    """1x16 E2M1 blocks with E4M3 scales (arXiv:2509.25149). Importable; using it raises NotImplementedError for now."""

    disable_rht: bool = False
    disable_stochastic_rounding: bool = False
    disable_2d_quantization: bool = False
    fp4_format: Format = Format.E2M1
    fp8_format: Format = Format.E4M3
    fp8_dpa: bool = False
    fp8_mha: bool = False
