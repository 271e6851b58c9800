"""The tile table: which tile a kernel launches with, as data."""

from __future__ import annotations

from dataclasses import dataclass

from ..formats import SUPERBLOCK, BlockFormat


@dataclass(frozen=True)
class Tile:
    """Name one launch shape of the fused GEMM (weights and rows per program, warps, software pipeline stages)."""

    block_m: int
    block_n: int
    tile_k: int
    num_warps: int
    num_stages: int


# All tiles stay under the 99 KiB of shared memory of sm_86, sm_89 and sm_120. Formats of small blocks stage every slice on
# its own and would pass it at 256-wide steps. bench/results/aot.csv has registers, spills and shared memory of each.
_WIDE = Tile(block_m=128, block_n=128, tile_k=256, num_warps=8, num_stages=2)
_WIDE_SMALL_BLOCKS = Tile(block_m=128, block_n=128, tile_k=128, num_warps=8, num_stages=2)
_MEDIUM = Tile(block_m=64, block_n=64, tile_k=256, num_warps=4, num_stages=2)
_NARROW = Tile(block_m=16, block_n=64, tile_k=256, num_warps=4, num_stages=2)
_WIDE_STAGED = Tile(block_m=64, block_n=128, tile_k=256, num_warps=8, num_stages=2)

# Formats whose tile decode gathers from a grid in memory: those loads stay in the main loop (they hit L1) and need registers.
GRID_FORMATS = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"})
_STAGED_FORMATS = frozenset({"IQ4_XS"})  # stage more of a superblock than _WIDE has shared memory for

_SMALL = Tile(block_m=1, block_n=64, tile_k=256, num_warps=4, num_stages=1)
SMALL_M = 2  # rows up to which reading the weight once per row beats a tensor-core tile that is padded to 16


def largest_tile_k(fmt: BlockFormat, k: int, limit: int = SUPERBLOCK) -> int:
    """Return the largest power-of-two step through a row of `k` weights that is whole blocks and at most `limit`."""
    tile = limit
    while tile > fmt.block_size and k % tile:
        tile //= 2
    return max(tile, fmt.block_size)


def fused_tile(fmt: BlockFormat, m: int, n: int, k: int) -> Tile:
    """Choose the fused GEMM's tile for y[M, N] = x[M, K] @ w.T."""
    if m <= 16:
        tile = _NARROW
    elif m <= 64 or n < 128:
        tile = _MEDIUM
    else:
        tile = _wide_tile(fmt)
    tile_k = largest_tile_k(fmt, k, max(tile.tile_k, fmt.block_size))
    return Tile(tile.block_m, tile.block_n, tile_k, tile.num_warps, tile.num_stages)


def _wide_tile(fmt: BlockFormat) -> Tile:
    if fmt.name in GRID_FORMATS:
        return _MEDIUM  # nothing larger is free of spills for all of them
    if fmt.name in _STAGED_FORMATS:
        return _WIDE_STAGED
    return _WIDE if fmt.block_size == SUPERBLOCK else _WIDE_SMALL_BLOCKS


def small_m_tile(fmt: BlockFormat, k: int) -> Tile:
    """Choose the small-M kernel's tile."""
    tile_k = largest_tile_k(fmt, k, max(_SMALL.tile_k, fmt.block_size))
    return Tile(_SMALL.block_m, _SMALL.block_n, tile_k, _SMALL.num_warps, _SMALL.num_stages)
