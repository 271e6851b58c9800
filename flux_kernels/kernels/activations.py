"""Prepare activations for the faster matrix units: int8 with group scales, or fp16 with a power-of-two scale per token.

Torch twins of both stand in flux_kernels/low_precision.py; the interpreter tests hold them to the same bits.
"""

from __future__ import annotations

from .._triton import jit, tl

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds |v| < 2^22 to nearest even


# A group whose largest magnitude is below this becomes zeros: 127 / amax would leave float32's range.
SMALLEST = tl.constexpr(1e-30)


@jit
def group_scale(amax):
    """Return (scale, 1 / scale) of groups with largest magnitude amax; (0, 0) for a group of zeros."""
    some = amax > SMALLEST
    return tl.where(some, amax / 127.0, amax * 0.0), tl.where(some, 127.0 / tl.where(some, amax, 1.0), 0.0)


@jit
def round_to_int8(values):
    """Round float32 |v| <= 127 to the nearest int8, ties to even."""
    return ((values + ROUND) - ROUND).to(tl.int8)


@jit
def quantize_activation_kernel(
    x_ptr, keep_ptr, codes_ptr, scale_ptr, M, stride_xm, K: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Quantize a [BLOCK_M, GROUP] tile of x to codes [M, K] int8 and scale [K // GROUP, M] float32.

    Channels whose uint8 keep [K] is 0 become zeros: they are computed elsewhere. None keeps all.
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(1)
    rows = tl.minimum(offs_m, M - 1).to(tl.int64)
    offs_k = group * GROUP + tl.arange(0, GROUP)
    x = tl.load(x_ptr + rows[:, None] * stride_xm + offs_k[None, :]).to(tl.float32)
    if keep_ptr is not None:
        x = tl.where(tl.load(keep_ptr + offs_k)[None, :] != 0, x, 0.0)
    # A NaN or Inf makes the scale NaN, and so the whole output row: tl.max alone would drop a NaN.
    amax = tl.max(tl.abs(x), axis=1) + tl.sum(x * 0.0, axis=1)
    scale, inverse = group_scale(amax)
    codes = round_to_int8(x * inverse[:, None])
    mask = offs_m < M
    tl.store(codes_ptr + rows[:, None] * K + offs_k[None, :], codes, mask=mask[:, None])
    tl.store(scale_ptr + group.to(tl.int64) * M + offs_m, scale, mask=mask)


@jit
def power_of_two_below(amax):
    """Return (s, 1 / s) with s the power of two that brings amax into [1, 2), within float32's normal range."""
    exponent = (amax.to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True), (exponent << 23).to(tl.float32, bitcast=True)


@jit
def scale_to_fp16_kernel(x_ptr, y_ptr, scale_ptr, stride_xm, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Scale one token of x to |x| < 2 by a power of two: y [M, K] float16, and the undoing scale [M] float32."""
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
