"""Multiply int8 without any scale: the bound of what scales can leave, no part of the library."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flux_kernels.kernels.tiles import Tile


@triton.jit
def plain_int8_kernel(
    x_ptr, w_ptr, y_ptr, M, N, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE_K: tl.constexpr
):
    """Write x [M, K] @ w [N, K].T, int8 summed in int32, to y [M, N]; every size is whole tiles."""
    tiles_m = M // BLOCK_M
    pid = tl.program_id(0)
    offs_m = (pid % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (pid // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, TILE_K)
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * K + offs_k[None, :]
    w_ptrs = w_ptr + offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for _ in range(0, K, TILE_K):
        total = tl.dot(tl.load(x_ptrs), tl.load(w_ptrs).T, total, out_dtype=tl.int32)
        x_ptrs += TILE_K
        w_ptrs += TILE_K
    y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, total.to(tl.float32).to(y_ptr.dtype.element_ty))


def plain_int8(x: Tensor, w: Tensor, tile: Tile) -> Tensor:
    """Multiply int8 x [M, K] by w [N, K].T to bfloat16 [M, N]; M and N are whole tiles."""
    (m, k), n = x.shape, w.shape[0]
    y = torch.empty(m, n, dtype=torch.bfloat16, device=x.device)
    grid = (m // tile.block_m * (n // tile.block_n),)
    blocks = dict(BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, TILE_K=tile.tile_k)
    plain_int8_kernel[grid](x, w, y, m, n, K=k, **blocks, num_warps=tile.num_warps, num_stages=tile.num_stages)
    return y
