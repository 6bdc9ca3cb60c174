"""Recipes: every field, every bad value, and that they are plain values."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re

import pytest
import torch

from overdrive.recipe import (
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    Format,
    MMParams,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    Recipe,
)

ALL = (DelayedScaling, Float8CurrentScaling, Float8BlockScaling, MXFP8BlockScaling, NVFP4BlockScaling)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FAST, SPLIT = MMParams(use_split_accumulator=False), MMParams(use_split_accumulator=True)


def mean_of(history: torch.Tensor) -> torch.Tensor:
    return history.mean(0)


def half(amax, scale, fp8_max, recipe):
    return fp8_max / amax / 2


DEFAULTS = {
    DelayedScaling: {
        "margin": 0,
        "fp8_format": Format.HYBRID,
        "amax_history_len": 1024,
        "amax_compute_algo": "max",
        "scaling_factor_compute_algo": None,
        "reduce_amax": True,
    },
    Float8CurrentScaling: {
        "use_power_2_scales": False,
        "fp8_format": Format.HYBRID,
        "fp8_gemm_fprop": FAST,
        "fp8_gemm_dgrad": SPLIT,
        "fp8_gemm_wgrad": SPLIT,
    },
    Float8BlockScaling: {
        "use_f32_scales": False,
        "fp8_format": Format.E4M3,
        "x_block_scaling_dim": 1,
        "w_block_scaling_dim": 2,
        "grad_block_scaling_dim": 1,
        "fp8_gemm_fprop": SPLIT,
        "fp8_gemm_dgrad": SPLIT,
        "fp8_gemm_wgrad": SPLIT,
    },
    MXFP8BlockScaling: {"margin": 0, "fp8_format": Format.E4M3},
    NVFP4BlockScaling: {
        "disable_rht": False,
        "disable_stochastic_rounding": False,
        "disable_2d_quantization": False,
        "fp4_format": Format.E2M1,
    },
}

GOOD = [
    (DelayedScaling, {"margin": 3}),
    (DelayedScaling, {"margin": 0.5}),
    (DelayedScaling, {"fp8_format": Format.E4M3}),
    (DelayedScaling, {"amax_history_len": 1}),
    (DelayedScaling, {"amax_compute_algo": "most_recent"}),
    (DelayedScaling, {"amax_compute_algo": mean_of}),
    (DelayedScaling, {"scaling_factor_compute_algo": half}),
    (DelayedScaling, {"reduce_amax": False}),
    (Float8CurrentScaling, {"use_power_2_scales": True}),
    (Float8CurrentScaling, {"fp8_format": Format.E4M3}),
    (Float8CurrentScaling, {"fp8_gemm_fprop": SPLIT}),
    (Float8CurrentScaling, {"fp8_gemm_dgrad": FAST}),
    (Float8CurrentScaling, {"fp8_gemm_wgrad": FAST}),
    (Float8BlockScaling, {"use_f32_scales": True}),
    (Float8BlockScaling, {"x_block_scaling_dim": 2, "w_block_scaling_dim": 1}),
    (Float8BlockScaling, {"w_block_scaling_dim": 1}),
    (Float8BlockScaling, {"w_block_scaling_dim": 1, "grad_block_scaling_dim": 2}),
    (Float8BlockScaling, {"fp8_gemm_fprop": FAST}),
]

BAD = [
    (DelayedScaling, {"margin": -1}, "margin"),
    (DelayedScaling, {"margin": math.nan}, "margin"),
    (DelayedScaling, {"margin": math.inf}, "margin"),
    (DelayedScaling, {"margin": "1"}, "margin"),
    (DelayedScaling, {"margin": True}, "margin"),
    (DelayedScaling, {"fp8_format": Format.E5M2}, "E5M2 has too few mantissa bits"),
    (DelayedScaling, {"fp8_format": Format.E2M1}, "fp8_format"),
    (DelayedScaling, {"fp8_format": "HYBRID"}, "fp8_format"),
    (DelayedScaling, {"fp8_format": None}, "fp8_format"),
    (DelayedScaling, {"amax_history_len": 0}, "amax_history_len"),
    (DelayedScaling, {"amax_history_len": -4}, "amax_history_len"),
    (DelayedScaling, {"amax_history_len": 16.0}, "amax_history_len"),
    (DelayedScaling, {"amax_history_len": True}, "amax_history_len"),
    (DelayedScaling, {"amax_compute_algo": "min"}, "amax_compute_algo"),
    (DelayedScaling, {"amax_compute_algo": None}, "amax_compute_algo"),
    (DelayedScaling, {"scaling_factor_compute_algo": "half"}, "scaling_factor_compute_algo"),
    (Float8CurrentScaling, {"fp8_format": Format.E5M2}, "E5M2 has too few mantissa bits"),
    (Float8CurrentScaling, {"fp8_gemm_fprop": True}, "fp8_gemm_fprop"),
    (Float8CurrentScaling, {"fp8_gemm_wgrad": None}, "fp8_gemm_wgrad"),
    (Float8BlockScaling, {"fp8_format": Format.E5M2}, "E5M2 has too few mantissa bits"),
    (Float8BlockScaling, {"fp8_format": Format.HYBRID}, "fp8_format"),
    (Float8BlockScaling, {"fp8_gemm_dgrad": 1}, "fp8_gemm_dgrad"),
    (Float8BlockScaling, {"x_block_scaling_dim": 0}, "x_block_scaling_dim"),
    (Float8BlockScaling, {"w_block_scaling_dim": 3}, "w_block_scaling_dim"),
    (Float8BlockScaling, {"grad_block_scaling_dim": "1"}, "grad_block_scaling_dim"),
    (Float8BlockScaling, {"x_block_scaling_dim": 2}, "at most one"),
    (Float8BlockScaling, {"w_block_scaling_dim": 1, "x_block_scaling_dim": 2, "grad_block_scaling_dim": 2}, "at most one"),
]


@pytest.mark.parametrize("cls", ALL)
def test_defaults(cls):
    recipe = cls()
    for name, value in {**DEFAULTS[cls], "fp8_dpa": False, "fp8_mha": False}.items():
        assert getattr(recipe, name) == value, name
    # positional order is part of the interface
    assert list(inspect.signature(cls).parameters)[: len(DEFAULTS[cls])] == list(DEFAULTS[cls])


@pytest.mark.parametrize(("cls", "fields"), GOOD)
def test_every_field_is_taken(cls, fields):
    recipe = cls(**fields)
    for name in (field.name for field in dataclasses.fields(cls)):
        assert getattr(recipe, name) == fields.get(name, getattr(cls(), name)), name
    assert recipe == cls(**fields)
    assert recipe != cls()
    assert hash(recipe) == hash(cls(**fields))
    assert next(iter(fields)) in repr(recipe)


@pytest.mark.parametrize(("cls", "fields", "message"), BAD)
def test_bad_values_are_refused_by_name(cls, fields, message):
    with pytest.raises((ValueError, TypeError), match=f"{cls.__name__}.*{re.escape(message)}"):
        cls(**fields)


@pytest.mark.parametrize("cls", ALL)
def test_frozen(cls):
    with pytest.raises(dataclasses.FrozenInstanceError):
        cls().fp8_dpa = True


@pytest.mark.parametrize("cls", ALL)
def test_unknown_arguments_are_refused(cls):
    with pytest.raises(TypeError, match="nonsense"):
        cls(nonsense=1)


@pytest.mark.parametrize("fields", [{"interval": 1}, {"override_linear_precision": (False, False, False)}])
def test_retired_arguments_warn_and_do_nothing(fields):
    """Accelerate still passes them."""
    with pytest.warns(DeprecationWarning, match=f"{next(iter(fields))} is retired") as caught:
        recipe = DelayedScaling(**fields)
    assert caught[0].filename == __file__
    assert recipe == DelayedScaling()


def test_high_precision_gradients_are_refused():
    with pytest.warns(DeprecationWarning, match="retired"), pytest.raises(NotImplementedError, match="override_linear_precision"):
        DelayedScaling(override_linear_precision=(False, False, True))


PREDICATES = {
    "delayed": {DelayedScaling},
    "float8_current_scaling": {Float8CurrentScaling},
    "float8_per_tensor_scaling": {DelayedScaling, Float8CurrentScaling},
    "float8_block_scaling": {Float8BlockScaling},
    "mxfp8": {MXFP8BlockScaling},
    "nvfp4": {NVFP4BlockScaling},
}


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("predicate", PREDICATES)
def test_predicates(cls, predicate):
    assert issubclass(cls, Recipe)
    assert getattr(cls(), predicate)() is (cls in PREDICATES[predicate])


@pytest.mark.parametrize(
    ("name", "fwd", "bwd", "max_fwd", "max_bwd"),
    [
        ("E4M3", E4M3, E4M3, 448, 448),
        ("E5M2", E5M2, E5M2, 57344, 57344),
        ("HYBRID", E4M3, E5M2, 448, 57344),
        ("E2M1", None, None, 6, 6),
    ],
)
def test_formats(name, fwd, bwd, max_fwd, max_bwd):
    fmt = Format[name]
    assert (fmt.fwd, fmt.bwd) == (fwd, bwd) == (fmt.value.fwd, fmt.value.bwd)
    assert (fmt.value.max_fwd, fmt.value.max_bwd) == (max_fwd, max_bwd)
    for dtype, largest in ((fwd, max_fwd), (bwd, max_bwd)):
        assert dtype is None or torch.finfo(dtype).max == largest


def test_formats_are_four():
    assert [fmt.name for fmt in Format] == ["E2M1", "E4M3", "E5M2", "HYBRID"]


def test_mm_params():
    assert MMParams() == SPLIT
    assert {MMParams(), SPLIT, FAST} == {SPLIT, FAST}
    with pytest.raises(AttributeError):
        FAST.use_split_accumulator = True


def test_delayed_scaling_accumulates_as_the_others():
    assert (DelayedScaling.fp8_gemm_fprop, DelayedScaling.fp8_gemm_dgrad, DelayedScaling.fp8_gemm_wgrad) == (FAST, SPLIT, SPLIT)
