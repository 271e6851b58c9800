"""Accesses to shared memory by different warps without a barrier between them.

Each byte remembers the last warp that wrote it and the last that read it, with the barrier interval in which that was. Two
warps that touch a byte in one interval, at least one writing, race: on a GPU either may come first. This finds a missing
barrier in any order of execution. Warps count as running in step within themselves.
"""

from __future__ import annotations

import numpy as np

from .faults import Fault

_WARPS = 64  # more than a block has; the last stands for "several"
_SEVERAL = _WARPS - 1


class Races:
    """Watch the `size` bytes of one block's shared memory; `pass_barrier` starts a new interval.

    `copies_need_fence` tells whether wgmma needs a fence.proxy.async after asynchronous copies, too, as PTX says.
    """

    def __init__(self, size: int, copies_need_fence: bool = True):
        self.copies_need_fence = copies_need_fence
        padded = -(-size // 16) * 16 + 16
        self._writer = np.zeros(padded, np.int32)  # _WARPS * interval + warp
        self._reader = np.zeros(padded, np.int32)
        self._unfenced = np.zeros(padded, bool)  # written, and not yet visible to wgmma
        self._start = _WARPS  # of the interval

    def pass_barrier(self) -> None:
        """Order everything so far before everything that follows."""
        self._start += _WARPS

    def read(self, addresses: np.ndarray, size: int, warps: np.ndarray) -> None:
        """Note reads of `size` bytes by threads of `warps`; raise Fault where another warp wrote them."""
        at, tag = self._at(addresses, size), (self._start + warps).astype(np.int32)[:, None]
        self._refuse(self._writer[at], tag, addresses, "reads what another warp wrote since the last barrier")
        before = self._reader[at]
        shared = (before >= self._start) & (before != tag)
        self._reader[at] = np.where(shared, self._start + _SEVERAL, tag)
        # Two warps of this very instruction.
        disagree = self._reader[at] != tag
        self._reader[at[disagree]] = self._start + _SEVERAL

    def write(
        self,
        addresses: np.ndarray,
        size: int,
        warps: np.ndarray,
        unchanged: np.ndarray | None = None,
        agreed: np.ndarray | None = None,
    ) -> None:
        """Note writes of `size` bytes by threads of `warps`; raise Fault where another warp touched them.

        What was before the last barrier does not count. Several warps may write the same value to one place, as Triton does where a layout holds copies: on a GPU as here it does
        not matter which comes first. `unchanged` are writes of what stood there before, `agreed` those whose value stands there
        when all are done.
        """
        at, tag = self._at(addresses, size), (self._start + warps).astype(np.int32)[:, None]
        self._refuse(self._reader[at], tag, addresses, "overwrites what another warp read since the last barrier", unchanged)
        self._refuse(self._writer[at], tag, addresses, "overwrites what another warp wrote since the last barrier", unchanged)
        self._writer[at] = np.broadcast_to(tag, at.shape)
        self._unfenced[at] = True
        self._refuse(self._writer[at], tag, addresses, "is a write of two warps to one place", agreed)

    def land(self, addresses: np.ndarray, size: int, warps: np.ndarray) -> None:
        """Note that asynchronous copies of `warps` land, `size` bytes each; raise Fault as `write` does."""
        self.write(addresses, size, warps)
        if not self.copies_need_fence:
            self._unfenced[self._at(addresses, size)] = False

    def fence(self, warps: np.ndarray) -> None:
        """Let wgmma see what was written before the last barrier, or by the warps that execute this fence."""
        self._unfenced[self._writer < self._start] = False
        self._unfenced[np.isin(self._writer, self._start + np.unique(warps))] = False

    def read_by_warpgroup(self, addresses: np.ndarray, size: int, warps: np.ndarray) -> None:
        """Note a read of wgmma; raise Fault as `read` does, and where no fence made the bytes visible."""
        if self._unfenced[self._at(addresses, size)].any():
            raise Fault("a product reads shared memory that was written after the last fence.proxy.async")
        self.read(addresses, size, warps)

    def _at(self, addresses: np.ndarray, size: int) -> np.ndarray:
        return addresses[:, None] + np.arange(size)

    def _refuse(
        self, before: np.ndarray, tag: np.ndarray, addresses: np.ndarray, what: str, allowed: np.ndarray | None = None
    ) -> None:
        wrong = (before >= self._start) & (before != tag)
        if allowed is not None:
            wrong &= ~allowed[:, None]
        if wrong.any():
            rows = wrong.any(axis=1)
            raise Fault(f"race: {what}, at shared address {int(addresses[rows][0]):#x} ({int(rows.sum())} threads)")
