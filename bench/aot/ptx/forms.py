"""Hold what can be executed: complete opcode, with every modifier, -> its decoder.

An opcode that is not in the table faults. Nothing is matched by its first letters, so that a modifier nobody thought of
cannot be taken for another instruction.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .faults import Fault
from .parse import Instruction
from .threads import Mask, Threads, reader

Step = Callable[[Threads, Mask], None]
Decode = Callable[[Instruction], Step]

FORMS: dict[str, Decode] = {}


def form(*opcodes: str) -> Callable[[Decode], Decode]:
    """Put a decoder into the table under some opcodes."""

    def register(decode: Decode) -> Decode:
        for opcode in opcodes:
            if opcode in FORMS:
                raise ValueError(f"{opcode} is in the table already")
            FORMS[opcode] = decode
        return decode

    return register


def elementwise(opcode: str, reads: str, writes: str, compute: Callable[..., np.ndarray], more: int = 0) -> None:
    """Put an instruction into the table that computes each thread's result from its own operands.

    `reads` names the PTX types of the operands after the first, `writes` that of the first. Up to `more` further operands
    have the type of the last.
    """
    required = reads.split()

    @form(opcode)
    def decode(instruction: Instruction) -> Step:
        destination, *sources = instruction.operands
        extra = len(sources) - len(required)
        if not 0 <= extra <= more:
            raise Fault(f"{len(required)} sources expected, {instruction}")
        types = required + required[-1:] * extra
        readers = [reader(source, ptx_type) for source, ptx_type in zip(sources, types, strict=True)]

        def step(threads: Threads, mask: Mask) -> None:
            threads.set(destination, compute(*[read(threads) for read in readers]), writes, mask)

        return step


def decode(instruction: Instruction) -> Step:
    """Return what executes an instruction; raise Fault for an unknown opcode or operand."""
    if instruction.opcode not in FORMS:
        raise Fault(f"unknown opcode {instruction.opcode}, {instruction}")
    return FORMS[instruction.opcode](instruction)
