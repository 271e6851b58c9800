"""compute="int8": quantize x, unpack the weight to int8, and multiply.

The algorithm "two_stage" gives a weight one scale per row and group of K, "row_scales" one per row (see
tiles.choose_int8_algorithm); chunks.py says how much of the weight is unpacked at a time. Scales of rows follow from the
packed rows alone: a layer keeps them (layers/row_scale.py), other callers have them computed at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

from .._triton import triton
from ..compute import HOPPER, Branch, group_width, join, outlier_branch
from ..formats import Packed
from .activations import quantize_activation_kernel
from .candidates import Candidate, near, shared_limit
from .chunks import bounded_rows, candidate_rows, chunks_of
from .int8_gemm import int8_gemm_kernel
from .launching import Launch, all_aligned, pointers, table_of
from .problem import Call, Choice, Problem
from .tiles import (
    QUANTIZE_ROWS,
    UNPACK_ROWS,
    Tile,
    choose_int8_algorithm,
    int8_tile,
    largest_tile_k,
    row_scales_serve,
)
from .unpack_int8 import row_largest_kernel, row_scale_kernel, unpack_int8_kernel

# Rows whose scale a program puts together from the parts' largest weights.
_SCALE_ROWS = 128
# Larger ones spill on every card, with 58 to 382 accesses a step: int32 and float32 sums of a thread are 256 registers.
_SHAPES = ((64, 64), (64, 128), (128, 64), (128, 128))


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
    """Write x [M, K] @ weight.T + bias + branch to y [M, N], both operands rounded to int8.

    The input channels of `outliers` (index [k], weight [N, k]) are left out of the int8 product and join the branch.
    """
    keep = None
    if outliers is not None:
        branch = join(branch, outlier_branch(x, outliers))
        keep = torch.ones(x.shape[1], dtype=torch.uint8, device=x.device).index_fill_(0, outliers[0].long(), 0)
    prepare(Problem.of(x, weight, bias, branch), choice, outliers is not None)(x, weight, bias, y, branch, keep)


@lru_cache(maxsize=4096)
def prepare(problem: Problem, choice: Choice, outliers: bool = False) -> Callable[..., None]:
    """Return what computes a product as chosen, a `Run`.

    With `outliers` it also takes keep [K] uint8, 0 for the input channels that are left out of the int8 product.
    """
    rowwise = choice.algorithm == "row_scales"
    quantize = _quantizing(problem.m, problem.k, problem.stride, group_width(problem.k), outliers)
    find_row_scale = _scaling(problem) if rowwise else None
    chunks = chunks_of(problem.n, choice.rows)
    tile = choice.kernel_tile
    steps = [_step(problem, tile, rowwise, chunk if len(chunks) > 1 else None) for chunk in chunks]

    def run(
        x: Tensor,
        weight: Packed,
        bias: Tensor | None,
        y: Tensor,
        branch: Branch | None,
        keep: Tensor | None = None,
    ) -> None:
        hidden, up = pointers(branch)
        quantized = quantize(x, keep)
        if find_row_scale is not None and weight.row_scale is None:
            weight = weight._replace(row_scale=find_row_scale(weight))
        for step in steps:
            step(quantized, weight, bias, hidden, up, y)

    return run


def _step(problem: Problem, tile: Tile, rowwise: bool, chunk: slice | None) -> Callable[..., None]:
    """Return what unpacks one chunk of the weight (None: all of it) and multiplies."""
    rows = problem.n if chunk is None else chunk.stop - chunk.start
    unpack = _unpacking(problem, rows, group_width(problem.k), rowwise)
    multiply = _multiplying(problem, rows, tile, rowwise)

    def run(quantized, weight: Packed, bias, hidden, up, y: Tensor) -> None:
        if chunk is not None:
            bias, up = (None if part is None else part[chunk] for part in (bias, up))
            weight, y = weight.rows(chunk), y[:, chunk]
        # The unpacked chunk is let go before the next is allocated.
        multiply(*quantized, *unpack(weight), bias, hidden, up, y)

    return run


def _quantizing(
    m: int, k: int, stride: int, group: int, outliers: bool
) -> Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]:
    """Return what quantizes x [M, K] to int8.

    It returns codes [M, K] and float32 scales [K // group, M]; channels with keep = 0 become zeros.
    """
    grid = (triton.cdiv(m, QUANTIZE_ROWS), k // group)
    constants = dict(K=k, GROUP=group, BLOCK_M=QUANTIZE_ROWS)
    launch = Launch(quantize_activation_kernel, grid, (m, stride), constants)

    def run(x: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        codes = torch.empty(m, k, dtype=torch.int8, device=x.device)
        scale = torch.empty(k // group, m, dtype=torch.float32, device=x.device)
        launch(all_aligned(x), x, keep if outliers else None, codes, scale)
        return codes, scale

    return run


def _scaling(problem: Problem) -> Callable[[Packed], Tensor]:
    """Return what finds the scale of each packed row.

    The scales are float32 [N], the largest magnitude / 127, NaN for NaN and Inf.
    """
    n, tile_k = problem.n, largest_tile_k(problem.fmt, problem.k)
    parts = problem.k // tile_k
    constants = problem.format_constants | dict(BLOCK_N=UNPACK_ROWS, TILE_K=tile_k)
    find_largest = Launch(row_largest_kernel, (triton.cdiv(n, UNPACK_ROWS), parts), (n,), constants)
    put_together = Launch(row_scale_kernel, (triton.cdiv(n, _SCALE_ROWS),), (n,), dict(PARTS=parts, BLOCK_N=_SCALE_ROWS))

    def run(weight: Packed) -> Tensor:
        data = weight.data
        largest = torch.empty(parts, n, dtype=torch.float32, device=data.device)
        scale = torch.empty(n, dtype=torch.float32, device=data.device)
        find_largest(all_aligned(data), data, table_of(weight), largest)
        put_together(True, largest, scale)
        return scale

    return run


def _unpacking(problem: Problem, rows: int, group: int, rowwise: bool) -> Callable[[Packed], tuple]:
    """Return what unpacks packed rows to int8 codes [rows, K] and their scales.

    Scales are float32 [K // group, rows], or the rows' own.
    """
    k = problem.k
    tile_k = max(group, largest_tile_k(problem.fmt, k))
    constants = problem.format_constants | dict(GROUP=group, BLOCK_N=UNPACK_ROWS, TILE_K=tile_k)
    launch = Launch(unpack_int8_kernel, (triton.cdiv(rows, UNPACK_ROWS), k // tile_k), (rows,), constants)

    def run(weight: Packed) -> tuple:
        data, given = weight.data, weight.row_scale if rowwise else None
        codes = torch.empty(rows, k, dtype=torch.int8, device=data.device)
        scale = None if rowwise else torch.empty(k // group, rows, dtype=torch.float32, device=data.device)
        launch(all_aligned(data, given), data, table_of(weight), given, codes, scale)
        return codes, given if scale is None else scale

    return run


def _multiplying(problem: Problem, rows: int, tile: Tile, rowwise: bool) -> Callable[..., None]:
    """Return what multiplies quantized x by `rows` rows of the weight.

    Bias and branch are added; it writes y [M, rows].
    """
    constants = dict(K=problem.k, GROUP=group_width(problem.k), ROW_SCALES=rowwise, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n)
    integers = problem.m, rows, problem.rank, problem.n
    launch = Launch(int8_gemm_kernel, (tile.programs(problem.m, rows),), integers, constants, tile.options)

    def run(x_codes, x_scale, w_codes, w_scale, bias, hidden, up, y: Tensor) -> None:
        aligned = all_aligned(w_scale, bias, hidden, up, y)
        launch(aligned, x_codes, x_scale, w_codes, w_scale, bias, hidden, up, y)

    return run


def quantize_activation(x: Tensor, group: int, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize x [M, K] to int8 codes [M, K] and float32 scales [K // group, M].

    Channels with keep [K] = 0 become zeros.
    """
    m, k = x.shape
    return _quantizing(m, k, x.stride(0), group, keep is not None)(x, keep)


def unpack_weight(weight: Packed, group: int, row_scales: bool = False) -> tuple[Tensor, Tensor]:
    """Unpack a weight to int8 codes [N, K] and float32 scales [K // group, N].

    The scales are [1, N] with `row_scales`.
    """
    weight = weight._replace(row_scale=row_scale(weight) if row_scales else None)
    codes, scale = _unpacking(Problem.of_rows(weight, torch.float32), weight.n, group, row_scales)(weight)
    return codes, scale.view(-1, weight.n)


def row_scale(weight: Packed) -> Tensor:
    """Return the int8 scale of each packed row: float32 [N].

    That is its largest magnitude / 127, NaN where it holds NaN or Inf.
    """
    return _scaling(Problem.of_rows(weight, torch.float32))(weight)


def default(call: Call) -> Choice:
    """Choose for a call where no measurement says otherwise."""
    algorithm, why = choose_int8_algorithm(call.fmt, call.capability)
    tile = int8_tile(call.m, call.capability, call.dtype, call.branch)
    return Choice(algorithm, tile, why, bounded_rows(call.m, call.n, call.k, 1, call.processors))


def candidates(call: Call) -> Iterator[Candidate]:
    """Yield what tuning tries for a call."""
    algorithms = ("two_stage", "row_scales") if row_scales_serve(call.fmt) else ("two_stage",)
    first, *others = candidate_rows(call.m, call.n, call.k, 1, call.processors)
    for algorithm in algorithms:
        for tile in _tiles(call):
            yield Candidate(algorithm, tile, first)
    chosen = default(call)
    # How the weight is cut and which tile is best hardly depend on each other.
    for rows in others:
        yield Candidate(chosen.algorithm, chosen.tile, rows)


def _tiles(call: Call) -> Iterator[Tile]:
    limit = shared_limit(call.capability)
    shapes = near(_SHAPES, call.m)
    # A tile of 128 x 128 already asks L2 for 64 bytes a clock, the smallest for twice that.
    if call.m > 256:
        shapes = [shape for shape in shapes if shape != (64, 64)]
    for block_m, block_n in shapes:
        for stages in (2, 3, 4):
            # Four warps spill with a tile of 128 x 128.
            for warps in (4, 8) if block_m * block_n < 128 * 128 else (8,):
                tile = Tile(block_m, block_n, 128, warps, stages)
                if limit is None or shared_bytes(tile, call.capability) <= limit:
                    yield tile


def shared_bytes(tile: Tile, capability: tuple[int, int] | None) -> int:
    """Return the bytes of shared memory that the GEMM takes at least.

    These are the steps of both operands that are on their way.
    """
    steps = tile.num_stages - 1 + (capability == HOPPER)
    return steps * (tile.block_m + tile.block_n) * tile.tile_k
