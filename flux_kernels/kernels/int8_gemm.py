"""int8 GEMM with group scales: one kernel for all formats, after both operands were quantized.

y[M, N] = sum over groups g of (x_codes[:, g] @ w_codes[:, g].T) * x_scale[g, :] * w_scale[g, :] + bias + hidden @ up.T, the
products of the groups in int32, scaled and summed in float32; the low-rank branch in the dtype of y. A weight with one scale per
row is scaled once at the end, which takes a quarter to a half of the loop's instructions away. W is loaded as
[BLOCK_N, GROUP] and transposed: loaded as [GROUP, BLOCK_N] it spills under Triton 3.8 and 3.9.
"""

from __future__ import annotations

from .._triton import jit, tl
from .branch import add_branch
from .fused_gemm import tile_position


@jit(do_not_specialize=["R"])
def int8_gemm_kernel(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    hidden_ptr,
    up_ptr,
    y_ptr,
    M,
    N,
    R,
    stride_ym,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute one [BLOCK_M, BLOCK_N] tile of y.

    x [M, K] and w [N, K] are int8, their scales [K // GROUP, M or N] float32.

    With ROW_SCALES w_scale is [N], one scale for a whole row of w.
    """
    pid_m, pid_n = tile_position(M, N, BLOCK_M, BLOCK_N)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_m = tl.minimum(offs_m, M - 1)
    rows_n = tl.minimum(offs_n, N - 1)
    offs_k = tl.arange(0, GROUP)
    x_ptrs = x_ptr + rows_m.to(tl.int64)[:, None] * K + offs_k[None, :]
    w_ptrs = w_ptr + rows_n.to(tl.int64)[:, None] * K + offs_k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for group in range(K // GROUP):
        x = tl.load(x_ptrs + group * GROUP)
        w = tl.load(w_ptrs + group * GROUP)
        x_scale = tl.load(x_scale_ptr + group * M + rows_m)
        if not ROW_SCALES:
            w_scale = tl.load(w_scale_ptr + group * N + rows_n)
        products = tl.dot(x, w.T, out_dtype=tl.int32)
        if ROW_SCALES:
            acc += products.to(tl.float32) * x_scale[:, None]
        else:
            acc += products.to(tl.float32) * x_scale[:, None] * w_scale[None, :]
    if ROW_SCALES:
        acc *= tl.load(w_scale_ptr + rows_n)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows_n).to(tl.float32)[None, :]
    if hidden_ptr is not None:
        acc = add_branch(acc, hidden_ptr, up_ptr, rows_m, rows_n, R)
    y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * stride_ym + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])
