"""How tests compare numbers: one metric, one table of tolerances, the bits of a tensor, and inputs in awkward layouts."""

from __future__ import annotations

import math

import torch

from overdrive.recipe import DelayedScaling, Float8BlockScaling, Float8CurrentScaling, Recipe

RECIPES: dict[str, Recipe | None] = {
    "plain": None,
    "delayed": DelayedScaling(),
    "current": Float8CurrentScaling(),
    "block": Float8BlockScaling(),
}
"""Names of the tolerance table (plain: no FP8) and a recipe of that name."""

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

_PLAIN = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# rounding to E4M3 alone leaves 2.6 % of a normal tensor, to E5M2 5.2 %; a product of two such tensors the root of both squares.
# Delayed scales are a step old and waste range; blocks fit each 128 values.
_FP8 = {"delayed": 0.085, "current": 0.08, "block": 0.055}
TOLERANCES: dict[tuple[torch.dtype, str], float] = {
    **{(dtype, "plain"): tolerance for dtype, tolerance in _PLAIN.items()},
    **{(dtype, name): fp8 + _PLAIN[dtype] for dtype in _PLAIN for name, fp8 in _FP8.items()},
    **{(E4M3, name): 0.035 for name in RECIPES},  # a value read back from FP8 data
    **{(E5M2, name): 0.07 for name in RECIPES},
}
"""(dtype, recipe name) -> largest relative_error of one linear's output or gradient; times sqrt(depth) after several."""


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The one metric: |actual - expected| / |expected|, Frobenius norms in float64; NaN if anything is NaN."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    difference, size = (actual - expected).norm().item(), expected.norm().item()
    return difference / size if size else difference


def assert_close(
    actual: torch.Tensor, expected64: torch.Tensor, dtype: torch.dtype, recipe: str = "plain", what: str = "tensor", depth: int = 1
) -> None:
    """Fail unless `actual` is as near to the float64 `expected64` as the table asks of a computation in `dtype` under `recipe`.

    depth: how many linears in a row the value went through.
    """
    assert expected64.dtype == torch.float64, f"{what}: the expected value must be float64, got {expected64.dtype}"
    assert actual.shape == expected64.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected64.shape)}"
    tolerance = TOLERANCES[dtype, recipe] * math.sqrt(depth)
    error = relative_error(actual, expected64)
    if error <= tolerance:  # NaN is never <=
        return
    values, expected = actual.detach().cpu().double(), expected64.detach().cpu()
    off = (values - expected).abs().nan_to_num(nan=math.inf)
    worst = tuple(int(i) for i in torch.unravel_index(off.argmax(), off.shape))
    raise AssertionError(
        f"{what}: relative error {error:.3g} > {tolerance:.3g} ({dtype}, {recipe}, depth {depth}); shape {tuple(off.shape)}, "
        f"{int((~values.isfinite()).sum())} not finite, worst at {list(worst)}: {values[worst]:.6g}, expected {expected[worst]:.6g}"
    )


def bits(t: torch.Tensor) -> torch.Tensor:
    """The bits of each element as integers on the CPU, one pattern for every NaN: equal bits are equal values of equal sign."""
    t = t.detach().cpu().contiguous()
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.view(integer).masked_fill(t.float().isnan(), 0xFF if integer is torch.uint8 else -1)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, what: str = "tensor") -> None:
    """Fail unless dtype, shape and every bit agree (NaNs of any payload count as equal)."""
    got, want = (actual.dtype, tuple(actual.shape)), (expected.dtype, tuple(expected.shape))
    assert got == want, f"{what}: {got[0]} {list(got[1])}, expected {want[0]} {list(want[1])}"
    wrong = bits(actual) != bits(expected)
    if wrong.any():
        where = wrong.nonzero()[0].tolist()
        a, e = (t.detach().cpu().float()[tuple(where)].item() for t in (actual, expected))
        raise AssertionError(f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, first at {where}: {a!r}, expected {e!r}")


LAYOUTS = ("contiguous", "transposed", "sliced", "stepped", "expanded", "offset")


def layout(x: torch.Tensor, kind: str) -> torch.Tensor:
    """x [R, C] with the strides of `kind`, its values kept, except "expanded": its first row repeated with stride 0."""
    if kind == "transposed":
        return x.t().contiguous().t()
    if kind == "expanded":
        return x[:1].clone().expand(x.shape) if x.shape[0] else x
    rows, cols = x.shape
    # what lies between the elements is NaN, so that reading it shows
    frame = {"sliced": (rows, cols + 5), "stepped": (2 * rows, 3 * cols), "offset": (rows + 1, cols)}
    views = {
        "sliced": (slice(None), slice(3, 3 + cols)),
        "stepped": (slice(None, None, 2), slice(None, None, 3)),
        "offset": (slice(1, None), slice(None)),
    }
    if kind == "contiguous":
        return x.contiguous()
    return x.new_full(frame[kind], math.nan)[views[kind]].copy_(x)


def draw(
    *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", kind: str = "contiguous", scale: float = 1.0
) -> torch.Tensor:
    """A normal [R, C] (or [C]) tensor in a layout, the same numbers on every device."""
    x = (torch.randn(*shape) * scale).to(dtype)
    return layout(x.to(device), kind) if len(shape) == 2 else x.to(device)


def observe(patch, where, name: str, see) -> None:
    """From now on `see` gets the arguments of each call that the module `where` makes of its op `name`."""
    op = getattr(where, name)

    def observed(*arguments):
        see(*arguments)
        return op(*arguments)

    observed.unfilled = observed
    patch.setattr(where, name, observed)
