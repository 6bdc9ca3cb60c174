"""What this machine can run, and why not."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import _disable_current_modes

from overdrive.ops.activation import value_and_slope
from overdrive.ops.gemm_epilogue import gemm_activation, gemm_activation_backward, gemm_activation_quantized
from overdrive.ops.library import constant_result
from overdrive.ops.quantize import BLOCK, Mode, Quantization
from overdrive.recipe import Recipe

_NOT_BUILT = "not built in overdrive yet; use DelayedScaling, Float8CurrentScaling or Float8BlockScaling"


@functools.cache
def _capability() -> tuple[int, int] | None:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


@constant_result
def is_fp8_available() -> tuple[bool, str]:
    """(usable, reason): FP8 with one scale per tensor. A CPU runs the reference implementation."""
    capability = _capability()
    if capability is not None and capability < (8, 9):
        return False, f"FP8 GEMMs need compute capability 8.9 (Ada) or newer, this GPU has {capability[0]}.{capability[1]}"
    return True, ""


@constant_result
def is_fp8_block_scaling_available() -> tuple[bool, str]:
    """(usable, reason): FP8 with 1x128 and 128x128 blocks. A CPU runs the reference implementation."""
    capability = _capability()
    if capability is not None and capability != (9, 0):
        return False, f"cuBLAS has block-scaled FP8 GEMMs on Hopper (9.0) only, this GPU has {capability[0]}.{capability[1]}"
    return True, ""


def is_mxfp8_available() -> tuple[bool, str]:
    """(usable, reason): MXFP8."""
    return False, f"MXFP8BlockScaling is {_NOT_BUILT}"


def is_nvfp4_available() -> tuple[bool, str]:
    """(usable, reason): NVFP4."""
    return False, f"NVFP4BlockScaling is {_NOT_BUILT}"


def is_bf16_available() -> tuple[bool, str]:
    """(usable, reason): bfloat16."""
    capability = _capability()
    if capability is not None and capability < (8, 0):
        return False, f"bfloat16 needs compute capability 8.0 (Ampere) or newer, this GPU has {capability[0]}.{capability[1]}"
    return True, ""


def _failure(attempt: Callable[[], str]) -> str:
    """Why what quack-kernels compiles does not run on this machine, or what `attempt` to run it finds wrong, or ""."""
    capability = _capability()
    if capability is None:
        return "needs a CUDA GPU, torch sees none"
    if capability[0] != 9:
        return f"needs compute capability 9.x, this GPU has {capability[0]}.{capability[1]}"
    try:
        with torch.no_grad(), _disable_current_modes():
            return attempt()
    except ModuleNotFoundError as error:
        if error.name == "quack":
            return "quack-kernels is not installed: pip install 'overdrive[fa4]'"
        return f"does not load: {error}"
    except Exception as error:  # whatever a compiler package may raise where its libraries do not fit
        return f"does not run: {type(error).__name__}: {error}"


@functools.cache
def _epilogue_failure() -> str:
    """Why GEMMs with an activation in their epilogue do not run here, or "": compiles them, runs them and looks at the numbers."""
    return _failure(lambda: _epilogue_error("cuda"))


def _norm_cluster_error() -> str:
    """Nothing; what importing the kernel raises is the reason. It is compiled for a shape when that first comes."""
    importlib.import_module("overdrive.kernels.norm_cluster")
    return ""


def is_norm_cluster_available() -> tuple[bool, str]:
    """(usable, reason): norms with delayed scaling in one launch. One that cannot be compiled warns, and takes two."""
    reason = _failure(_norm_cluster_error)
    return not reason, reason


def _epilogue_error(device: str) -> str:
    """What is wrong with the numbers of the ops on a few tiles, the last of which are not whole, or ""."""
    tokens, inputs, outputs = 264, 128, 208
    # nothing drawn: the generator is the caller's
    x, weight = (
        torch.arange(rows * inputs, device=device, dtype=torch.float32).mul(3).sin().view(rows, inputs).bfloat16()
        for rows in (tokens, outputs)
    )
    x = x / 32
    bias = torch.linspace(-2, 2, outputs, device=device, dtype=torch.bfloat16)
    pre, out = gemm_activation(x, weight, bias, "gelu")
    again = pre.clone()
    dpre, dbias = gemm_activation_backward(again, x, weight.t().contiguous(), again, "gelu", True)
    product = x.float() @ weight.float().t()
    value, slope = value_and_slope("gelu", product + bias.float())

    dtype, one = torch.float8_e4m3fn, torch.ones(1, device=device)
    x8, weight8 = x[:BLOCK].to(dtype), weight.to(dtype)
    slots = torch.zeros(1, device=device, dtype=torch.int32)
    tail = Quantization(Mode.DELAYED, dtype, 8 * one, slots, 0, -1, False, True, True)
    pre8, data, data_t, scale_inv, _ = gemm_activation_quantized(x8, weight8, one, one, bias, torch.bfloat16, "gelu", *tail)
    sum8 = x8.float() @ weight8.float().t() + bias.float()
    value8, _ = value_and_slope("gelu", sum8)

    for name, found, expected in (
        ("product", pre, product + bias.float()),
        ("activation", out, value),
        ("activation in backward", again, value),
        ("gradient", dpre, product * slope),
        ("bias gradient", dbias, (product * slope).sum(0)),
        ("FP8 product", pre8, sum8),
        ("FP8 activation", data.float() * scale_inv, value8),
        ("transposed FP8 activation", data_t.t().float() * scale_inv, value8),
    ):
        error = ((found.float() - expected).norm() / expected.norm()).item()
        if not error < (0.05 if "activation" in name and "FP8" in name else 0.02):
            return f"gives wrong numbers: relative error {error:.2g} of the {name}"
    return ""


def is_gemm_epilogue_available() -> tuple[bool, str]:
    """(usable, reason): GEMMs of quack-kernels with an activation in their epilogue. The first call on a Hopper GPU compiles them,
    which takes seconds. Inside the capture of a CUDA graph that cannot be done: a graph captured without a warm-up goes without.
    """
    asked = _epilogue_failure.cache_info().currsize
    if not asked and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return False, "nothing can be compiled while a CUDA graph is captured"
    reason = _epilogue_failure()
    return not reason, reason


def usable(recipe: Recipe) -> tuple[bool, str]:
    """(usable, reason) of a recipe on this machine."""
    if recipe.mxfp8():
        return is_mxfp8_available()
    if recipe.nvfp4():
        return is_nvfp4_available()
    if recipe.float8_block_scaling():
        return is_fp8_block_scaling_available()
    return is_fp8_available()
