"""What `tune` tries for a call: each algorithm of the mode with tiles that suit shape and card."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ..compute import DATACENTER, HOPPER, TENSOR_CORE_CAPABILITY, WEIGHT_ONLY_M
from ..formats import SLICE, SUPERBLOCK, BlockFormat
from ..kernels.choice import default_choice
from ..kernels.chunks import candidate_rows
from ..kernels.tiles import (
    CODES_M,
    SMALL_M,
    Tile,
    choose_algorithm,
    codes_serve,
    fused_tile,
    largest_tile_k,
    loads_by_ldmatrix,
    row_scales_serve,
)

# Rows above which reading the weight once per row cannot win.
_SMALL_M_LIMIT = 8
_SHAPES = ((16, 64), (16, 128), (32, 64), (64, 64), (64, 128), (128, 64), (128, 128), (128, 256), (256, 128))
# Larger tiles spill on every card, with 58 to 382 accesses a step: int32 and float32 sums of a thread are 256 registers.
_INT8_SHAPES = ((64, 64), (64, 128), (128, 64), (128, 128))
_SPLITS = (2, 3, 4, 6)
# Splitting K is tried where one tile per program makes fewer waves than _FEW_WAVES, and only until it makes _MOST_WAVES: then
# no wave is left that is mostly empty.
_FEW_WAVES, _MOST_WAVES = 3, 4
# Of w in a warp group from which Triton takes Hopper's product.
_HOPPER_COLUMNS = 32
_LEAST_STAGES = 2
# Rows up to which split-K may win on a data-center card that unpacks by default: on an H200 at 64 by up to 1.4, at 128 by 1.1,
# at 256 nowhere.
_SPLIT_K_WINS_M = 128
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


@dataclass(frozen=True)
class Call:
    """Describe y[M, N] = x[M, K] @ w.T for a card.

    Attributes:
        fmt: of w.
        capability: of the card, None for other vendors' cards.
        processors: multiprocessors of the card.
        dtype: of x.
    """

    fmt: BlockFormat
    m: int
    n: int
    k: int
    capability: tuple[int, int] | None
    processors: int
    dtype: torch.dtype = torch.bfloat16


def candidates(compute: str, call: Call) -> list[Candidate]:
    """List what to try for a call, the default table's choice first.

    What cannot work or win on this card is left out.
    """
    shape = call.m, call.n, call.k
    default = default_choice(compute, call.fmt, *shape, call.capability, call.dtype, False, call.processors)
    others = {"exact": _exact, "fp16_accumulate": _fp16, "int8": _int8}[compute](call)
    return list(dict.fromkeys([Candidate(default.algorithm, default.tile, default.rows), *others]))


def _exact(call: Call) -> Iterator[Candidate]:
    if call.m <= CODES_M and codes_serve(call.fmt, call.capability, call.dtype):
        yield from _codes(call.fmt, call.k)
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
        yield from _fitting_memory(call, _ways_to_load(call, _fused(call)), call.dtype.itemsize)


def _codes(fmt: BlockFormat, k: int) -> Iterator[Candidate]:
    """Yield tiles of the small-M kernel that multiplies codes, a warp for each part of K."""
    tile_k = largest_tile_k(fmt, k)
    for block_n in (16, 32, 64):
        for splits in (2, 4, 8):
            for stages in (_LEAST_STAGES, _LEAST_STAGES + 1, _LEAST_STAGES + 2):
                if k // tile_k % splits == 0:
                    yield Candidate("small_m", Tile(CODES_M, block_n, tile_k, splits, stages, splits))


def _fused(call: Call) -> Iterator[Candidate]:
    unpacks = choose_algorithm(call.m, call.capability)[0] == "two_stage"
    if unpacks and call.m > _SPLIT_K_WINS_M and call.capability in DATACENTER:
        # The decode is expected not to hide: look once whether that is so, with the default's tile and a third stage.
        tile = fused_tile(call.fmt, call.m, call.n, call.k, call.capability)
        yield from (Candidate("fused", replace(tile, num_stages=stages)) for stages in (tile.num_stages, tile.num_stages + 1))
        return
    for tile in _tiles(call):
        yield Candidate("fused", tile)
        yield from _splits(call, tile)


def _splits(call: Call, tile: Tile) -> Iterator[Candidate]:
    tiles = tile.programs(call.m, call.n)
    if tile.num_stages > _LEAST_STAGES or tiles >= _FEW_WAVES * call.processors:
        return
    for splits in _SPLITS:
        if call.k % (tile.tile_k * splits) == 0 and tiles * splits <= _MOST_WAVES * call.processors:
            yield Candidate("split_k", replace(tile, splits=splits))


def _fp16(call: Call) -> Iterator[Candidate]:
    # The mode is refused there.
    if call.capability in DATACENTER:
        return
    # Sums in fp16 and in float32: 128 x 128 spills for superblocks (112 and 153 accesses on sm_86), larger tiles for all.
    most = 128 * 128 - (call.fmt.block_size == SUPERBLOCK)
    tiles = [tile for tile in _tiles(call) if tile.block_m * tile.block_n <= most]
    tried = (Candidate("fused", tile) for tile in tiles if tile.tile_k % 64 == 0)
    yield from _fitting_memory(call, _ways_to_load(call, tried), torch.float16.itemsize)


def _int8(call: Call) -> Iterator[Candidate]:
    algorithms = ("two_stage", "row_scales") if row_scales_serve(call.fmt) else ("two_stage",)
    first, *others = candidate_rows(call.m, call.n, call.k, 1, call.processors)
    for algorithm in algorithms:
        for tile in _int8_tiles(call):
            yield Candidate(algorithm, tile, first)
    default = default_choice("int8", call.fmt, call.m, call.n, call.k, call.capability, call.dtype, False, call.processors)
    # How the weight is cut and which tile is best hardly depend on each other.
    for rows in others:
        yield Candidate(default.algorithm, default.tile, rows)


def _int8_tiles(call: Call) -> Iterator[Tile]:
    limit = shared_limit(call.capability)
    shapes = _near(_INT8_SHAPES, call.m)
    # A tile of 128 x 128 already asks L2 for 64 bytes a clock, the smallest for twice that.
    if call.m > 256:
        shapes = [shape for shape in shapes if shape != (64, 64)]
    for block_m, block_n in shapes:
        for stages in (2, 3, 4):
            # Four warps spill with a tile of 128 x 128.
            for warps in (4, 8) if block_m * block_n < 128 * 128 else (8,):
                tile = Tile(block_m, block_n, 128, warps, stages)
                if limit is None or int8_shared_bytes(tile, call.capability) <= limit:
                    yield tile


def _tiles(call: Call) -> Iterator[Tile]:
    fmt = call.fmt
    steps = {largest_tile_k(fmt, call.k, max(limit, fmt.block_size)) for limit in (128, SUPERBLOCK)}
    for block_m, block_n in _near(_SHAPES, call.m):
        if not _sums_fit(call, block_m, block_n):
            continue
        for tile_k in sorted(steps):
            for stages in (_LEAST_STAGES, _LEAST_STAGES + 1):
                yield Tile(block_m, block_n, tile_k, 4 if block_m * block_n <= 64 * 64 else 8, stages)


def _sums_fit(call: Call, block_m: int, block_n: int) -> bool:
    """Tell whether a fused tile's sums fit in registers together with the decoded weight.

    On Hopper all do. Elsewhere tiles above 128 x 128 spill 2 to 865 times, but for the high tile of small blocks.
    """
    small_blocks = call.fmt.block_size < SUPERBLOCK and block_n <= 128
    return call.capability == HOPPER or block_m * block_n <= 128 * 128 or small_blocks


def _near(shapes: Iterable[tuple[int, int]], m: int) -> list[tuple[int, int]]:
    """Leave out tiles much taller than the call, and for tall calls those that read the weight too often."""
    tallest = max(16, 2 * m)
    lowest = 64 if m > 256 else 16
    return [(block_m, block_n) for block_m, block_n in shapes if lowest <= block_m <= tallest]


def _ways_to_load(call: Call, tried: Iterable[Candidate]) -> Iterator[Candidate]:
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
        if algorithm == "fused" and tile.num_stages == _LEAST_STAGES and call.dtype != torch.float32:
            yield Candidate(algorithm, replace(tile, ldmatrix=not default), rows)


def _fitting_memory(call: Call, tried: Iterable[Candidate], itemsize: int) -> Iterator[Candidate]:
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

    These are the steps of x and packed w that are on their way. It holds for rows of more than one step: in one alone nothing
    is on its way while another is multiplied. Compiled kernels take up to three times as much for small tiles, since layouts are
    changed there, too.

    One step less is on its way than there are stages. On Hopper the product reads x from shared memory while the next steps
    arrive, which takes one more; a warp group of 16 columns takes the older product, from registers. Formats that gather from a
    grid spend one stage on that. A decoded slice of small blocks changes its layout in shared memory.
    """
    steps = tile.num_stages - 1
    if fmt.gathers and tile.num_stages > _LEAST_STAGES:
        steps -= 1
    # Warp groups that share the columns of a tile.
    groups = max(1, tile.num_warps // 4 // max(1, tile.block_m // 64))
    x_steps = steps + (capability == HOPPER and itemsize == 2 and tile.block_n // groups >= _HOPPER_COLUMNS)
    x, w = tile.block_m * tile.tile_k * itemsize, tile.block_n * tile.tile_k // fmt.block_size * fmt.type_size
    layout = tile.block_n * SLICE * itemsize if tile.ldmatrix and fmt.block_size < SUPERBLOCK else 0
    return x_steps * x + steps * w + layout


def int8_shared_bytes(tile: Tile, capability: tuple[int, int] | None) -> int:
    """Return the bytes of shared memory that the int8 GEMM takes at least.

    These are the steps of both operands that are on their way.
    """
    steps = tile.num_stages - 1 + (capability == HOPPER)
    return steps * (tile.block_m + tile.block_n) * tile.tile_k
