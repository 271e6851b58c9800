"""Split-K: the fused GEMM with the K range of one output tile shared by several programs.

For calls with fewer tiles than the card has room for, such as the 512 text rows times 3072 outputs of Flux: 96 tiles of
128 x 128 on an RTX 3090's 82 multiprocessors take two waves, the second nearly empty. Every program writes its float32
partial sums; a second kernel adds them in a fixed order (the same bits on every run) and applies the bias.
"""

from __future__ import annotations

from .._triton import jit, tl
from .branch import add_branch
from .fused_gemm import decoded_product, tile_position


@jit(do_not_specialize=["R"])
def split_k_kernel(
    x_ptr,
    w_ptr,
    table_ptr,
    hidden_ptr,
    up_ptr,
    partial_ptr,
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
    SPLITS: tl.constexpr,
):
    """Write the partial sums of one tile over one of SPLITS equal K ranges (grid axis 1).

    They go to float32 [SPLITS, M, N].
    """
    pid_m, pid_n = tile_position(M, N, BLOCK_M, BLOCK_N)
    split = tl.program_id(1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ptr = w_ptr + tl.minimum(offs_n, N - 1).to(tl.int64) * ROW_BYTES
    x_row = x_ptr + tl.minimum(offs_m, M - 1).to(tl.int64) * stride_xm
    x_ptrs = x_row[:, None] + tl.arange(0, 32)[None, :]
    STEPS: tl.constexpr = K // TILE_K // SPLITS
    acc = decoded_product(
        x_ptrs, row_ptr, table_ptr, split * STEPS, STEPS, K, DECODE, NUM_BLOCKS, PLANES, BLOCK_M, BLOCK_N, TILE_K, LDMATRIX
    )
    if hidden_ptr is not None:  # noqa: SIM102  (known when compiling, split when running)
        if split == 0:
            acc = add_branch(acc, up_ptr, hidden_ptr, tl.minimum(offs_n, N - 1), tl.minimum(offs_m, M - 1), R)
    rows = split.to(tl.int64) * M + offs_m
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(partial_ptr + rows[:, None] * N + offs_n[None, :], tl.trans(acc), mask=mask)


@jit
def add_splits_kernel(partial_ptr, bias_ptr, y_ptr, M, N, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Add SPLITS partial sums [M, N] and the bias in order, and round once.

    Writes BLOCK columns (grid axis 1) of one row of y.

    Rows are on axis 0: the others end at 65,535 programs.
    """
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offs_n < N
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        acc += tl.load(partial_ptr + (split * M + row) * N + offs_n, mask=inside, other=0.0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * N + offs_n, acc.to(y_ptr.dtype.element_ty), mask=inside)
