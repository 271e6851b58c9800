"""Unpack kernel: packed rows -> [N, K] in any float dtype, one kernel for every block format."""

from __future__ import annotations

from .._triton import jit, tl


@jit
def dequantize_kernel(
    w_ptr,
    table_ptr,
    y_ptr,
    N,
    K: tl.constexpr,
    DECODE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Decode a [BLOCK_N, TILE_K] tile of w to y [N, K], contiguous.

    The float32 values are rounded once, to y's dtype.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.program_id(1)
    rows = tl.minimum(offs_n, N - 1).to(tl.int64)
    row_ptr = w_ptr + rows * ROW_BYTES
    TILE_BLOCKS: tl.constexpr = NUM_BLOCKS * TILE_K // K
    y_ptrs = y_ptr + rows[:, None] * K + (step * TILE_K + tl.arange(0, 32))[None, :]
    mask = (offs_n < N)[:, None]
    for i in tl.static_range(TILE_K // 32):
        w = DECODE(row_ptr, step * TILE_BLOCKS, i, table_ptr, NUM_BLOCKS, PLANES)
        tl.store(y_ptrs + 32 * i, w.to(y_ptr.dtype.element_ty), mask=mask)
