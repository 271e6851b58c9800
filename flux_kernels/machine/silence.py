"""Keep what libraries in C write off the standard streams: they write past Python."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

STDOUT, STDERR = 1, 2


@contextmanager
def silenced(descriptor: int) -> Iterator[None]:
    """Drop what this process writes to a file descriptor while the context lasts.

    What was written before still appears, and so does what is written after.

    Args:
        descriptor: STDOUT or STDERR.
    """
    _flush()
    shown = os.dup(descriptor)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), descriptor)
        yield
    finally:
        _flush()
        os.dup2(shown, descriptor)
        os.close(shown)


def _flush() -> None:
    """Write out what Python and the C library hold back for any stream."""
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)
