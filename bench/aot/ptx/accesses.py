"""ld and st in global and shared memory, plain and in vectors, and their checks."""

from __future__ import annotations

import numpy as np

from . import banks
from .forms import Step, form
from .memory import UNSIGNED
from .numbers import width_of
from .parse import Instruction, names_in
from .threads import Mask, Threads, address_reader, reader

_TYPES = ("b8", "u8", "b16", "u16", "b32", "u32", "b64", "u64", "f32", "s32", "s64")
_VECTORS = ("", "v2.", "v4.", "v8.")


def _opcodes(name: str, space: str) -> list[str]:
    return [f"{name}.{space}.{vector}{t}" for vector in _VECTORS for t in _TYPES]


def _active(threads: Threads, values: np.ndarray, mask: Mask) -> np.ndarray:
    return values if mask is None else values[mask]


def load_shared(threads: Threads, addresses: np.ndarray, width: int, count: int, warps: np.ndarray, what: str) -> np.ndarray:
    """Return unsigned words [accesses, count] of shared memory after every check."""
    values = threads.shared.load(addresses, width, count)
    threads.races.read(addresses, width * count, warps)
    banks.count(threads, what, addresses, width * count, warps)
    return values


def store_shared(threads: Threads, addresses: np.ndarray, values: np.ndarray, width: int, warps: np.ndarray, what: str) -> None:
    """Write unsigned words [accesses, count] to shared memory after every check."""
    count = values.shape[1]
    unchanged = (threads.shared.peek(addresses, width, count) == values).all(axis=1)
    threads.shared.store(addresses, values, width)
    agreed = (threads.shared.peek(addresses, width, count) == values).all(axis=1)
    threads.races.write(addresses, width * count, warps, unchanged, agreed)
    banks.count(threads, what, addresses, width * count, warps)


@form(*_opcodes("ld", "global"), *_opcodes("ld", "shared"))
def _load(instruction: Instruction) -> Step:
    destinations = names_in(instruction.operands[0])
    address = address_reader(instruction.operands[1])
    width, shared = width_of(instruction.opcode.split(".")[-1]), ".shared." in instruction.opcode

    def step(threads: Threads, mask: Mask) -> None:
        addresses = _active(threads, address(threads), mask)
        if shared:
            warps = _active(threads, threads.warp, mask)
            values = load_shared(threads, addresses, width, len(destinations), warps, instruction.opcode)
        else:
            values = threads.memory.load(addresses, width, len(destinations))
        for index, name in enumerate(destinations):
            threads.write(name, _scattered(values[:, index], threads, mask), mask)

    return step


def _scattered(values: np.ndarray, threads: Threads, mask: Mask) -> np.ndarray:
    """Return a register value per thread from the active threads'; a byte takes at least 16 bits."""
    wide = UNSIGNED[max(2, values.dtype.itemsize)]
    if mask is None:
        return values.astype(wide)
    everywhere = np.zeros(threads.count, wide)
    everywhere[mask] = values
    return everywhere


@form(*_opcodes("st", "global"), *_opcodes("st", "shared"))
def _store(instruction: Instruction) -> Step:
    address = address_reader(instruction.operands[0])
    width, shared = width_of(instruction.opcode.split(".")[-1]), ".shared." in instruction.opcode
    readers = [reader(source, f"b{8 * width}") for source in names_in(instruction.operands[1])]

    def step(threads: Threads, mask: Mask) -> None:
        values = np.stack([threads.spread(read(threads)) for read in readers], axis=-1)
        addresses, values = _active(threads, address(threads), mask), _active(threads, values, mask)
        if shared:
            store_shared(threads, addresses, values, width, _active(threads, threads.warp, mask), instruction.opcode)
        else:
            threads.memory.store(addresses, values, width)

    return step
