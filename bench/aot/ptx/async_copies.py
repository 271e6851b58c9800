"""cp.async: copies from global to shared memory that land no earlier than somebody waits for them.

From its start to its landing a copy's target is unreadable, so a read before the wait faults; the landing is a write of the
waiting warp, so a read by another warp needs a barrier after it. A GPU may land copies earlier, never later.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .faults import Fault
from .forms import Step, form
from .parse import Instruction
from .threads import Mask, Threads, address_reader, reader


@dataclass(frozen=True)
class _Copy:
    """Hold what one instruction copies: shared addresses, bytes [threads, size] and the warps that copy."""

    targets: np.ndarray
    values: np.ndarray
    warps: np.ndarray


@form("cp.async.ca.shared.global", "cp.async.cg.shared.global")
def _copy(instruction: Instruction) -> Step:
    target, source, size_text, *rest = instruction.operands
    size = int(size_text, 0)
    if size not in ((16,) if ".cg." in instruction.opcode else (4, 8, 16)):
        raise Fault(f"cannot copy {size} bytes, {instruction}")
    to, origin = address_reader(target), address_reader(source)
    # Bytes that are copied, the others become zeros.
    present = reader(rest[0], "u32") if rest else None

    def step(threads: Threads, mask: Mask) -> None:
        active = slice(None) if mask is None else mask
        targets, sources, warps = to(threads)[active], origin(threads)[active], threads.warp[active]
        length = np.full(len(targets), size) if present is None else threads.spread(present(threads))[active].astype(int)
        threads.shared.peek(targets, 4, size // 4)
        threads.races.write(targets, size, warps)
        values = _values(threads, sources, length, size)
        for offset in range(0, size, 4):
            threads.shared.forget(targets + offset, 4)
        threads.copies[-1].append(_Copy(targets, values, warps))

    return step


def _values(threads: Threads, sources: np.ndarray, length: np.ndarray, size: int) -> np.ndarray:
    """Return uint32 [copies, size / 4]: what stands at `sources`, zeros past `length` bytes."""
    if not np.isin(length, (0, size)).all():
        raise Fault(f"a copy of a part of {size} bytes")
    values = np.zeros((len(sources), size // 4), np.uint32)
    copied = length > 0
    values[copied] = threads.memory.load(sources[copied], 4, size // 4)
    return values


@form("cp.async.commit_group")
def _commit(instruction: Instruction) -> Step:
    return lambda threads, mask: threads.copies.append([])


@form("cp.async.wait_group", "cp.async.wait_all")
def _wait(instruction: Instruction) -> Step:
    everything = instruction.opcode.endswith("all")
    pending = 0 if everything else int(instruction.operands[0], 0)

    def step(threads: Threads, mask: Mask) -> None:
        if everything:
            threads.copies.append([])
        while len(threads.copies) - 1 > pending:
            for copy in threads.copies.pop(0):
                threads.races.land(copy.targets, 4 * copy.values.shape[1], copy.warps)
                threads.shared.store(copy.targets, copy.values, 4)

    return step
