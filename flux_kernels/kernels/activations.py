"""Prepare activations for the faster matrix units.

They become int8 with group scales, or fp16 with a power-of-two scale per token.

Torch twins of both stand in flux_kernels/torch_backend/low_precision.py. Compiled code has the twins' bits: a code is one fused multiply-add,
which rounds the exact product once, and the only division is IEEE's. Triton's interpreter rounds the product first, so there
a product nearer to a tie than 127 * 2^-24 may get the neighbouring code.
"""

from __future__ import annotations

from .._triton import jit, tl

# 1.5 * 2^23: adding it to |v| < 2^22 rounds v to the nearest integer, ties to even, which is then in the sum's low bits.
ROUND = tl.constexpr(12582912.0)
# A group whose largest magnitude is below this becomes zeros: 127 / amax would leave float32's range.
SMALLEST = tl.constexpr(1e-30)
STEPS = tl.constexpr(1 / 127)


@jit
def largest_of_rows(magnitudes):
    """Return the largest of each row of float32 magnitudes [R, C], NaN where any is NaN.

    A GPU's float maximum drops NaN.

    Without a sign float32 orders as its bits do, with Inf and NaN on top.
    """
    return tl.max(magnitudes.to(tl.int32, bitcast=True), axis=1).to(tl.float32, bitcast=True)


@jit
def scale_of(largest):
    """Return the scale of values of a largest magnitude: largest / 127, 0 for zeros, NaN for NaN and Inf."""
    return tl.where(largest > SMALLEST, largest * STEPS, 0.0) + largest * 0.0


@jit
def inverse_of(scale):
    """Return 1 / scale, correctly rounded; 0 for 0 and NaN."""
    some = scale > 0.0
    return tl.where(some, tl.div_rn(1.0, tl.where(some, scale, 1.0)), 0.0)


@jit
def round_to_int8(values, inverse):
    """Round float32 values * inverse to the nearest int8, ties to even, with one rounding.

    The products are at most 127 in magnitude.
    """
    return tl.fma(values, inverse, ROUND).to(tl.int32, bitcast=True).to(tl.int8)


@jit
def quantize_activation_kernel(
    x_ptr, keep_ptr, codes_ptr, scale_ptr, M, stride_xm, K: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Quantize a [BLOCK_M, GROUP] tile of x to codes [M, K] int8 and scale [K // GROUP, M] float32.

    Channels whose uint8 keep [K] is 0 become zeros: they are computed elsewhere. None keeps all. A NaN or Inf makes the
    scale NaN, and so the whole output row.
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(1)
    rows = tl.minimum(offs_m, M - 1).to(tl.int64)
    offs_k = group * GROUP + tl.arange(0, GROUP)
    x = tl.load(x_ptr + rows[:, None] * stride_xm + offs_k[None, :]).to(tl.float32)
    if keep_ptr is not None:
        x = tl.where(tl.load(keep_ptr + offs_k)[None, :] != 0, x, 0.0)
    scale = scale_of(largest_of_rows(tl.abs(x)))
    codes = round_to_int8(x, inverse_of(scale)[:, None])
    mask = offs_m < M
    tl.store(codes_ptr + rows[:, None] * K + offs_k[None, :], codes, mask=mask[:, None])
    tl.store(scale_ptr + group.to(tl.int64) * M + offs_m, scale, mask=mask)


@jit
def power_of_two_below(amax):
    """Return (s, 1 / s), s the power of two that brings amax into [1, 2).

    Both stay within float32's normal range.
    """
    exponent = (amax.to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True), (exponent << 23).to(tl.float32, bitcast=True)


@jit
def scale_to_fp16_kernel(x_ptr, y_ptr, scale_ptr, stride_xm, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Scale one token of x to |x| < 2 by a power of two.

    Writes y [M, K] float16, and the undoing scale [M] float32.
    """
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row * stride_xm + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    down, up = power_of_two_below(tl.max(largest, axis=0))
    for start in range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row * stride_xm + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * K + offs_k, (x * down).to(tl.float16), mask=offs_k < K)
    tl.store(scale_ptr + row, up)
