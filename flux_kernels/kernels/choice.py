"""Choose what a call runs: algorithm and tile.

A measurement on this card decides, or else the default table.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from ..formats import BlockFormat
from .chunks import bounded_rows
from .launching import capability_of, processors_of
from .modes import Choice
from .record import find, forget_records
from .tiles import (
    Tile,
    choose_algorithm,
    choose_int8_algorithm,
    codes_serve,
    fp16_tile,
    fused_tile,
    int8_tile,
    small_m_tile,
)

__all__ = ["Choice", "choose", "default_choice", "forget", "on_forget", "tile_of"]
# Algorithms that write the unpacked weight to memory.
_UNPACKS = ("two_stage", "row_scales")


@lru_cache(maxsize=4096)
def choose(
    compute: str,
    fmt: BlockFormat,
    m: int,
    n: int,
    k: int,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    branch: bool = False,
) -> Choice:
    """Choose for y[M, N] = x[M, K] @ w.T on `device`, x of `dtype`, with or without a low-rank branch.

    `forget` makes it look at the records again.
    """
    measured = find(compute, fmt, m, n, k, device, dtype, branch)
    return measured or default_choice(compute, fmt, m, n, k, capability_of(device), dtype, branch, processors_of(device))


_also_forget: list[Callable[[], None]] = []


def forget() -> None:
    """Forget the choices made so far, after a tuning record was written."""
    choose.cache_clear()
    forget_records()
    for clear in _also_forget:
        clear()


def on_forget(clear: Callable[[], None]) -> None:
    """Have `forget` call `clear`, too: of a cache that holds choices."""
    if clear not in _also_forget:
        _also_forget.append(clear)


def default_choice(
    compute: str,
    fmt: BlockFormat,
    m: int,
    n: int,
    k: int,
    capability: tuple[int, int] | None,
    dtype: torch.dtype = torch.bfloat16,
    branch: bool = False,
    processors: int | None = None,
) -> Choice:
    """Return the default table's choice for a card of `capability` (None: not an NVIDIA card)."""
    if compute == "int8":
        algorithm, why = choose_int8_algorithm(fmt, capability)
        tile: Tile | None = int8_tile(m, capability, dtype, branch)
    elif compute == "fp16_accumulate":
        algorithm, why = "fused", "decodes in registers"
        tile = fp16_tile(fmt, k, capability, branch)
    else:
        algorithm, why = choose_algorithm(m, capability, dtype, codes_serve(fmt, capability, dtype))
        tile = tile_of(algorithm, fmt, m, n, k, capability, branch, dtype)
    rows = None
    if algorithm in _UNPACKS:
        rows = bounded_rows(m, n, k, 1 if compute == "int8" else dtype.itemsize, processors)
    return Choice(algorithm, tile, why, rows)


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
