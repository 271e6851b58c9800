"""compute="exact": the fused GEMM, the small-M kernel for one or two rows, or the chunked two-stage."""

from __future__ import annotations

from torch import Tensor

from .._triton import triton
from ..formats import BlockFormat
from . import two_stage
from .fused_gemm import fused_gemm_kernel
from .launching import capability_of, format_constants, table_of
from .small_m import small_m_kernel
from .tuning import choose_algorithm, fused_tile, small_m_tile


def linear(x: Tensor, data: Tensor, bias: Tensor | None, y: Tensor, fmt: BlockFormat, planes: bool) -> None:
    """Write x [M, K] @ decode(data).T + bias to y [M, N]; x has unit stride along K."""
    ALGORITHMS[choose_algorithm(x.shape[0], capability_of(x.device))](x, data, bias, y, fmt, planes)


def _small_m(x: Tensor, data: Tensor, bias: Tensor | None, y: Tensor, fmt: BlockFormat, planes: bool) -> None:
    m, n = y.shape
    constants = format_constants(fmt, data.shape[1], planes)
    tile = small_m_tile(fmt, constants["K"])
    blocks = dict(BLOCK_N=tile.block_n, TILE_K=tile.tile_k, num_warps=tile.num_warps)
    grid = (triton.cdiv(n, tile.block_n), m)
    small_m_kernel[grid](x, data, table_of(fmt, data), bias, y, n, x.stride(0), **constants, **blocks)


def _fused(x: Tensor, data: Tensor, bias: Tensor | None, y: Tensor, fmt: BlockFormat, planes: bool) -> None:
    m, n = y.shape
    constants = format_constants(fmt, data.shape[1], planes)
    tile = fused_tile(fmt, m, n, constants["K"])
    blocks = dict(BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, TILE_K=tile.tile_k)
    options = dict(num_warps=tile.num_warps, num_stages=tile.num_stages)
    grid = (triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)
    fused_gemm_kernel[grid](x, data, table_of(fmt, data), bias, y, m, n, x.stride(0), **constants, **blocks, **options)


ALGORITHMS = {"small_m": _small_m, "fused": _fused, "two_stage": two_stage.linear}
