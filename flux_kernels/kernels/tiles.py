"""Choose algorithm and tile of a launch by default, where no measurement says otherwise.

odd_tiles.csv has the tiles of formats that a default does not serve.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import Any

import torch

from .._triton import interpreting
from ..compute import DATACENTER, HOPPER, TENSOR_CORE_CAPABILITY
from ..formats import SUPERBLOCK, BlockFormat
from .odd_tiles import odd_changes


@dataclass(frozen=True)
class Tile:
    """Describe the shape of a launch.

    Rows of x and of w per program, K per step, warps, pipeline stages, programs that share K. `ldmatrix` is how x comes from
    shared memory (see ldmatrix.py), for NVIDIA's tensor cores only.
    """

    block_m: int
    block_n: int
    tile_k: int
    num_warps: int
    num_stages: int
    splits: int = 1
    ldmatrix: bool = False

    def programs(self, m: int, n: int) -> int:
        """Return how many programs compute y [M, N]."""
        return -(-m // self.block_m) * -(-n // self.block_n)

    @property
    def options(self) -> dict[str, int]:
        """Options that a launch is compiled with, next to its constants."""
        return dict(num_warps=self.num_warps, num_stages=self.num_stages)

    def __str__(self) -> str:
        split = f" split {self.splits}" if self.splits > 1 else ""
        ldmatrix = " ldmatrix" if self.ldmatrix else ""
        return f"{self.block_m}x{self.block_n}x{self.tile_k} warps {self.num_warps} stages {self.num_stages}{split}{ldmatrix}"


# All tiles stay under the 99 KiB of shared memory of sm_86, sm_89 and sm_120. Formats of small blocks stage every slice on
# its own and would pass it at 256-wide steps. bench/results/aot.csv has registers, spills and shared memory of each.
_WIDE = Tile(block_m=128, block_n=128, tile_k=256, num_warps=8, num_stages=2)
_WIDE_SMALL_BLOCKS = Tile(block_m=128, block_n=128, tile_k=128, num_warps=8, num_stages=2)
_MEDIUM = Tile(block_m=64, block_n=64, tile_k=256, num_warps=4, num_stages=2)
_NARROW = Tile(block_m=16, block_n=64, tile_k=256, num_warps=4, num_stages=2)

# An H200 took 0.83 to 0.86 of the time of 64 rows in Q4_K, Q6_K and Q8_0 (bench/results/nvidia-h200/small_m.csv); 64 rows spill
# in three formats with float32 x.
_SMALL = Tile(block_m=1, block_n=32, tile_k=256, num_warps=4, num_stages=1)
# Rows up to which reading the weight once per row beats a tensor-core tile that is padded to 16.
SMALL_M = 2
# The kernel that multiplies codes: 32 rows of w a warp, K shared by the warps of a program. Triton keeps a stage less than it is
# asked for, so that with two nothing would be in flight while a program computes; three and four warps leave Q6_K no room on GeForce.
_CODES = Tile(block_m=8, block_n=32, tile_k=256, num_warps=2, num_stages=3, splits=2)
# Rows that the kernel multiplies at the price of one row.
CODES_M = _CODES.block_m

# 128 x 128 spills on sm_86 to sm_120.
_FP16 = Tile(block_m=64, block_n=128, tile_k=256, num_warps=8, num_stages=2)
# The shortest step, for rows of 64 weights (FLUX.1's image embedder): 64 x 128 spills in it on sm_120, in seven formats.
_SHORT_K = 64

INT8_TILE = Tile(block_m=128, block_n=128, tile_k=128, num_warps=8, num_stages=3)
_INT8_LOW = Tile(block_m=64, block_n=128, tile_k=128, num_warps=8, num_stages=3)
# Cards on which the high tile spills with float32 x, 92 and 12 times; the low tile spills on sm_80.
_INT8_BRANCH_SPILLS = {(9, 0), (12, 0)}
# Rows a program of the unpack kernels decodes.
UNPACK_ROWS = 16
# Tokens a program of the int8 activation quantizer takes.
QUANTIZE_ROWS = 16
# Values of a token at a time when it is scaled to fp16.
SCALE_BLOCK = 1024


_A100 = (8, 0)
# Rows of x from which a card unpacks the weight and lets torch multiply, by capability. That costs the unpacked weight's bytes,
# a share of the product that falls with M; a decode inside the product may be free, or waited for.
# 9.0 is measured, on an H200 (bench/results/nvidia-h200/sweep.csv): two_stage takes 0.21 to 0.97 of fused's time from 128 rows
# up, and 0.39 to 1.19 at 64, whose tile serves 17 to 64. The others are estimated: the rows from which unpacking is the smaller
# of the two worst regrets (docs/decisions/first-gpu.md, tests/bench/test_model.py). Cards that are not here have slow memory
# (Orin, Thor, Spark) or another maker.
_UNPACKED_FROM = {(8, 0): 256, (8, 6): 512, (8, 9): 1024, (9, 0): 17, (10, 0): 512, (10, 3): 512, (12, 0): 512}


def choose_algorithm(
    m: int, capability: tuple[int, int] | None, dtype: torch.dtype = torch.bfloat16, codes: bool = False
) -> tuple[str, str]:
    """Return "small_m", "fused" or "two_stage" for compute="exact" on x of `dtype`, and why.

    capability None: no NVIDIA card; codes: whether small M multiplies codes (`codes_serve`).
    """
    small_m = CODES_M if codes else SMALL_M
    if m <= small_m:
        return "small_m", f"up to {small_m} rows are bound by reading the weight"
    if dtype == torch.float32:
        return (
            "two_stage",
            "float32 has no tensor-core product to hide a decode behind, and its tiles spill or pass a GeForce's shared memory",
        )
    if capability is not None and capability < TENSOR_CORE_CAPABILITY:
        return "two_stage", "Triton has no tensor-core code for this card"
    rows = inf if capability is None else _UNPACKED_FROM.get(capability, inf)
    if m >= rows:
        known = "measured" if capability == HOPPER else "estimated"
        return (
            "two_stage",
            f"from {rows} rows unpacking costs less than a decode that is waited for ({known})",
        )
    return "fused", "decodes in registers, no scratch in memory"


# Formats of at most so many bits a weight lose nothing by one int8 scale per row (Q5_1 has 6.0, Q6_K 6.6).
ROW_SCALE_BITS = 6


# Hopper and later wait for a product before they convert it (docs/decisions/predictions.md); A100's int8 products take as long as
# either way of scaling them.
_ROW_SCALES = DATACENTER - {_A100}


def row_scales_serve(fmt: BlockFormat) -> bool:
    """Tell whether one int8 scale per row of the weight is fine enough for a format."""
    return 8 * fmt.type_size <= ROW_SCALE_BITS * fmt.block_size


def choose_int8_algorithm(fmt: BlockFormat, capability: tuple[int, int] | None) -> tuple[str, str]:
    """Return "two_stage" (scales of weight groups) or "row_scales" for compute="int8", and why."""
    if capability in _ROW_SCALES and row_scales_serve(fmt):
        return "row_scales", "unpack to int8 with one scale per row: scales of groups would take longer than the products"
    return "two_stage", "unpack to int8, then one GEMM for all formats"


def int8_tile(
    m: int, capability: tuple[int, int] | None = None, dtype: torch.dtype = torch.bfloat16, branch: bool = False
) -> Tile:
    """Choose the int8 GEMM's tile.

    It is half as high where M fills no more than half of the high tile, or where that spills.
    """
    spills = branch and dtype == torch.float32 and capability in _INT8_BRANCH_SPILLS
    return _INT8_LOW if spills or m <= _INT8_LOW.block_m else INT8_TILE


def largest_tile_k(fmt: BlockFormat, k: int, limit: int = SUPERBLOCK) -> int:
    """Return the largest step through a row of `k` weights that is whole blocks and at most `limit`.

    It is a power of two.
    """
    tile = limit
    while tile > fmt.block_size and k % tile:
        tile //= 2
    return max(tile, fmt.block_size)


def loads_by_ldmatrix(fmt: BlockFormat, capability: tuple[int, int] | None) -> bool:
    """Tell whether x comes by ldmatrix.

    It does where it costs no shared memory, or the card has enough of it (A100).
    """
    if capability is None or capability < TENSOR_CORE_CAPABILITY or fmt.gathers:
        return False
    affordable = fmt.block_size < SUPERBLOCK or capability == _A100
    return affordable and bool(odd_changes("every", fmt.name, capability).get("ldmatrix", True))


def _odd(tile: Tile, name: str, fmt: BlockFormat, capability: tuple[int, int] | None, branch: bool = False) -> Tile:
    """Return `tile`, the default `name`, as odd_tiles.csv changes it for a format on a card."""
    changes: dict[str, Any] = odd_changes(name, fmt.name, capability, branch)
    return replace(tile, **changes | dict(tile_k=min(tile.tile_k, changes.get("tile_k", tile.tile_k))))


def fused_tile(fmt: BlockFormat, m: int, n: int, k: int, capability: tuple[int, int] | None, branch: bool = False) -> Tile:
    """Choose the fused GEMM's tile for y[M, N] = x[M, K] @ w.T.

    capability: of the card, None for other vendors' cards. branch: whether a low-rank branch is added in the epilogue.
    """
    if m <= _NARROW.block_m:
        name, tile = "narrow", _NARROW
    elif m <= _MEDIUM.block_m or n < _WIDE.block_n:
        name, tile = "medium", _MEDIUM
    else:
        name, tile = "wide", _wide_tile(fmt)
    tile = _odd(tile, name, fmt, capability)
    tile_k = largest_tile_k(fmt, k, max(tile.tile_k, fmt.block_size))
    tile = replace(tile, tile_k=tile_k, ldmatrix=loads_by_ldmatrix(fmt, capability))
    return _odd(tile, name, fmt, capability, branch) if branch else tile


def _wide_tile(fmt: BlockFormat) -> Tile:
    # Loads from the grid (L1 hits) and their registers rule out larger tiles.
    if fmt.gathers:
        return _MEDIUM
    return _WIDE if fmt.block_size == SUPERBLOCK else _WIDE_SMALL_BLOCKS


def split_k_tile(fmt: BlockFormat, m: int, n: int, k: int, capability: tuple[int, int] | None) -> Tile:
    """Return the wide tile of split-K, before the number of splits is chosen."""
    tile = fused_tile(fmt, m, n, k, capability)
    return tile if tile.block_m < _MEDIUM.block_m else _odd(tile, "split_k", fmt, capability)


def codes_serve(fmt: BlockFormat, capability: tuple[int, int] | None, dtype: torch.dtype) -> bool:
    """Tell whether small M runs on tensor cores, the codes multiplied before the scales.

    On other makers' cards this was never tried.
    """
    tensor_cores = interpreting() if capability is None else capability >= TENSOR_CORE_CAPABILITY
    return tensor_cores and fmt.code_tile is not None and dtype != torch.float32


def small_m_tile(fmt: BlockFormat, k: int, codes: bool = False, capability: tuple[int, int] | None = None) -> Tile:
    """Choose the tile of the small-M kernel, or of the kernel that multiplies codes (`codes_serve`)."""
    tile = _odd(_CODES, "small_m_codes", fmt, capability) if codes else _odd(_SMALL, "small_m", fmt, capability)
    tile_k = largest_tile_k(fmt, k, max(tile.tile_k, fmt.block_size))
    return split_by_warps(replace(tile, tile_k=tile_k), k) if codes else replace(tile, tile_k=tile_k)


def split_by_warps(tile: Tile, k: int) -> Tile:
    """Halve the warps that share K until they divide its steps."""
    splits = tile.splits
    while k // tile.tile_k % splits:
        splits //= 2
    return replace(tile, splits=splits, num_warps=tile.num_warps * splits // tile.splits)


def fp16_tile(fmt: BlockFormat, k: int, capability: tuple[int, int] | None, branch: bool = False) -> Tile:
    """Choose the tile of the GEMM with fp16 accumulation, with or without a low-rank branch.

    K is a multiple of 64.
    """
    tile = _odd(_MEDIUM if fmt.gathers else _FP16, "fp16", fmt, capability)
    limit = SUPERBLOCK if fmt.block_size == SUPERBLOCK else _WIDE_SMALL_BLOCKS.tile_k
    tile_k = max(_SHORT_K, largest_tile_k(fmt, k, max(limit, fmt.block_size)))
    if tile_k == _SHORT_K:
        tile = _odd(replace(tile, block_n=min(tile.block_n, 64)), "fp16_short", fmt, capability)
    tile = replace(tile, tile_k=tile_k, ldmatrix=loads_by_ldmatrix(fmt, capability))
    return _odd(tile, "fp16", fmt, capability, branch) if branch else tile


def tile_of(
    algorithm: str,
    fmt: BlockFormat,
    m: int,
    n: int,
    k: int,
    capability: tuple[int, int] | None = None,
    branch: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Tile | None:
    """Return the default tile of one of exact mode's algorithms."""
    if algorithm == "two_stage":
        return None
    if algorithm == "small_m":
        return small_m_tile(fmt, k, codes_serve(fmt, capability, dtype), capability)
    return fused_tile(fmt, m, n, k, capability, branch)
