"""Choose what a call runs: the algorithm and tile measured for it on this card, or the default table's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from ..formats import BlockFormat
from .launching import capability_of
from .record import find, forget_records
from .tuning import INT8_TILE, Tile, choose_algorithm, choose_int8_algorithm, fp16_tile, fused_tile, small_m_tile

ALGORITHMS = {  # compute mode -> what it can run
    "exact": ("small_m", "fused", "split_k", "two_stage"),
    "fp16_accumulate": ("fused",),
    "int8": ("two_stage", "row_scales"),
}


@dataclass(frozen=True)
class Choice:
    """Name what a call runs: the algorithm, its tile (None where torch's matmul does the product), and why."""

    algorithm: str
    tile: Tile | None
    why: str

    def __str__(self) -> str:
        return f"{self.algorithm} {self.tile}" if self.tile else self.algorithm


@lru_cache(maxsize=4096)
def choose(compute: str, fmt: BlockFormat, m: int, n: int, k: int, device: torch.device) -> Choice:
    """Choose for y[M, N] = x[M, K] @ w.T on `device`; `forget` makes it look at the records again."""
    measured = find(compute, fmt, m, n, k, device)
    if measured is not None:
        return Choice(measured.algorithm, measured.tile, measured.why)
    return default_choice(compute, fmt, m, n, k, capability_of(device))


def forget() -> None:
    """Forget the choices made so far, after a tuning record was written."""
    choose.cache_clear()
    forget_records()


def default_choice(compute: str, fmt: BlockFormat, m: int, n: int, k: int, capability: tuple[int, int] | None) -> Choice:
    """Return the default table's choice for a card of `capability` (None: not an NVIDIA card)."""
    if compute == "int8":
        algorithm, why = choose_int8_algorithm(fmt, capability)
        return Choice(algorithm, INT8_TILE, why)
    if compute == "fp16_accumulate":
        return Choice("fused", fp16_tile(fmt, k, capability), "decodes in registers")
    algorithm, why = choose_algorithm(m, capability)
    return Choice(algorithm, tile_of(algorithm, fmt, m, n, k, capability), why)


def tile_of(algorithm: str, fmt: BlockFormat, m: int, n: int, k: int, capability: tuple[int, int] | None = None) -> Tile | None:
    """Return the default tile of one of exact mode's algorithms."""
    if algorithm == "two_stage":
        return None
    return small_m_tile(fmt, k) if algorithm == "small_m" else fused_tile(fmt, m, n, k, capability)
