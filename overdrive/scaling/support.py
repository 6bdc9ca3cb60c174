"""What this machine can run, and why not."""

from __future__ import annotations

import functools

import torch

from overdrive.ops.library import constant_result
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


def usable(recipe: Recipe) -> tuple[bool, str]:
    """(usable, reason) of a recipe on this machine."""
    if recipe.mxfp8():
        return is_mxfp8_available()
    if recipe.nvfp4():
        return is_nvfp4_available()
    if recipe.float8_block_scaling():
        return is_fp8_block_scaling_available()
    return is_fp8_available()
