"""One address space whose every byte knows whether it may be accessed and whether somebody wrote it."""

from __future__ import annotations

import numpy as np

from .faults import Fault

# What memory holds before it is written: a large negative number in every float type
POISON = 0xCB
WIDTHS = (1, 2, 4, 8)
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SLACK = 16  # bytes behind the end, so that every width has whole words


class Memory:
    """Hold `size` bytes; check accesses, arrays of byte addresses of one width, as a sanitizer does.

    Flags are bytes of 0 and 1 and are looked at in words of the access's width: one gather each.
    """

    def __init__(self, size: int, inside: bool = False):
        padded = -(-size // 8) * 8 + _SLACK
        self.size = size
        self.bytes = np.full(padded, POISON, np.uint8)
        self._inside = np.zeros(padded, np.uint8)
        self._written = np.zeros(padded, np.uint8)
        if inside:
            self._inside[:size] = 1
        self._values = _by_width(self.bytes)
        self._inside_words = _by_width(self._inside)
        self._written_words = _by_width(self._written)

    def load(self, addresses: np.ndarray, width: int, count: int = 1) -> np.ndarray:
        """Return [threads, count] unsigned words of `width` bytes from byte addresses int64 [threads].

        Raises:
            Fault: where any is misaligned (for all `count` words together), outside every buffer, or was never written.
        """
        at = self._words(addresses, width, count)
        if not (self._written_words[width][at] == _ALL[width]).all():
            raise Fault(f"reads bytes that nobody wrote at {_first(addresses, self._written_words[width][at] != _ALL[width])}")
        return self._values[width][at]

    def store(self, addresses: np.ndarray, values: np.ndarray, width: int) -> None:
        """Write unsigned words [threads, count] to byte addresses int64 [threads]; raise Fault as `load` does."""
        at = self._words(addresses, width, values.shape[1])
        self._values[width][at] = values
        self._written_words[width][at] = _ALL[width]

    def peek(self, addresses: np.ndarray, width: int, count: int = 1) -> np.ndarray:
        """Return words [threads, count], written or not; raise Fault where misaligned or outside."""
        return self._values[width][self._words(addresses, width, count)]

    def forget(self, addresses: np.ndarray, width: int) -> None:
        """Make bytes unreadable until they are written again, as the target of a copy in flight."""
        self._written_words[width][self._words(addresses, width, 1)] = 0

    def allow(self, start: int, stop: int, which: np.ndarray | None = None) -> None:
        """Let the bytes from start to stop be accessed, or those of them where `which` is true."""
        self._inside[start:stop] = 1 if which is None else which

    def is_written(self, start: int, stop: int) -> np.ndarray:
        """Return one bool per byte from start to stop."""
        return self._written[start:stop].view(bool)

    def mark_written(self, start: int, stop: int, written: bool | np.ndarray = True) -> None:
        """Set which bytes from start to stop count as written."""
        self._written[start:stop] = written

    def _words(self, addresses: np.ndarray, width: int, count: int) -> np.ndarray:
        """Return word indices int64 [threads, count] of checked accesses."""
        whole = width * count
        if (addresses % whole).any():
            raise Fault(
                f"misaligned by {int((addresses % whole).max())} for {whole} bytes at {_first(addresses, addresses % whole)}"
            )
        if addresses.size and (addresses.min() < 0 or addresses.max() + whole > self.size):
            raise Fault(f"outside memory at {_first(addresses, (addresses < 0) | (addresses + whole > self.size))}")
        at = (addresses // width)[:, None] + np.arange(count)
        if not (self._inside_words[width][at] == _ALL[width]).all():
            raise Fault(f"outside every buffer at {_first(addresses, self._inside_words[width][at] != _ALL[width])}")
        return at


_ALL = {width: UNSIGNED[width](int.from_bytes(b"\1" * width, "little")) for width in WIDTHS}


def _by_width(data: np.ndarray) -> dict[int, np.ndarray]:
    return {width: data[: len(data) // width * width].view(UNSIGNED[width]) for width in WIDTHS}


def _first(addresses: np.ndarray, wrong: np.ndarray) -> str:
    """Name the first wrong access and how many there are."""
    bad = wrong.reshape(len(addresses), -1).any(axis=1)
    return f"{int(addresses[bad][0]):#x} ({int(bad.sum())} of {len(addresses)} threads)"
