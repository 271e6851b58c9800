"""The low-rank branch in a GEMM's epilogue: hidden [M, r] @ up [N, r].T, added to the float32 accumulators before rounding."""

from __future__ import annotations

from .._triton import jit, tl

STEP = tl.constexpr(16)  # of r at a time, the shortest K of a tensor-core product; the rest of the last step is zeros


@jit
def add_branch(acc, hidden_ptr, up_ptr, rows_m, rows_n, R):
    """Return acc [BLOCK_M, BLOCK_N] + hidden[rows_m] @ up[rows_n].T; hidden [M, R] and up [N, R] are contiguous."""
    hidden_row = hidden_ptr + rows_m.to(tl.int64)[:, None] * R
    up_row = up_ptr + rows_n.to(tl.int64)[:, None] * R
    for start in tl.range(0, R, STEP, num_stages=1):
        offs_r = start + tl.arange(0, STEP)[None, :]
        hidden = tl.load(hidden_row + offs_r, mask=offs_r < R, other=0.0)
        up = tl.load(up_row + offs_r, mask=offs_r < R, other=0.0)
        acc = tl.dot(hidden, up.T, acc, input_precision="ieee")
    return acc
