"""compute="fp16_accumulate": scale tokens to fp16, then the fused GEMM with fp16 accumulation."""

from __future__ import annotations

import torch
from torch import Tensor

from .._triton import triton
from ..formats import BlockFormat
from ..low_rank import Branch
from .activations import scale_to_fp16_kernel
from .choice import Choice, choose
from .fp16_gemm import fp16_gemm_kernel
from .launching import format_constants, pointers, table_of
from .tuning import SCALE_BLOCK


def linear(
    x: Tensor,
    data: Tensor,
    bias: Tensor | None,
    y: Tensor,
    fmt: BlockFormat,
    planes: bool,
    branch: Branch | None = None,
    choice: Choice | None = None,
) -> None:
    """Write x [M, K] @ decode(data).T + bias + branch to y [M, N]; x has unit stride along K, K is a multiple of 64."""
    m, n = y.shape
    hidden, up, rank = pointers(branch)
    constants = format_constants(fmt, data.shape[1], planes)
    scaled = torch.empty(m, constants["K"], dtype=torch.float16, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    scale_to_fp16_kernel[(m,)](x, scaled, scale, x.stride(0), K=constants["K"], BLOCK_K=SCALE_BLOCK)
    choice = choice or choose("fp16_accumulate", fmt, m, n, constants["K"], x.device, x.dtype, branch is not None)
    tile = choice.tile
    blocks = dict(BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, TILE_K=tile.tile_k, LDMATRIX=tile.ldmatrix)
    options = dict(num_warps=tile.num_warps, num_stages=tile.num_stages)
    grid = (triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)
    operands = (scaled, scale, data, table_of(fmt, data), bias, hidden, up, y)
    fp16_gemm_kernel[grid](*operands, m, n, rank, **constants, **blocks, **options)
