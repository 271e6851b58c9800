"""Unpack kernels to int8: packed rows -> int8 codes with one float32 scale per row and group of K, or per row."""

from __future__ import annotations

from .._triton import jit, tl
from .activations import group_scale, round_to_int8


@jit
def _largest(
    row_ptr,
    table_ptr,
    first_block,
    FIRST: tl.constexpr,
    DECODE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    PLANES: tl.constexpr,
    SLICES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Return the largest magnitude of some slices of each row, NaN where one holds NaN or Inf."""
    largest = tl.zeros((ROWS,), dtype=tl.float32)
    for i in tl.static_range(SLICES):
        w = DECODE(row_ptr, first_block, FIRST + i, table_ptr, NUM_BLOCKS, PLANES)
        # A GPU's maximum drops NaN unless it is told not to.
        widest = tl.max(tl.abs(w), axis=1) + tl.sum(w * 0.0, axis=1)
        largest = tl.maximum(largest, widest, propagate_nan=tl.PropagateNan.ALL)
    return largest


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
    """Write the largest magnitude of each row's part of TILE_K weights to largest [K // TILE_K, N] float32."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.program_id(1)
    row_ptr = w_ptr + tl.minimum(offs_n, N - 1).to(tl.int64) * ROW_BYTES
    TILE_BLOCKS: tl.constexpr = NUM_BLOCKS * TILE_K // K
    largest = _largest(row_ptr, table_ptr, step * TILE_BLOCKS, 0, DECODE, NUM_BLOCKS, PLANES, TILE_K // 32, BLOCK_N)
    tl.store(largest_ptr + step * N + offs_n, largest, mask=offs_n < N)


@jit
def unpack_int8_kernel(
    w_ptr,
    table_ptr,
    largest_ptr,
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
    """Decode a [BLOCK_N, TILE_K] tile of w to codes [N, K] int8 and scale [K // GROUP, N] float32, with largest [N] scale [N].

    Without `largest` slices are decoded twice (once for the largest magnitude of a group, once for its codes): the second read
    hits L1, and a tile wider than one slice cannot be put together from slices without shuffling every weight.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.program_id(1)
    rows = tl.minimum(offs_n, N - 1).to(tl.int64)
    row_ptr = w_ptr + rows * ROW_BYTES
    mask = offs_n < N
    TILE_BLOCKS: tl.constexpr = NUM_BLOCKS * TILE_K // K
    SLICES: tl.constexpr = GROUP // 32
    codes_ptrs = codes_ptr + rows[:, None] * K + (step * TILE_K + tl.arange(0, 32))[None, :]
    for group in tl.static_range(TILE_K // GROUP):
        if largest_ptr is None:
            largest = _largest(
                row_ptr, table_ptr, step * TILE_BLOCKS, group * SLICES, DECODE, NUM_BLOCKS, PLANES, SLICES, BLOCK_N
            )
        else:
            largest = tl.load(largest_ptr + rows)
        scale, inverse = group_scale(largest)
        for i in tl.static_range(SLICES):
            w = DECODE(row_ptr, step * TILE_BLOCKS, group * SLICES + i, table_ptr, NUM_BLOCKS, PLANES)
            codes = round_to_int8(w * inverse[:, None])
            tl.store(codes_ptrs + (group * GROUP + 32 * i), codes, mask=mask[:, None])
        if largest_ptr is None:
            tl.store(scale_ptr + (step * (TILE_K // GROUP) + group) * N + offs_n, scale, mask=mask)
        elif group == 0:
            tl.store(scale_ptr + offs_n, scale, mask=mask & (step == 0))
