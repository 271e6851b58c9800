"""Small-M kernel: y = x @ w.T for one or two rows, bound by reading the packed weight once.

The modulation layers of Flux hold 27 % of all weights and run at M = batch size, where a tensor-core tile would be padded
16-fold. Each program multiplies a few output features in float32 in the layout the bytes were loaded in (no trip through
shared memory) and reduces every slice at once: one fixed order of additions, so the same bits on every run.
"""

from __future__ import annotations

from .._triton import jit, tl
from .branch import add_branch_to_row


@jit(do_not_specialize=["R"])
def small_m_kernel(
    x_ptr,
    w_ptr,
    table_ptr,
    bias_ptr,
    hidden_ptr,
    up_ptr,
    y_ptr,
    N,
    R,
    stride_xm,
    K: tl.constexpr,
    DECODE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Compute BLOCK_N columns of one row of y (grid axis 1); x has unit stride along K, y is contiguous."""
    row = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(offs_n, N - 1).to(tl.int64)
    row_ptr = w_ptr + rows * ROW_BYTES
    x_ptrs = x_ptr + row * stride_xm + tl.arange(0, 32)
    TILE_BLOCKS: tl.constexpr = NUM_BLOCKS * TILE_K // K
    acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for step in range(K // TILE_K):
        for i in tl.static_range(TILE_K // 32):
            w = DECODE(row_ptr, step * TILE_BLOCKS, i, table_ptr, NUM_BLOCKS, PLANES)
            x = tl.load(x_ptrs + (step * TILE_K + 32 * i))
            acc += tl.sum(w.to(x.dtype).to(tl.float32) * x.to(tl.float32)[None, :], axis=1)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows).to(tl.float32)
    if hidden_ptr is not None:
        acc = add_branch_to_row(acc, hidden_ptr, up_ptr, row, rows, R)
    tl.store(y_ptr + row * N + offs_n, acc.to(y_ptr.dtype.element_ty), mask=offs_n < N)
