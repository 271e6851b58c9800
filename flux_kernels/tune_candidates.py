"""What `tune` tries for a call: every algorithm of the compute mode with tiles that suit its shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

import torch

from .compute import TENSOR_CORE_CAPABILITY
from .formats import SUPERBLOCK, BlockFormat
from .kernels.choice import default_choice
from .kernels.tuning import CODES_M, SMALL_M, Tile, codes_serve, largest_tile_k, loads_by_ldmatrix, row_scales_serve

Candidate = tuple[str, Tile | None]  # algorithm, tile

_SMALL_M_LIMIT = 8  # rows above which reading the weight once per row cannot win
_SHAPES = ((16, 64), (16, 128), (32, 64), (64, 64), (64, 128), (128, 64), (128, 128), (128, 256), (256, 128))
_INT8_SHAPES = ((64, 64), (64, 128), (128, 64), (128, 128), (128, 256), (256, 128))
_SPLITS = (2, 3, 4, 6)
_LEAST_STAGES = 2
_FEW_WAVES = 3  # splitting K is tried where one tile per program makes fewer waves than this


def candidates(
    compute: str, fmt: BlockFormat, m: int, n: int, k: int, capability: tuple[int, int] | None, processors: int
) -> list[Candidate]:
    """List what to try for y[M, N] = x[M, K] @ w.T, the default table's choice first.

    Args:
        capability: of the card, None for one that is not NVIDIA's.
        processors: multiprocessors of the card.
    """
    default = default_choice(compute, fmt, m, n, k, capability)
    found = [(default.algorithm, default.tile)]
    tried = {"exact": _exact, "fp16_accumulate": _fp16, "int8": _int8}[compute](fmt, m, n, k, processors)
    if compute == "exact" and m <= CODES_M and codes_serve(fmt, capability, torch.bfloat16):
        tried = chain(_codes(fmt, k), tried)
    if compute != "int8":
        tried = _ways_to_load(fmt, tried, capability)
    return found + [candidate for candidate in tried if candidate not in found]


def _codes(fmt: BlockFormat, k: int) -> Iterator[Candidate]:
    """Yield tiles of the small-M kernel that multiplies codes, a warp for each part of K."""
    tile_k = largest_tile_k(fmt, k)
    for block_n in (16, 32, 64):
        for splits in (2, 4, 8):
            for stages in (_LEAST_STAGES, _LEAST_STAGES + 1, _LEAST_STAGES + 2):
                if k // tile_k % splits == 0:
                    yield "small_m", Tile(CODES_M, block_n, tile_k, splits, stages, splits)


def _ways_to_load(fmt: BlockFormat, tried: Iterator[Candidate], capability: tuple[int, int] | None) -> Iterator[Candidate]:
    """Load x by ldmatrix where it is free, both ways where it costs shared memory, never on other makers' cards."""
    free = loads_by_ldmatrix(fmt, capability)
    for algorithm, tile in tried:
        if tile is None or algorithm == "small_m" or capability is None or capability < TENSOR_CORE_CAPABILITY:
            yield algorithm, tile
            continue
        yield algorithm, replace(tile, ldmatrix=free)
        if fmt.block_size == SUPERBLOCK and tile.num_stages == _LEAST_STAGES:
            yield algorithm, replace(tile, ldmatrix=not free)


def _exact(fmt: BlockFormat, m: int, n: int, k: int, processors: int) -> Iterator[Candidate]:
    if m <= _SMALL_M_LIMIT:
        for block_n, warps in ((16, 2), (32, 2), (32, 4), (64, 4), (128, 4)):
            yield "small_m", Tile(1, block_n, largest_tile_k(fmt, k), warps, 1)
    if m > SMALL_M:
        yield "two_stage", None
        for tile in _tiles(_SHAPES, fmt, m, k):
            yield "fused", tile
            yield from _splits(tile, m, n, k, processors)


def _splits(tile: Tile, m: int, n: int, k: int, processors: int) -> Iterator[Candidate]:
    tiles = -(-m // tile.block_m) * -(-n // tile.block_n)
    if tile.num_stages > _LEAST_STAGES or tiles >= _FEW_WAVES * processors:
        return
    for splits in _SPLITS:
        if k % (tile.tile_k * splits) == 0:
            yield "split_k", replace(tile, splits=splits)


def _fp16(fmt: BlockFormat, m: int, n: int, k: int, processors: int) -> Iterator[Candidate]:
    for tile in _tiles(_SHAPES, fmt, m, k):
        if tile.tile_k % 64 == 0:
            yield "fused", tile


def _int8(fmt: BlockFormat, m: int, n: int, k: int, processors: int) -> Iterator[Candidate]:
    for block_m, block_n in _fitting(_INT8_SHAPES, m):
        for stages in (2, 3, 4):
            for warps in (4, 8) if block_m * block_n <= 128 * 128 else (8,):
                tile = Tile(block_m, block_n, 128, warps, stages)
                yield "two_stage", tile
                if row_scales_serve(fmt):
                    yield "row_scales", tile


def _tiles(shapes, fmt: BlockFormat, m: int, k: int) -> Iterator[Tile]:
    steps = {largest_tile_k(fmt, k, max(limit, fmt.block_size)) for limit in (128, SUPERBLOCK)}
    for block_m, block_n in _fitting(shapes, m):
        for tile_k in sorted(steps):
            for stages in (_LEAST_STAGES, _LEAST_STAGES + 1):
                yield Tile(block_m, block_n, tile_k, 4 if block_m * block_n <= 64 * 64 else 8, stages)


def _fitting(shapes, m: int) -> list[tuple[int, int]]:
    """Leave out tiles much taller than the call, and for tall calls those that read the weight too often."""
    tallest = max(16, 2 * m)
    lowest = 64 if m > 256 else 16
    return [(block_m, block_n) for block_m, block_n in shapes if lowest <= block_m <= tallest]
