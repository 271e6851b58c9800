"""Unpack packed rows to int8 codes.

There is one float32 scale per row and group of K, or per row.
"""

from __future__ import annotations

from .._triton import jit, tl
from .activations import inverse_of, largest_of_rows, round_to_int8, scale_of


@jit
def _decode_slices(
    row_ptr,
    table_ptr,
    first_block,
    FIRST: tl.constexpr,
    DECODE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    PLANES: tl.constexpr,
    SLICES: tl.constexpr,
):
    """Return some slices of each row as a tuple of float32 [ROWS, 32].

    Each is decoded once and stays in registers.
    """
    slices = ()
    for i in tl.static_range(SLICES):
        slices = slices + (DECODE(row_ptr, first_block, FIRST + i, table_ptr, NUM_BLOCKS, PLANES),)  # type: ignore[assignment]
    return slices


@jit
def _largest(slices, SLICES: tl.constexpr):
    """Return the largest magnitude of each row of some slices, NaN where any holds NaN.

    One reduction for all.
    """
    largest = tl.abs(slices[0])
    for i in tl.static_range(1, SLICES):
        largest = tl.maximum(largest, tl.abs(slices[i]), propagate_nan=tl.PropagateNan.ALL)
    return largest_of_rows(largest)


@jit
def row_largest_kernel(
    w_ptr,
    table_ptr,
    largest_ptr,
    N,
    K: tl.constexpr,
    DECODE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Write the largest magnitude of TILE_K weights of each row.

    They go to largest [K // TILE_K, N] float32.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.program_id(1)
    row_ptr = w_ptr + tl.minimum(offs_n, N - 1).to(tl.int64) * ROW_BYTES
    TILE_BLOCKS: tl.constexpr = NUM_BLOCKS * TILE_K // K
    SLICES: tl.constexpr = TILE_K // 32
    slices = _decode_slices(row_ptr, table_ptr, step * TILE_BLOCKS, 0, DECODE, NUM_BLOCKS, PLANES, SLICES)
    tl.store(largest_ptr + step * N + offs_n, _largest(slices, SLICES), mask=offs_n < N)


@jit
def row_scale_kernel(largest_ptr, scale_ptr, N, PARTS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Write the scales [N] float32 of rows whose parts have the largest magnitudes largest [PARTS, N]."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs_n < N
    largest = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for part in range(PARTS):
        found = tl.load(largest_ptr + part * N + offs_n, mask=mask, other=0.0)
        largest = tl.maximum(largest, found, propagate_nan=tl.PropagateNan.ALL)
    tl.store(scale_ptr + offs_n, scale_of(largest), mask=mask)


@jit
def unpack_int8_kernel(
    w_ptr,
    table_ptr,
    row_scale_ptr,
    codes_ptr,
    scale_ptr,
    N,
    K: tl.constexpr,
    DECODE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    PLANES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Decode a [BLOCK_N, TILE_K] tile of w to codes [N, K] int8, by the scales row_scale [N], or None.

    Without row_scale each group of each row gets a scale of its own, written to scale [K // GROUP, N] float32.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.program_id(1)
    rows = tl.minimum(offs_n, N - 1).to(tl.int64)
    row_ptr = w_ptr + rows * ROW_BYTES
    mask = offs_n < N
    TILE_BLOCKS: tl.constexpr = NUM_BLOCKS * TILE_K // K
    SLICES: tl.constexpr = GROUP // 32
    codes_ptrs = codes_ptr + rows[:, None] * K + (step * TILE_K + tl.arange(0, 32))[None, :]
    if row_scale_ptr is not None:
        inverse = inverse_of(tl.load(row_scale_ptr + rows))
    for group in tl.static_range(TILE_K // GROUP):
        slices = _decode_slices(row_ptr, table_ptr, step * TILE_BLOCKS, group * SLICES, DECODE, NUM_BLOCKS, PLANES, SLICES)
        if row_scale_ptr is None:
            scale = scale_of(_largest(slices, SLICES))
            inverse = inverse_of(scale)
            tl.store(scale_ptr + (step * (TILE_K // GROUP) + group) * N + offs_n, scale, mask=mask)
        for i in tl.static_range(SLICES):
            codes = round_to_int8(slices[i], inverse[:, None])
            tl.store(codes_ptrs + (group * GROUP + 32 * i), codes, mask=mask[:, None])
