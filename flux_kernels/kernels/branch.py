"""The low-rank branch in a GEMM's epilogue: hidden [M, r] @ up [N, r].T.

It is added to the float32 accumulators before rounding.
"""

from __future__ import annotations

from .._triton import jit, tl

# Columns of hidden and up in one step: the shortest K of a tensor-core product. The last step is filled up with zeros.
STEP = tl.constexpr(16)


@jit
def add_branch(acc, left_ptr, right_ptr, rows_left, rows_right, R):
    """Return acc + left[rows_left] @ right[rows_right].T.

    The two are hidden [M, R] and up [N, R], both contiguous, in acc's order.
    """
    left_row = left_ptr + rows_left.to(tl.int64)[:, None] * R
    right_row = right_ptr + rows_right.to(tl.int64)[:, None] * R
    for start in tl.range(0, R, STEP, num_stages=1):
        offs_r = start + tl.arange(0, STEP)[None, :]
        left = tl.load(left_row + offs_r, mask=offs_r < R, other=0.0)
        right = tl.load(right_row + offs_r, mask=offs_r < R, other=0.0)
        acc = tl.dot(left, right.T, acc, input_precision="ieee")
    return acc


@jit
def add_branch_to_row(acc, hidden_ptr, up_ptr, row, rows_n, R):
    """Return acc [BLOCK_N] + up[rows_n] @ hidden[row], products in float32."""
    for r in range(R):
        up = tl.load(up_ptr + rows_n.to(tl.int64) * R + r).to(tl.float32)
        acc += up * tl.load(hidden_ptr + row * R + r).to(tl.float32)
    return acc
