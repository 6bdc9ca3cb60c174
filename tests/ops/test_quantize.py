"""ops.quantize against quantization by hand: same bytes, same scales."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from overdrive.ops.quantize import Mode, Quantization, Quantized, quantize
from overdrive.ops.scaling import arena, tenant_id
from overdrive.recipe import DelayedScaling
from overdrive.scaling.arena import SlotRange
from tests.numerics import E4M3, LAYOUTS, assert_close, assert_same_bits, bits, draw, layout
from tests.ops.quantized import FP8, GRIDS, MODES, PER_TENSOR, assert_by_hand, encode, quantized, tail

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, 6e-8, -1e-38, 65504.0, 3e38, 448.0, 464.0, 57344.0, 2.0**-9, 2.0**-17)


def check(x: torch.Tensor, q: Quantization, bias_grad: bool = False) -> None:
    *out, column_sum = quantize(x, bias_grad, *q)
    assert_by_hand(Quantized(*out), x, q)
    assert column_sum.numel() == (x.shape[1] if bias_grad else 0)
    assert column_sum.dtype == x.dtype or not bias_grad
    if bias_grad and x.isfinite().all():
        assert_close(column_sum, x.double().sum(0).cpu(), x.dtype, what="bias_grad")


@pytest.mark.parametrize("dtype", FP8)
def test_by_hand_knows_fp8(dtype):
    """The hand-made encoder agrees with the format's own decoding of every byte, so the tests below stand on firm ground."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(dtype).float()
    finite = values.isfinite()
    assert (torch.from_numpy(encode(values.numpy(), dtype))[finite] == codes[finite]).all()
    assert finite.sum() == 2 * len(GRIDS[dtype])


@pytest.mark.parametrize("power_of_2", [False, True])
@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode(mode, dtype, power_of_2, device):
    x = draw(129, 200, dtype=torch.bfloat16, device=device)
    check(x, tail(mode, dtype, device, scale=37.0, power_of_2=power_of_2), bias_grad=True)


@pytest.mark.parametrize(
    ("tokens", "features"), [*itertools.product((0, 1, 7, 16, 300), (16, 96, 128, 200)), (33, 4096), (1040, 16)]
)
@pytest.mark.parametrize("mode", MODES)
def test_shapes(mode, tokens, features, device):
    check(draw(tokens, features, device=device), tail(mode, E4M3, device, scale=100.0), bias_grad=True)


@given(
    mode=st.sampled_from(MODES),
    fp8=st.sampled_from(FP8),
    dtype=st.sampled_from(DTYPES),
    tokens=st.integers(0, 290),
    features=st.integers(1, 290),
    kind=st.sampled_from(LAYOUTS),
    sides=st.sampled_from([(True, False), (False, True), (True, True)]),
    power_of_2=st.booleans(),
    bias_grad=st.booleans(),
    specials=st.lists(st.sampled_from(SPECIAL), max_size=3),
    magnitude=st.sampled_from([1.0, 1e-6, 1e4]),
    seed=st.integers(0, 2**31),
)
def test_anything(mode, fp8, dtype, tokens, features, kind, sides, power_of_2, bias_grad, specials, magnitude, seed, device):
    torch.manual_seed(seed)
    x = draw(tokens, features, dtype=dtype, scale=magnitude)
    for value in specials if x.numel() else ():
        x.view(-1)[torch.randint(x.numel(), (1,))] = value
    row, col = sides
    q = tail(mode, fp8, device, scale=200.0 / magnitude, power_of_2=power_of_2, row=row, col=col)
    check(layout(x.to(device), kind), q, bias_grad)


@pytest.mark.parametrize("value", SPECIAL)
@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("mode", MODES)
def test_special_values_alone(mode, dtype, value, device):
    check(torch.full((17, 144), value, device=device), tail(mode, dtype, device, scale=3.0))


@pytest.mark.parametrize("dtype", FP8)
def test_rounding_of_every_byte_and_midpoint(dtype, device):
    """All FP8 values, the points halfway and their f32 neighbours, both signs."""
    grid = torch.from_numpy(GRIDS[dtype]).float()
    middles = (grid[1:] + grid[:-1]) / 2
    points = torch.cat([grid, middles, middles.nextafter(torch.tensor(0.0)), middles.nextafter(torch.tensor(1e9))])
    x = torch.stack((points, -points)).to(device)
    check(x, tail(Mode.DELAYED, dtype, device, scale=1.0))


@pytest.mark.parametrize("mode", PER_TENSOR)
def test_transposed_copy_is_the_transpose(mode, device):
    out = quantized(draw(300, 1040, device=device), mode, E4M3, scale=50.0)
    assert_same_bits(out.data_t, out.data.t())


@pytest.mark.parametrize("kind", ["contiguous", "transposed", "expanded"])
@pytest.mark.parametrize("mode", [Mode.PLAIN, *MODES])
def test_outputs_are_tensors_of_their_own(mode, kind, device):
    """Contiguous, and sharing memory neither with x nor with each other."""
    x = draw(32, 48, device=device, kind=kind)
    out = quantize(x, True, *tail(mode, torch.float32 if mode == Mode.PLAIN else E4M3, device))
    assert out[0].is_contiguous()
    pointers = [t.untyped_storage().data_ptr() for t in (x, *out) if t.numel()]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_is_a_cast(dtype, device):
    x = draw(33, 50, device=device, kind="stepped")
    data, *nothing, column_sum = quantize(x, True, Mode.PLAIN, dtype, None, None, 0, -1, False, True, False)
    assert_same_bits(data, x.to(dtype))
    assert all(t.numel() == 0 for t in nothing)
    assert_close(column_sum, x.double().sum(0).cpu(), torch.float32)


@pytest.mark.parametrize(
    ("values", "amax"),
    [
        ([[1.0, -3.0]], 3.0),
        ([[0.0, -0.0]], 0.0),
        ([[math.inf, 1.0]], math.inf),
        ([[-math.inf, math.nan]], math.nan),
        ([[1e-45, 0.0]], 1e-45),
    ],
)
def test_delayed_records_the_amax(values, amax, device):
    x, own = torch.tensor(values, device=device), SlotRange(1, torch.device(device))
    slots, state, tenant = own.indices(x.device), arena(x.device), tenant_id(DelayedScaling(), None)
    before, at = bits(state.amax), own.start + 3
    scales = torch.ones(state.capacity, device=device)
    arguments = (Mode.DELAYED, E4M3, scales, slots, 3)
    quantize(x, False, *arguments, -1, False, True, False)
    assert (bits(state.amax) == before).all(), "a tenant below 0 records nothing"
    quantize(x, False, *arguments, tenant, False, False, True)
    quantize(x / 2, False, *arguments, tenant, False, True, True)  # a smaller amax later in the step changes nothing
    before[at] = bits(torch.tensor([amax]))[0]
    assert (bits(state.amax) == before).all()
    assert state.owner[at] == tenant


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [Mode.DELAYED, Mode.BLOCK_1D])
def test_more_than_2_to_the_31_elements(mode, device):
    rows, cols = 2**17 + 16, 2**14
    x = torch.zeros(rows, cols, dtype=torch.bfloat16, device=device)
    x[-128:] = draw(128, cols, dtype=torch.bfloat16, device=device)
    out, part = (quantized(value, mode, E4M3, scale=50.0) for value in (x, x[-16:]))
    assert_same_bits(out.data[-16:], part.data)
    if mode == Mode.DELAYED:
        assert_same_bits(out.data_t[:, -16:], part.data_t)
