"""compute="exact": the fused GEMM, its split-K form, either small-M kernel, or two-stage."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from .._triton import interpreting, triton
from ..compute import Branch
from ..formats import Packed
from . import two_stage
from .choice import Choice, choose
from .fused_gemm import fused_gemm_kernel
from .launching import Launch, all_aligned, pointers, table_of
from .problem import Problem, Run
from .small_m import small_m_kernel
from .small_m_codes import code_constants, small_m_codes_kernel
from .split_k import add_splits_kernel, split_k_kernel
from .tiles import Tile

_PAIR = 4  # bytes: weights are multiplied two by two
_ADD_BLOCK = 1024  # columns a program of the reduction adds


def linear(
    x: Tensor,
    weight: Packed,
    bias: Tensor | None,
    y: Tensor,
    branch: Branch | None = None,
    outliers: tuple[Tensor, Tensor] | None = None,
    choice: Choice | None = None,
) -> None:
    """Write x [M, K] @ weight.T + bias + branch to y [M, N]; x has unit stride along K.

    `outliers` are not needed: every channel is computed in x's dtype.
    """
    choice = choice or choose("exact", weight.fmt, *y.shape, x.shape[1], x.device, x.dtype, branch is not None)
    prepare(Problem.of(x, weight, bias, branch), choice)(x, weight, bias, y, branch)


@lru_cache(maxsize=4096)
def prepare(problem: Problem, choice: Choice) -> Run:
    """Return what computes a product as chosen: everything but the tensors is looked up once."""
    return ALGORITHMS[choice.algorithm](problem, choice)


def _small_m(problem: Problem, choice: Choice) -> Run:
    tile = choice.kernel_tile
    if tile.block_m > 1 and problem.dtype != torch.float32:
        return _small_m_codes(problem, tile)
    grid = (triton.cdiv(problem.n, tile.block_n), problem.m)
    constants = problem.format_constants | dict(BLOCK_N=tile.block_n, TILE_K=tile.tile_k)
    integers = (problem.n, problem.rank, problem.stride)
    return _one_launch(Launch(small_m_kernel, grid, integers, constants, dict(num_warps=tile.num_warps)))


def _small_m_codes(problem: Problem, tile: Tile) -> Run:
    grid = (triton.cdiv(problem.n, tile.block_n), triton.cdiv(problem.m, tile.block_m))
    constants = code_constants(problem.fmt, problem.format_constants, tile, not interpreting())
    options = dict(num_warps=tile.num_warps)
    strided, whole = (
        Launch(small_m_codes_kernel, grid, (problem.m, problem.n, problem.rank, stride), constants, options)
        for stride in (problem.stride, problem.k)
    )

    def run(x: Tensor, weight: Packed, bias: Tensor | None, y: Tensor, branch: Branch | None) -> None:
        hidden, up = pointers(branch)
        launch = strided
        if x.data_ptr() % _PAIR or problem.stride % 2:
            x, launch = x.clone(memory_format=torch.contiguous_format), whole
        launch(all_aligned(x, weight.data, bias, hidden, up, y), x, weight.data, bias, hidden, up, y)

    return run


def _fused(problem: Problem, choice: Choice) -> Run:
    tile, integers = choice.kernel_tile, (problem.m, problem.n, problem.rank, problem.stride)
    grid = (tile.programs(problem.m, problem.n),)
    return _one_launch(Launch(fused_gemm_kernel, grid, integers, _constants(problem, tile), tile.options))


def _one_launch(launch: Launch) -> Run:
    """Return what computes a product by a launch that decodes in registers."""

    def run(x: Tensor, weight: Packed, bias: Tensor | None, y: Tensor, branch: Branch | None) -> None:
        hidden, up = pointers(branch)
        data = weight.data
        launch(all_aligned(x, data, bias, hidden, up, y), x, data, table_of(weight), bias, hidden, up, y)

    return run


def _split_k(problem: Problem, choice: Choice) -> Run:
    m, n, tile = problem.m, problem.n, choice.kernel_tile
    constants = _constants(problem, tile) | dict(SPLITS=tile.splits)
    grid, integers = (tile.programs(m, n), tile.splits), (m, n, problem.rank, problem.stride)
    launch = Launch(split_k_kernel, grid, integers, constants, tile.options)
    add_grid = (m, triton.cdiv(n, _ADD_BLOCK))
    add = Launch(add_splits_kernel, add_grid, (m, n), dict(SPLITS=tile.splits, BLOCK=_ADD_BLOCK))

    def run(x: Tensor, weight: Packed, bias: Tensor | None, y: Tensor, branch: Branch | None) -> None:
        hidden, up = pointers(branch)
        partial = torch.empty(tile.splits, m, n, dtype=torch.float32, device=x.device)
        data = weight.data
        launch(all_aligned(x, data, hidden, up), x, data, table_of(weight), hidden, up, partial)
        add(all_aligned(bias, y), partial, bias, y)

    return run


def _two_stage(problem: Problem, choice: Choice) -> Run:
    return two_stage.prepare(problem, choice.rows)


def _constants(problem: Problem, tile: Tile) -> dict:
    """Return the constexprs of a fused kernel."""
    ldmatrix = tile.ldmatrix and problem.dtype != torch.float32  # there are no tensor-core products in float32
    blocks = dict(BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, TILE_K=tile.tile_k, LDMATRIX=ldmatrix)
    return problem.format_constants | blocks


ALGORITHMS: dict[str, Callable[[Problem, Choice], Run]] = {
    "small_m": _small_m,
    "fused": _fused,
    "split_k": _split_k,
    "two_stage": _two_stage,
}
