"""Unpack kernel to int8: packed rows -> int8 codes with one float32 scale per row and group of K, for every format."""

from __future__ import annotations

from .._triton import jit, tl
from .activations import group_scale, round_to_int8


@jit
def unpack_int8_kernel(
    w_ptr,
    table_ptr,
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
    """Decode a [BLOCK_N, TILE_K] tile of w to codes [N, K] int8 and scale [K // GROUP, N] float32.

    Slices are decoded twice (once for the largest magnitude of a group, once for its codes): the second read hits L1, and
    a tile wider than one slice cannot be put together from slices without shuffling every weight.
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
        largest = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for i in tl.static_range(SLICES):
            w = DECODE(row_ptr, step * TILE_BLOCKS, group * SLICES + i, table_ptr, NUM_BLOCKS, PLANES)
            # NaN where a weight is NaN or Inf, which a GPU's maximum drops unless it is told not to.
            widest = tl.max(tl.abs(w), axis=1) + tl.sum(w * 0.0, axis=1)
            largest = tl.maximum(largest, widest, propagate_nan=tl.PropagateNan.ALL)
        scale, inverse = group_scale(largest)
        for i in tl.static_range(SLICES):
            w = DECODE(row_ptr, step * TILE_BLOCKS, group * SLICES + i, table_ptr, NUM_BLOCKS, PLANES)
            codes = round_to_int8(w * inverse[:, None])
            tl.store(codes_ptrs + (group * GROUP + 32 * i), codes, mask=mask[:, None])
        tl.store(scale_ptr + (step * (TILE_K // GROUP) + group) * N + offs_n, scale, mask=mask)
