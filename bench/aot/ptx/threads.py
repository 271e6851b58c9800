"""The register file of threads that run in step: every register is an array with one value per thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .faults import Fault
from .memory import POISON, UNSIGNED, Memory
from .numbers import from_bits, to_bits, width_of
from .races import Races

WARP = 32
Mask = np.ndarray | None  # which threads execute an instruction; None is all of them
Reader = Callable[["Threads"], np.ndarray]

_SPECIAL = ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z")
_SHARED_BASE = "global_smem"  # Triton's name of a block's shared memory, which begins at address 0 here


@dataclass
class Counts:
    """Count what ran.

    Attributes:
        opcodes: instructions by opcode.
        bank_conflicts: wavefronts in shared memory by opcode, [taken, least]; None where they are not counted.
        early_moves: moves of an accumulator before its product was waited for (see `Threads.move_in_flight`).
    """

    opcodes: dict[str, int] = field(default_factory=dict)
    bank_conflicts: dict[str, list[int]] | None = None
    early_moves: int = 0


class Threads:
    """Hold what some threads of one block share: registers, shared and global memory, copies in flight.

    `first` is the index in the block of the first of `count` threads; `block` is the block's (x, y, z).
    """

    def __init__(
        self,
        first: int,
        count: int,
        block: tuple,
        parameters: dict,
        shared: Memory,
        races: Races,
        memory: Memory,
        counts: Counts,
    ):
        self.count = count
        self.index = np.arange(first, first + count)
        self.warp = self.index // WARP
        self.registers: dict[str, np.ndarray] = {}
        self.parameters = parameters
        self.shared = shared
        self.races = races
        self.memory = memory
        self.copies: list[list] = [[]]  # groups of asynchronous copies that nobody waited for, the open one last
        self.products: list[list] = [[]]  # groups of asynchronous matrix products, likewise
        self.in_flight: dict[str, np.ndarray] = {}  # registers of their accumulators
        self.fenced: dict[str, np.ndarray] = {}  # registers as they were at the last wgmma.fence
        self.reserved: dict[str, str] = {}  # registers an asynchronous product uses -> which
        self.counts = counts
        self.division_error = 0  # units in the last place by which div.full is off
        special = dict(zip(_SPECIAL, (self.index, *block), strict=True))
        self.special = {name: self.spread(np.uint32(value)) for name, value in special.items()}

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Return an array with one value per thread, the given array where it is that already."""
        return values if values.shape == (self.count,) else np.array(np.broadcast_to(values, self.count))

    def write(self, name: str, values: np.ndarray, mask: Mask = None) -> None:
        """Set a register in the threads of `mask`: bool for a predicate, unsigned words for the rest."""
        if self.reserved and name in self.reserved:
            raise Fault(f"writes {name}, which {self.reserved[name]} still uses")
        values = self.spread(values)
        if mask is not None:
            values = np.where(mask, values, self.registers.get(name, _poison(values.dtype)))
        self.registers[name] = values

    def set(self, name: str, values: np.ndarray, ptx_type: str, mask: Mask = None) -> None:
        """Set a register to numbers of a PTX type."""
        self.write(name, to_bits(values, ptx_type), mask)

    def move_in_flight(self, source: str, parts: dict[str, Callable[[np.ndarray], np.ndarray]]) -> bool:
        """Let `parts` of an accumulator under way land in other registers; return whether `source` is any.

        PTX leaves this undefined. Triton splits fp16 accumulators so before it waits, and ptxas makes no instruction of it, so
        it is counted and the parts stay unreadable until the wait, but it is no fault.
        """
        if source not in self.in_flight:
            return False
        value = self.in_flight[source]
        owner = next(product for group in self.products for product in group if product.results.get(source) is value)
        for name, part in parts.items():
            self.registers.pop(name, None)
            self.in_flight[name] = owner.results[name] = part(value)
            self.reserved[name] = owner.label
            self.counts.early_moves += 1
        return True

    def define(self, name: str, dtype: type) -> None:
        """Give a register that nobody wrote poison, so that it can be read."""
        if name.startswith("%") and name not in self.registers and name not in self.reserved and name not in _SPECIAL:
            self.registers[name] = self.spread(_poison(np.dtype(dtype)))

    def read(self, name: str) -> np.ndarray:
        """Return the bits of a register.

        Raises:
            Fault: where nobody wrote it, or an asynchronous product that nobody waited for will.
        """
        try:
            return self.registers[name]
        except KeyError:
            pass
        if name in self.reserved:
            raise Fault(f"reads {name}, which {self.reserved[name]} has not delivered")
        raise Fault(f"reads {name}, which nobody wrote")


def _poison(dtype: np.dtype) -> np.ndarray:
    """Return what a register holds in threads that never wrote it."""
    return np.array(True) if dtype == bool else np.frombuffer(bytes([POISON]) * dtype.itemsize, dtype)[0]


def reader(operand: str, ptx_type: str) -> Reader:
    """Return what reads an operand (register, special register or immediate) as numbers of a PTX type."""
    if operand in _SPECIAL:
        return lambda threads: from_bits(threads.special[operand], ptx_type)
    if operand.startswith("%"):
        return _register_reader(operand, ptx_type)
    constant = _immediate(operand, ptx_type)
    return lambda threads: constant


def _register_reader(name: str, ptx_type: str) -> Reader:
    width = width_of(ptx_type)

    def read(threads: Threads) -> np.ndarray:
        bits = threads.read(name)
        if bits.itemsize != width and bits.dtype != bool:
            # A narrow load left zeros above, a narrow use looks at the low bits.
            bits = bits.astype(UNSIGNED[width])
        return from_bits(bits, ptx_type)

    return read


def _immediate(text: str, ptx_type: str) -> np.ndarray:
    """Return an immediate operand as an array of no dimensions."""
    if text == _SHARED_BASE:
        value = 0
    elif text[:2] in ("0f", "0d", "0F", "0D"):
        # The bits of a float.
        value = int.from_bytes(bytes.fromhex(text[2:]))
        if ptx_type == "f64" and text[1] in "fF" or ptx_type == "f32" and text[1] in "dD":
            raise Fault(f"immediate {text} is not of type {ptx_type}")
    else:
        try:
            value = int(text.rstrip("U"), 0)
        except ValueError:
            raise Fault(f"cannot read operand {text!r}") from None
    if ptx_type == "pred":
        return np.array(value != 0)
    width = width_of(ptx_type)
    return from_bits(np.array(value & (1 << 8 * width) - 1, UNSIGNED[width]), ptx_type)


def address_reader(operand: str) -> Reader:
    """Return what reads [register + offset] as int64 byte addresses, an address a thread."""
    base, _, offset = (part.strip() for part in operand.strip("[] ").partition("+"))
    read = reader(base, "u64")
    try:
        distance = int(offset or "0", 0)
    except ValueError:
        raise Fault(f"cannot read address {operand!r}") from None

    def address(threads: Threads) -> np.ndarray:
        return threads.spread(read(threads).astype(np.int64) + distance)

    return address
