"""Shared-memory bank conflicts: how many wavefronts an access takes, and how many it must at least.

32 banks of 4 bytes serve a warp in wavefronts of at most 128 bytes: 8-byte accesses go by half warps, 16-byte accesses and
the rows of ldmatrix by eight at a time. Threads that read the same word share it. A wavefront is repeated as often as the
busiest bank has different words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .threads import Threads

_BANKS = 32
_WORD = 4  # bytes


def count(threads: Threads, what: str, addresses: np.ndarray, size: int, warps: np.ndarray) -> None:
    """Add an instruction's wavefronts to threads.counts.bank_conflicts[what] = [taken, least]."""
    if threads.counts.bank_conflicts is None:
        return
    total = threads.counts.bank_conflicts.setdefault(what, [0, 0])
    for warp in np.unique(warps):
        taken, least = wavefronts(addresses[warps == warp], size)
        total[0] += taken
        total[1] += least


def wavefronts(addresses: np.ndarray, size: int) -> tuple[int, int]:
    """Return (taken, least) wavefronts of one warp's accesses of `size` bytes at int64 byte addresses."""
    together = 32 if size <= _WORD else 128 // size
    words_each = max(1, size // _WORD)
    taken = least = 0
    for start in range(0, len(addresses), together):
        words = addresses[start : start + together, None] // _WORD + np.arange(words_each)
        taken += int(np.bincount(np.unique(words) % _BANKS).max())
        least += 1
    return taken, least
