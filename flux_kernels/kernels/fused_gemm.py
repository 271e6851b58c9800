"""Fused dequant-GEMM: packed bytes -> registers -> MMA, one kernel for every block format.

y[M, N] = x[M, K] @ decode(w)[N, K].T + bias + hidden[M, R] @ up[N, R].T, fp32 accumulation, the decoded weight rounded once to x's dtype.
The weight is the *left* MMA operand (y.T = W @ x.T): as the right operand it would be replicated across the warps along M
and decoded up to eight times. One loop iteration covers one TILE_K of the row as static 32-wide slices, so that shifts and
masks are immediates. Rows of x and w are clamped instead of masked: loads past the edge read a valid row whose result is
never stored.
"""

from __future__ import annotations

from .._triton import jit, tl
from .branch import add_branch
from .ldmatrix import hide_origin

# Programs that share a band of x rows in L2 before moving on.
GROUP_M = tl.constexpr(8)


@jit
def tile_position(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Map the program index to (pid_m, pid_n) in bands of GROUP_M row tiles.

    So that a wave shares x and w in L2.
    """
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    band = pid // (GROUP_M * tiles_n)
    rows = min(tiles_m - band * GROUP_M, GROUP_M)
    inside = pid % (GROUP_M * tiles_n)
    return band * GROUP_M + inside % rows, inside // rows


@jit
def decoded_product(
    x_ptrs,
    row_ptr,
    table_ptr,
    first,
    STEPS: tl.constexpr,
    K: tl.constexpr,
    DECODE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_K: tl.constexpr,
    LDMATRIX: tl.constexpr,
):
    """Return decode(w) @ x.T over STEPS tiles of K from tile `first` on: float32 [BLOCK_N, BLOCK_M]."""
    TILE_BLOCKS: tl.constexpr = NUM_BLOCKS * TILE_K // K
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in range(first, first + STEPS):
        for i in tl.static_range(TILE_K // 32):
            w = DECODE(row_ptr, step * TILE_BLOCKS, i, table_ptr, NUM_BLOCKS, PLANES)
            x = tl.load(x_ptrs + (step * TILE_K + 32 * i))
            acc = tl.dot(hide_origin(w, LDMATRIX).to(x.dtype), tl.trans(x), acc, input_precision="ieee")
    return acc


@jit(do_not_specialize=["R"])
def fused_gemm_kernel(
    x_ptr,
    w_ptr,
    table_ptr,
    bias_ptr,
    hidden_ptr,
    up_ptr,
    y_ptr,
    M,
    N,
    R,
    stride_xm,
    K: tl.constexpr,
    DECODE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_K: tl.constexpr,
    LDMATRIX: tl.constexpr,
):
    """Compute one [BLOCK_M, BLOCK_N] tile of y.

    x has unit stride along K, w is [N, ROW_BYTES], y is contiguous.
    """
    pid_m, pid_n = tile_position(M, N, BLOCK_M, BLOCK_N)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ptr = w_ptr + tl.minimum(offs_n, N - 1).to(tl.int64) * ROW_BYTES
    x_row = x_ptr + tl.minimum(offs_m, M - 1).to(tl.int64) * stride_xm
    x_ptrs = x_row[:, None] + tl.arange(0, 32)[None, :]
    STEPS: tl.constexpr = K // TILE_K
    acc = decoded_product(
        x_ptrs, row_ptr, table_ptr, 0, STEPS, K, DECODE, NUM_BLOCKS, PLANES, BLOCK_M, BLOCK_N, TILE_K, LDMATRIX
    )
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + tl.minimum(offs_n, N - 1)).to(tl.float32)[:, None]
    if hidden_ptr is not None:
        acc = add_branch(acc, up_ptr, hidden_ptr, tl.minimum(offs_n, N - 1), tl.minimum(offs_m, M - 1), R)
    y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(y_ptrs, tl.trans(acc).to(y_ptr.dtype.element_ty), mask=mask)
