"""compute="exact": the fused GEMM, its split-K form, the small-M kernel for one or two rows, or two-stage."""

from __future__ import annotations

import torch
from torch import Tensor

from .._triton import triton
from ..formats import BlockFormat
from ..low_rank import Branch
from . import two_stage
from .choice import Choice, choose
from .fused_gemm import fused_gemm_kernel
from .launching import format_constants, pointers, table_of
from .small_m import small_m_kernel
from .split_k import add_splits_kernel, split_k_kernel
from .tuning import Tile

_ADD_BLOCK = 1024  # columns a program of the reduction adds


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
    """Write x [M, K] @ decode(data).T + bias + branch to y [M, N]; x has unit stride along K."""
    choice = choice or choose("exact", fmt, *y.shape, x.shape[1], x.device, x.dtype, branch is not None)
    ALGORITHMS[choice.algorithm](x, data, bias, y, fmt, planes, choice, branch)


def _small_m(x: Tensor, data: Tensor, bias, y: Tensor, fmt: BlockFormat, planes: bool, choice: Choice, branch=None) -> None:
    (m, n), tile = y.shape, choice.tile
    hidden, up, rank = pointers(branch)
    constants = format_constants(fmt, data.shape[1], planes)
    blocks = dict(BLOCK_N=tile.block_n, TILE_K=tile.tile_k, num_warps=tile.num_warps)
    grid = (triton.cdiv(n, tile.block_n), m)
    small_m_kernel[grid](x, data, table_of(fmt, data), bias, hidden, up, y, n, rank, x.stride(0), **constants, **blocks)


def _fused(x: Tensor, data: Tensor, bias, y: Tensor, fmt: BlockFormat, planes: bool, choice: Choice, branch=None) -> None:
    (m, n), tile = y.shape, choice.tile
    hidden, up, rank = pointers(branch)
    constants = format_constants(fmt, data.shape[1], planes) | _blocks(tile, x.dtype)
    grid = (_tiles(m, n, tile),)
    operands = (x, data, table_of(fmt, data), bias, hidden, up, y)
    fused_gemm_kernel[grid](*operands, m, n, rank, x.stride(0), **constants)


def _split_k(x: Tensor, data: Tensor, bias, y: Tensor, fmt: BlockFormat, planes: bool, choice: Choice, branch=None) -> None:
    (m, n), tile = y.shape, choice.tile
    hidden, up, rank = pointers(branch)
    constants = format_constants(fmt, data.shape[1], planes) | _blocks(tile, x.dtype) | dict(SPLITS=tile.splits)
    partial = torch.empty(tile.splits, m, n, dtype=torch.float32, device=x.device)
    grid = (_tiles(m, n, tile), tile.splits)
    split_k_kernel[grid](x, data, table_of(fmt, data), hidden, up, partial, m, n, rank, x.stride(0), **constants)
    add_grid = (triton.cdiv(n, _ADD_BLOCK), m)
    add_splits_kernel[add_grid](partial, bias, y, m, n, SPLITS=tile.splits, BLOCK=_ADD_BLOCK)


def _two_stage(x: Tensor, data: Tensor, bias, y: Tensor, fmt: BlockFormat, planes: bool, choice: Choice, branch=None) -> None:
    two_stage.linear(x, data, bias, y, fmt, planes, branch, choice.rows)


def _blocks(tile: Tile, dtype: torch.dtype) -> dict:
    ldmatrix = tile.ldmatrix and dtype != torch.float32  # there are no tensor-core products in float32
    blocks = dict(BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, TILE_K=tile.tile_k, LDMATRIX=ldmatrix)
    return blocks | dict(num_warps=tile.num_warps, num_stages=tile.num_stages)


def _tiles(m: int, n: int, tile: Tile) -> int:
    return triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)


ALGORITHMS = {"small_m": _small_m, "fused": _fused, "split_k": _split_k, "two_stage": _two_stage}
