"""compute="exact": the fused GEMM, its split-K form, either small-M kernel, or two-stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from .._triton import interpreting, triton
from ..compute import DATACENTER, WEIGHT_ONLY_M, Branch
from ..formats import BlockFormat, Packed
from . import two_stage
from .candidates import LEAST_STAGES, Candidate, fitting_memory, tiles_of, ways_to_load
from .chunks import bounded_rows, candidate_rows
from .fused_gemm import fused_gemm_kernel
from .launching import Launch, all_aligned, pointers, table_of
from .problem import Call, Choice, Problem, Run
from .small_m import small_m_kernel
from .small_m_codes import code_constants, small_m_codes_kernel
from .split_k import add_splits_kernel, split_k_kernel
from .tiles import CODES_M, SMALL_M, Tile, choose_algorithm, codes_serve, fused_tile, largest_tile_k, tile_of

_PAIR = 4  # bytes: weights are multiplied two by two
_ADD_BLOCK = 1024  # columns a program of the reduction adds
# Rows above which reading the weight once per row cannot win.
_SMALL_M_LIMIT = 8
_SPLITS = (2, 3, 4, 6)
# Splitting K is tried where one tile per program makes fewer waves than _FEW_WAVES, and only until it makes _MOST_WAVES: then
# no wave is left that is mostly empty.
_FEW_WAVES, _MOST_WAVES = 3, 4
# Rows up to which split-K may win on a data-center card that unpacks by default: on an H200 at 64 by up to 1.4, at 128 by 1.1,
# at 256 nowhere.
_SPLIT_K_WINS_M = 128


def linear(
    x: Tensor,
    weight: Packed,
    bias: Tensor | None,
    y: Tensor,
    branch: Branch | None = None,
    outliers: tuple[Tensor, Tensor] | None = None,
    *,
    choice: Choice,
) -> None:
    """Write x [M, K] @ weight.T + bias + branch to y [M, N]; x has unit stride along K.

    `outliers` are not needed: every channel is computed in x's dtype.
    """
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


def default(call: Call) -> Choice:
    """Choose for a call where no measurement says otherwise."""
    algorithm, why = choose_algorithm(call.m, call.capability, call.dtype, codes_serve(call.fmt, call.capability, call.dtype))
    tile = tile_of(algorithm, call.fmt, call.m, call.n, call.k, call.capability, call.branch, call.dtype)
    unpacks = algorithm == "two_stage"
    rows = bounded_rows(call.m, call.n, call.k, call.dtype.itemsize, call.processors) if unpacks else None
    return Choice(algorithm, tile, why, rows)


def candidates(call: Call) -> Iterator[Candidate]:
    """Yield what tuning tries for a call."""
    if call.m <= CODES_M and codes_serve(call.fmt, call.capability, call.dtype):
        yield from _code_tiles(call.fmt, call.k)
    if call.m <= _SMALL_M_LIMIT:
        for block_n, warps in ((16, 2), (32, 2), (32, 4), (64, 4), (128, 4)):
            yield Candidate("small_m", Tile(1, block_n, largest_tile_k(call.fmt, call.k), warps, 1))
    # Without tensor cores a fused tile spills.
    float32 = call.dtype == torch.float32
    # With fewer rows, the unpacked weight's bytes alone take longer than all else.
    if call.m > (SMALL_M if float32 else WEIGHT_ONLY_M):
        for rows in candidate_rows(call.m, call.n, call.k, call.dtype.itemsize, call.processors):
            yield Candidate("two_stage", None, rows)
    if call.m > SMALL_M and not float32:
        yield from fitting_memory(call, ways_to_load(call, _fused_tiles(call)), call.dtype.itemsize)


def _code_tiles(fmt: BlockFormat, k: int) -> Iterator[Candidate]:
    """Yield tiles of the small-M kernel that multiplies codes, a warp for each part of K."""
    tile_k = largest_tile_k(fmt, k)
    for block_n in (16, 32, 64):
        for splits in (2, 4, 8):
            for stages in (LEAST_STAGES, LEAST_STAGES + 1, LEAST_STAGES + 2):
                if k // tile_k % splits == 0:
                    yield Candidate("small_m", Tile(CODES_M, block_n, tile_k, splits, stages, splits))


def _fused_tiles(call: Call) -> Iterator[Candidate]:
    unpacks = choose_algorithm(call.m, call.capability)[0] == "two_stage"
    if unpacks and call.m > _SPLIT_K_WINS_M and call.capability in DATACENTER:
        # The decode is expected not to hide: look once whether that is so, with the default's tile and a third stage.
        tile = fused_tile(call.fmt, call.m, call.n, call.k, call.capability)
        yield from (Candidate("fused", replace(tile, num_stages=stages)) for stages in (tile.num_stages, tile.num_stages + 1))
        return
    for tile in tiles_of(call):
        yield Candidate("fused", tile)
        yield from _splits(call, tile)


def _splits(call: Call, tile: Tile) -> Iterator[Candidate]:
    tiles = tile.programs(call.m, call.n)
    if tile.num_stages > LEAST_STAGES or tiles >= _FEW_WAVES * call.processors:
        return
    for splits in _SPLITS:
        if call.k % (tile.tile_k * splits) == 0 and tiles * splits <= _MOST_WAVES * call.processors:
            yield Candidate("split_k", replace(tile, splits=splits))
