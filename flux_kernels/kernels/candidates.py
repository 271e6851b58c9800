"""What tuning tries for a call: tiles that suit its shape and fit the card's memory.

Each mode takes from these what it can use (`candidates` of its module).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from ..compute import HOPPER, TENSOR_CORE_CAPABILITY
from ..formats import SLICE, SUPERBLOCK, BlockFormat
from .problem import Call
from .tiles import Tile, largest_tile_k, loads_by_ldmatrix

_SHAPES = ((16, 64), (16, 128), (32, 64), (64, 64), (64, 128), (128, 64), (128, 128), (128, 256), (256, 128))
# Of w in a warp group from which Triton takes Hopper's product.
_HOPPER_COLUMNS = 32
# The fewest pipeline stages in which a load is on its way during a product.
LEAST_STAGES = 2
# That one program may have. Source: CUDA C++ Programming Guide, technical specifications per compute capability.
_SHARED_BYTES = {
    (7, 5): 64 << 10,
    **dict.fromkeys([(8, 0), (8, 7)], 163 << 10),
    **dict.fromkeys([(8, 6), (8, 9), (12, 0), (12, 1)], 99 << 10),
    **dict.fromkeys([HOPPER, (10, 0), (10, 3), (11, 0)], 227 << 10),
}


class Candidate(NamedTuple):
    """Name one way to compute a call.

    Attributes:
        algorithm: of the compute mode.
        tile: of the kernel, None where it has none.
        rows: of the weight that are unpacked at a time, None for all.
    """

    algorithm: str
    tile: Tile | None
    rows: int | None = None


def tiles_of(call: Call) -> Iterator[Tile]:
    """Yield tiles of a kernel that decodes in registers."""
    fmt = call.fmt
    steps = {largest_tile_k(fmt, call.k, max(limit, fmt.block_size)) for limit in (128, SUPERBLOCK)}
    for block_m, block_n in near(_SHAPES, call.m):
        if not _sums_fit(call, block_m, block_n):
            continue
        for tile_k in sorted(steps):
            for stages in (LEAST_STAGES, LEAST_STAGES + 1):
                yield Tile(block_m, block_n, tile_k, 4 if block_m * block_n <= 64 * 64 else 8, stages)


def _sums_fit(call: Call, block_m: int, block_n: int) -> bool:
    """Tell whether a fused tile's sums fit in registers together with the decoded weight.

    On Hopper all do. Elsewhere tiles above 128 x 128 spill 2 to 865 times, but for the high one of small blocks.
    """
    small_blocks = call.fmt.block_size < SUPERBLOCK and block_n <= 128
    return call.capability == HOPPER or block_m * block_n <= 128 * 128 or small_blocks


def near(shapes: Iterable[tuple[int, int]], m: int) -> list[tuple[int, int]]:
    """Leave out tiles much taller than the call, and for tall calls those that read the weight too often."""
    tallest = max(16, 2 * m)
    lowest = 64 if m > 256 else 16
    return [(block_m, block_n) for block_m, block_n in shapes if lowest <= block_m <= tallest]


def ways_to_load(call: Call, tried: Iterable[Candidate]) -> Iterator[Candidate]:
    """Load x by ldmatrix or not, the default's way first.

    Both are tried with the fewest stages only, and never on other makers' cards. ldmatrix costs K-quants shared memory, and
    small blocks a round trip of the decoded tile through it: neither is always the faster.
    """
    default = loads_by_ldmatrix(call.fmt, call.capability)
    for candidate in tried:
        algorithm, tile, rows = candidate
        if tile is None or call.capability is None or call.capability < TENSOR_CORE_CAPABILITY:
            yield candidate
            continue
        yield Candidate(algorithm, replace(tile, ldmatrix=default), rows)
        if algorithm == "fused" and tile.num_stages == LEAST_STAGES and call.dtype != torch.float32:
            yield Candidate(algorithm, replace(tile, ldmatrix=not default), rows)


def fitting_memory(call: Call, tried: Iterable[Candidate], itemsize: int) -> Iterator[Candidate]:
    """Leave out tiles that need more shared memory than a program may have, without compiling them."""
    limit = shared_limit(call.capability)
    for candidate in tried:
        tile = candidate.tile
        if (
            limit is None
            or tile is None
            or call.k == tile.tile_k
            or least_shared_bytes(call.fmt, tile, call.capability, itemsize) <= limit
        ):
            yield candidate


def shared_limit(capability: tuple[int, int] | None) -> int | None:
    """Return the bytes of shared memory that one program may have on a card; None where this is not known."""
    return _SHARED_BYTES.get(capability) if capability else None


def least_shared_bytes(fmt: BlockFormat, tile: Tile, capability: tuple[int, int] | None, itemsize: int) -> int:
    """Return the bytes of shared memory that a fused kernel takes at least.

    These are the steps of x and packed w that are on their way. It holds for rows of more than one step: with one, nothing is
    on its way while another is multiplied. Compiled kernels take up to three times as much for small tiles, since layouts are
    changed there, too.

    One step less is on its way than there are stages. On Hopper the product reads x from shared memory while the next steps
    arrive, which takes one more; a warp group of 16 columns takes the older product, from registers. Formats that gather from a
    grid spend one stage on that. A decoded slice of small blocks changes its layout in shared memory.
    """
    steps = tile.num_stages - 1
    if fmt.gathers and tile.num_stages > LEAST_STAGES:
        steps -= 1
    # Warp groups that share the columns of a tile.
    groups = max(1, tile.num_warps // 4 // max(1, tile.block_m // 64))
    x_steps = steps + (capability == HOPPER and itemsize == 2 and tile.block_n // groups >= _HOPPER_COLUMNS)
    x, w = tile.block_m * tile.tile_k * itemsize, tile.block_n * tile.tile_k // fmt.block_size * fmt.type_size
    layout = tile.block_n * SLICE * itemsize if tile.ldmatrix and fmt.block_size < SUPERBLOCK else 0
    return x_steps * x + steps * w + layout
