"""ops.gemm against float64 products of the very operands it gets."""

from __future__ import annotations

import itertools
import types

import pytest
import torch

from overdrive.ops.gemm import _prefers_own_kernel, dequantize, gemm, gemms, host_decides
from overdrive.ops.quantize import Mode
from tests.numerics import E4M3, E5M2, LAYOUTS, assert_close, assert_same_bits, draw
from tests.ops.quantized import MODES, quantized

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PLAIN = (Mode.PLAIN, Mode.PLAIN, False)


def product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    out = a.cpu().double() @ b.cpu().double().t()
    return out if bias is None else out + bias.cpu().double()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 16, 32), (7, 33, 5), (129, 48, 200), (300, 96, 1024)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain(dtype, shape, with_bias, device):
    m, n, k = shape
    a, b = draw(m, k, dtype=dtype, device=device), draw(n, k, dtype=dtype, device=device)
    bias = draw(n, dtype=dtype, device=device) if with_bias else None
    out = gemm(a, b, None, None, bias, dtype, *PLAIN)
    assert out.dtype == dtype
    assert_close(out, product(a, b, bias), dtype)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_with_f32_output(dtype, with_bias, device):
    """As main_grad takes it: f32 sums of low-precision operands."""
    a, b = draw(40, 64, dtype=dtype, device=device), draw(24, 64, dtype=dtype, device=device)
    bias = draw(24, dtype=dtype, device=device) if with_bias else None
    out = gemm(a, b, None, None, bias, torch.float32, *PLAIN)
    assert out.dtype == torch.float32
    assert_close(out, product(a, b, bias), torch.float32)


@pytest.mark.parametrize(("kind_a", "kind_b"), [*itertools.product(LAYOUTS, repeat=2)])
def test_plain_with_any_strides(kind_a, kind_b, device):
    a, b = draw(33, 40, device=device, kind=kind_a), draw(24, 40, device=device, kind=kind_b)
    assert_close(gemm(a, b, None, None, None, torch.float32, *PLAIN), product(a, b), torch.float32)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("mode", "shape"), [*itertools.product([Mode.PLAIN, Mode.CURRENT], [(0, 16, 32), (16, 0, 32), (16, 32, 0)])]
)
def test_empty(mode, shape, with_bias, device):
    """No rows, no columns; an empty contraction gives the bias."""
    m, n, k = shape
    dtype = torch.bfloat16 if mode == Mode.PLAIN else E4M3
    one = None if mode == Mode.PLAIN else torch.ones(1, device=device)
    a, b = (torch.empty(size, k, device=device).to(dtype) for size in (m, n))
    bias = draw(n, dtype=torch.bfloat16, device=device) if with_bias else None
    out = gemm(a, b, one, one, bias, torch.bfloat16, mode, mode, False)
    assert_same_bits(out, torch.zeros(m, n, dtype=torch.bfloat16) if bias is None else bias.expand(m, n))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(16, 128), (48, 200), (304, 640)])
def test_dequantize(mode, shape, device):
    """Data times its scales is the value, up to FP8's rounding, in either layout."""
    x = draw(*shape, device=device)
    out = quantized(x, mode, E4M3, scale=100.0)
    values = dequantize(out.data, out.scale_inv, mode)
    assert_close(values, x.double().cpu(), E4M3)
    scale_inv_t = out.scale_inv_t if out.scale_inv_t.numel() else out.scale_inv
    assert_close(dequantize(out.data_t, scale_inv_t, mode), x.t().double().cpu(), E4M3)


PAIRS = [
    (Mode.DELAYED, Mode.DELAYED),
    (Mode.CURRENT, Mode.CURRENT),
    (Mode.BLOCK_1D, Mode.BLOCK_2D),
    (Mode.BLOCK_1D, Mode.BLOCK_1D),
    (Mode.BLOCK_2D, Mode.BLOCK_1D),
]


