"""Choose what a call runs: algorithm and tile.

A measurement on this card decides, or else the default table.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from ..compute import capability_of
from ..formats import BlockFormat
from .candidates import Candidate
from .launching import processors_of
from .modes import MODES
from .problem import Call, Choice
from .record import find, forget_records
from .tiles import tile_of

__all__ = ["Choice", "candidates", "choose", "default_choice", "forget", "on_forget", "tile_of"]


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
    return MODES[compute].default(Call(fmt, m, n, k, capability, processors or 1, dtype, branch))


def candidates(compute: str, call: Call) -> list[Candidate]:
    """List what to try for a call, the default table's choice first.

    What cannot work or win on this card is left out.
    """
    mode = MODES[compute]
    default = mode.default(call)
    return list(dict.fromkeys([Candidate(default.algorithm, default.tile, default.rows), *mode.candidates(call)]))
