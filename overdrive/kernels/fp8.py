"""FP8 arithmetic that kernels share: amaxes, scales and casts, bit for bit those of ops.quantize."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

FP32_MAX: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).max)
INF_BITS: tl.constexpr = tl.constexpr(0x7F800000)

# Four f32 -> four FP8 in one register, to nearest even, saturating, NaN kept.
_CAST: tl.constexpr = tl.constexpr("""{ .reg .b16 lo, hi;
    cvt.rn.satfinite.FORMAT.f32 lo, $2, $1;
    cvt.rn.satfinite.FORMAT.f32 hi, $4, $3;
    mov.b32 $0, {lo, hi}; }""")
_CAST_E4M3: tl.constexpr = tl.constexpr(_CAST.value.replace("FORMAT", "e4m3x2"))
_CAST_E5M2: tl.constexpr = tl.constexpr(_CAST.value.replace("FORMAT", "e5m2x2"))


@triton.jit
def amax_bits(x):
    """Bit patterns of |x|: as integers they order like the numbers, NaN on top."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_from_amax(bits, DTYPE: tl.constexpr, POWER_OF_2: tl.constexpr):
    """ops.quantize.scale_from_amax of an amax given as bits, and its reciprocal."""
    usable = (bits > 0) & (bits < INF_BITS)
    if POWER_OF_2:
        # 448 = 1.75 * 2**8 and 57344 = 1.75 * 2**15: the quotient's exponent falls out of a difference of bits, 2**127 at most
        quotient: tl.constexpr = (((269 if DTYPE == tl.float8e5 else 262) - 512) << 23) + 0x600000  # less 2**32, to be an i32
        smallest: tl.constexpr = quotient + (1 << 32) - 0x7F7FFFFF
        scale = tl.where(usable, (quotient - tl.maximum(bits, smallest)) & -0x800000, 127 << 23)
        inverse = tl.maximum((254 << 23) - scale, 0x400000)
        return scale.to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)
    else:
        scale = tl.div_rn(57344.0 if DTYPE == tl.float8e5 else 448.0, bits.to(tl.float32, bitcast=True))
        scale = tl.where(usable, tl.where(scale > FP32_MAX, FP32_MAX, scale), 1.0)
        return scale, tl.div_rn(1.0, scale)


@triton.jit
def to_fp8(x, DTYPE: tl.constexpr):
    """ops.quantize.saturating_cast."""
    asm: tl.constexpr = _CAST_E5M2 if DTYPE == tl.float8e5 else _CAST_E4M3
    data = tl.inline_asm_elementwise(asm, "=r,r,r,r,r", [x], dtype=tl.uint8, is_pure=True, pack=4)
    return data.to(DTYPE, bitcast=True)


@triton.jit
def to_words(a, b, c, d, DTYPE: tl.constexpr):
    """saturating_cast of four tiles to one of 32-bit words, a's bytes first."""
    asm: tl.constexpr = _CAST_E5M2 if DTYPE == tl.float8e5 else _CAST_E4M3
    return tl.inline_asm_elementwise(asm, "=r,r,r,r,r", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1)