def operand(x: torch.Tensor, mode: Mode, dtype: torch.dtype = E4M3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(data, scale_inv, its float64 values)."""
    out = quantized(x, mode, dtype, scale=11.0, col=False)
    return out.data, out.scale_inv, dequantize(out.data.cpu(), out.scale_inv.cpu(), mode).double()


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16, 16, 128), (48, 96, 512), (304, 144, 640)])
@pytest.mark.parametrize(("mode_a", "mode_b"), PAIRS)
def test_fp8(mode_a, mode_b, shape, dtype, with_bias, fast, device):
    m, n, k = shape
    a, scale_a, a64 = operand(draw(m, k, device=device), mode_a)
    b, scale_b, b64 = operand(draw(n, k, device=device), mode_b)
    bias = draw(n, dtype=dtype, device=device) if with_bias else None
    out = gemm(a, b, scale_a, scale_b, bias, dtype, mode_a, mode_b, fast)
    assert out.dtype == dtype
    # tensor cores sum FP8 products with fewer bits than f32 has
    assert_close(out, product(a64, b64, bias), torch.float16 if device == "cuda" and dtype == torch.float32 else dtype)


@pytest.mark.parametrize("dtypes", [(E5M2, E4M3), (E4M3, E5M2)])
@pytest.mark.parametrize("k", [16, 48, 208])
def test_fp8_formats_mix_and_contractions_are_multiples_of_16(dtypes, k, device):
    a, scale_a, a64 = operand(draw(32, k, device=device), Mode.CURRENT, dtypes[0])
    b, scale_b, b64 = operand(draw(64, k, device=device), Mode.CURRENT, dtypes[1])
    out = gemm(a, b, scale_a, scale_b, None, torch.bfloat16, Mode.CURRENT, Mode.CURRENT, False)
    assert_close(out, product(a64, b64), torch.bfloat16)


@pytest.mark.parametrize(("mode_a", "mode_b"), PAIRS[2:])
@pytest.mark.parametrize("k", [16, 144, 1040])
def test_block_contractions_that_end_within_a_block(mode_a, mode_b, k, device):
    a, scale_a, a64 = operand(draw(32, k, device=device), mode_a)
    b, scale_b, b64 = operand(draw(64, k, device=device), mode_b)
    assert_close(gemm(a, b, scale_a, scale_b, None, torch.bfloat16, mode_a, mode_b, False), product(a64, b64), torch.bfloat16)


def scaled_blocks(rows: int, cols: int, device: str) -> torch.Tensor:
    """Each block has its own magnitude."""
    magnitude = 4.0 ** torch.randint(0, 6, (-(-rows // 128), -(-cols // 128)))
    magnitude = magnitude.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
    return draw(rows, cols, device=device) * magnitude.to(device)


def assert_rows_close(out: torch.Tensor, a64: torch.Tensor, b64: torch.Tensor) -> None:
    """Each row by itself, or the largest would hide the others."""
    sizes = a64.norm(dim=1)[:, None] * b64.norm(dim=1)
    torch.testing.assert_close(out.cpu().double() / sizes, a64 @ b64.t() / sizes, rtol=0, atol=4e-3)  # a wrong scale is 4 times off


@pytest.mark.parametrize(("mode_a", "mode_b"), PAIRS[2:])
def test_every_scale_counts(mode_a, mode_b, device):
    """A scale that the product reads from the wrong place shows."""
    x = scaled_blocks(304, 640, device)
    a, scale_a, a64 = operand(x, mode_a)
    b, scale_b, b64 = operand(x, mode_b)
    assert_rows_close(gemm(a, b, scale_a, scale_b, None, torch.float32, mode_a, mode_b, False), a64, b64)


@pytest.fixture
def own_kernel(monkeypatch):
    """On Hopper the kernel of block scales takes every shape that it can, not only those where it is faster."""

    def possible(a, b, mode_a, mode_b):
        return (mode_a, mode_b) == (Mode.BLOCK_1D, Mode.BLOCK_2D) and torch.cuda.get_device_capability(a.device) == (9, 0)

    monkeypatch.setattr("overdrive.ops.gemm._prefers_own_kernel", possible)
    monkeypatch.setattr("overdrive.ops.gemm.host_decides", lambda *_: False)


# less than a tile, parts of tiles both ways, more tiles than multiprocessors; contractions that end within a block
OWN_SHAPES = [(16, 16, 16), (16, 144, 128), (256, 128, 512), (304, 48, 1040), (528, 272, 640), (4368, 1168, 144)]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", OWN_SHAPES)
def test_own_kernel(shape, dtype, with_bias, device, own_kernel):
    m, n, k = shape
    a, scale_a, a64 = operand(draw(m, k, device=device), Mode.BLOCK_1D)
    b, scale_b, b64 = operand(draw(n, k, device=device), Mode.BLOCK_2D)
    bias = draw(n, dtype=dtype, device=device) if with_bias else None
    out = gemm(a, b, scale_a, scale_b, bias, dtype, Mode.BLOCK_1D, Mode.BLOCK_2D, False)
    assert out.dtype == dtype
    assert_close(out, product(a64, b64, bias), torch.float16 if device == "cuda" and dtype == torch.float32 else dtype)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("shape", OWN_SHAPES)
def test_own_kernel_reads_every_scale(shape, dtype, device, own_kernel):
    m, n, k = shape
    a, scale_a, a64 = operand(scaled_blocks(m, k, device), Mode.BLOCK_1D, dtype)
    b, scale_b, b64 = operand(scaled_blocks(n, k, device), Mode.BLOCK_2D)
    assert_rows_close(gemm(a, b, scale_a, scale_b, None, torch.float32, Mode.BLOCK_1D, Mode.BLOCK_2D, False), a64, b64)


@pytest.mark.parametrize(
    ("m", "n", "k", "sms", "expected"),
    [
        (8192, 12288, 4096, 132, True),
        (8192, 12288, 4096, 0, False),  # not Hopper
        (1024, 4096, 4096, 132, False),  # done before a launch is
        (3072, 6144, 4096, 132, False),  # 4.4 waves, where smaller tiles make 8.7
    ],
)
def test_own_kernel_is_preferred_where_it_wins(m, n, k, sms, expected, monkeypatch):
    monkeypatch.setattr("overdrive.ops.gemm._sms_of_hopper", lambda device: sms)
    a, b = torch.empty(m, k, device="meta"), torch.empty(n, k, device="meta")
    assert _prefers_own_kernel(a, b, Mode.BLOCK_1D, Mode.BLOCK_2D) == expected
    assert not _prefers_own_kernel(a, b, Mode.BLOCK_1D, Mode.BLOCK_1D)


# one tile and less than one, parts of tiles both ways, contractions that end within a block; the last in the widest tiles
SMALL_SHAPES = [(64, 16, 16), (64, 64, 128), (80, 48, 144), (304, 640, 272), (208, 1072, 400), (2048, 1024, 64)]
ALL_PAIRS = [(Mode.PLAIN, Mode.PLAIN), *PAIRS]


def any_operand(x: torch.Tensor, mode: Mode, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """`operand`; in PLAIN x itself, in `dtype`."""
    if mode != Mode.PLAIN:
        return operand(x, mode)
    return x.to(dtype), None, x.to(dtype).cpu().double()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SMALL_SHAPES)
@pytest.mark.parametrize(("mode_a", "mode_b"), ALL_PAIRS)
def test_small(mode_a, mode_b, shape, dtype, with_bias, device):
    """Products whose launch the host decides, which a kernel of their own takes on Hopper; fast accumulation with a bias."""
    m, n, k = shape
    a, scale_a, a64 = any_operand(draw(m, k, device=device), mode_a, dtype)
    b, scale_b, b64 = any_operand(draw(n, k, device=device), mode_b, dtype)
    bias = draw(n, dtype=dtype, device=device) if with_bias else None
    out = gemm(a, b, scale_a, scale_b, bias, dtype, mode_a, mode_b, with_bias)
    assert out.dtype == dtype
    sums_in_fp8 = mode_a != Mode.PLAIN and device == "cuda" and dtype == torch.float32
    assert_close(out, product(a64, b64, bias), torch.float16 if sums_in_fp8 else dtype)


@pytest.mark.parametrize(("kind_a", "kind_b"), [*itertools.product(LAYOUTS, repeat=2)])
@pytest.mark.parametrize("out", [torch.float16, torch.float32])
def test_small_with_any_strides(kind_a, kind_b, out, device):
    a, b = (draw(size, 72, dtype=torch.float16, device=device, kind=kind) for size, kind in ((104, kind_a), (88, kind_b)))
    assert_close(gemm(a, b, None, None, None, out, *PLAIN), product(a, b), out)


@pytest.mark.parametrize("kind", ["contiguous", "transposed"])
@pytest.mark.parametrize("m", [16, 80])
@pytest.mark.parametrize(("mode_a", "mode_b"), ALL_PAIRS)
def test_an_addend_gives_the_bits_of_a_sum_apart(mode_a, mode_b, m, kind, device):
    a, scale_a, _ = any_operand(draw(m, 144, device=device), mode_a, torch.bfloat16)
    b, scale_b, _ = any_operand(draw(48, 144, device=device), mode_b, torch.bfloat16)
    addend = draw(m, 48, dtype=torch.bfloat16, device=device, kind=kind)
    before, arguments = addend.clone(), (a, b, scale_a, scale_b, None, torch.bfloat16, mode_a, mode_b, False)
    assert_same_bits(gemm(*arguments, addend), gemm(*arguments) + addend)
    assert_same_bits(addend, before)


@pytest.mark.parametrize(("mode_a", "mode_b"), PAIRS[2:])
def test_small_reads_every_scale(mode_a, mode_b, device):
    a, scale_a, a64 = operand(scaled_blocks(304, 1040, device), mode_a)
    b, scale_b, b64 = operand(scaled_blocks(656, 1040, device), mode_b)
    assert_rows_close(gemm(a, b, scale_a, scale_b, None, torch.float32, mode_a, mode_b, False), a64, b64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("modes", "others"), [*zip(ALL_PAIRS, ALL_PAIRS), (PAIRS[2], PAIRS[3])])
def test_two_at_once_give_the_bits_of_each_alone(modes, others, dtype, device):
    """As an input's and a weight's gradient come, of different shapes and contractions."""
    tokens, outputs, inputs = 112, 336, 80
    dy, weight, x = draw(tokens, outputs, device=device), draw(inputs, outputs, device=device), draw(inputs, tokens, device=device)
    a, scale_a, a64 = any_operand(dy, modes[0], dtype)
    b, scale_b, b64 = any_operand(weight, modes[1], dtype)
    c, scale_c, c64 = any_operand(dy.t(), others[0], dtype)
    d, scale_d, d64 = any_operand(x, others[1], dtype)
    both = gemms(a, b, scale_a, scale_b, c, d, scale_c, scale_d, dtype, *modes, *others, False, True)
    alone = (
        gemm(a, b, scale_a, scale_b, None, dtype, *modes, False),
        gemm(c, d, scale_c, scale_d, None, dtype, *others, True),
    )
    for out, single, exact in zip(both, alone, (product(a64, b64), product(c64, d64))):
        assert_same_bits(out, single)
        assert_close(out, exact, dtype)


@pytest.mark.parametrize(
    ("m", "n", "k", "dtype", "sms", "expected"),
    [
        (256, 2048, 512, torch.bfloat16, 132, True),
        (1024, 1024, 1024, E4M3, 132, True),
        (1024, 1024, 1040, E4M3, 132, False),  # the GPU takes longer than the host
        (64, 64, 4096, E4M3, 132, False),  # a long contraction
        (48, 64, 64, E4M3, 132, False),  # few rows: decoding
        (256, 2048, 0, E4M3, 132, False),
        (256, 2048, 512, torch.float32, 132, False),
        (256, 2048, 512, torch.bfloat16, 0, False),  # not Hopper
    ],
)
def test_host_decides(m, n, k, dtype, sms, expected, monkeypatch):
    monkeypatch.setattr("overdrive.ops.gemm._sms_of_hopper", lambda device: sms)
    like = types.SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cuda", 0))
    assert host_decides(m, n, k, like) == expected
    like.is_cuda = False
    assert not host_decides(m, n, k, like)
