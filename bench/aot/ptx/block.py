"""Run one block: all its threads in step, or warp by warp in random order from barrier to barrier."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from . import accesses, async_copies, conversions, floats, integers, matrix_loads, moves, products, wgmma  # noqa: F401  (fill the table)
from .faults import Fault
from .forms import decode
from .memory import Memory
from .parse import Instruction, Program
from .races import Races
from .threads import Counts, Mask, Threads

_BARRIERS = ("bar.sync", "barrier.sync", "barrier.sync.aligned")
_NOTHING = ("bar.warp.sync", "membar.cta", "fence.acq_rel.cta")  # warps run in step, memory is coherent
_LONGEST = 20_000_000  # instructions, after which a loop counts as endless


@dataclass(frozen=True)
class _Decoded:
    instruction: Instruction
    kind: str  # "step", "branch", "barrier", "exit" or "nothing"
    step: Callable[[Threads, Mask], None] | None = None
    target: int = -1


class Executable:
    """Hold a program whose instructions are decoded; raise Fault for the first that is not known."""

    def __init__(self, program: Program):
        self.program = program
        self.code = [_decoded(program, instruction) for instruction in program.code]
        in_groups = any("wgmma" in instruction.opcode for instruction in program.code)
        self.unit = 128 if in_groups else 32  # threads that must run in step


def _decoded(program: Program, instruction: Instruction) -> _Decoded:
    opcode = instruction.opcode
    if opcode in ("bra", "bra.uni"):
        return _Decoded(instruction, "branch", target=program.labels[instruction.operands[0]])
    if opcode in ("ret", "exit"):
        return _Decoded(instruction, "exit")
    if opcode in _BARRIERS:
        if instruction.operands != ("0",):
            raise Fault(f"only barrier 0 of all threads is known, {instruction}")
        return _Decoded(instruction, "barrier")
    if opcode in _NOTHING:
        return _Decoded(instruction, "nothing")
    return _Decoded(instruction, "step", decode(instruction))


@dataclass(frozen=True)
class Launch:
    """Hold what a launch's blocks share: code, parameters, shared bytes, global memory, div.full's error."""

    code: Executable
    parameters: dict[str, np.ndarray]
    shared_bytes: int
    memory: Memory
    counts: Counts
    division_error: int = 0
    copies_need_fence: bool = True


def run_block(launch: Launch, block: tuple[int, int, int], order: np.random.Generator | None = None) -> None:
    """Run one block, in step, or with `order` warp by warp in the order it draws anew at each barrier."""
    shared = Memory(launch.shared_bytes, inside=True)
    races = Races(launch.shared_bytes, launch.copies_need_fence)
    threads = launch.code.program.threads
    unit = threads if order is None else min(launch.code.unit, threads)
    running = [_start(launch, block, first, unit, shared, races) for first in range(0, threads, unit)]
    while running:
        picks = range(len(running)) if order is None else order.permutation(len(running))
        arrived = [int(pick) for pick in picks if next(running[pick], None) is not None]
        if arrived and len(arrived) != len(running):
            raise Fault(f"only {len(arrived)} of {len(running)} groups of {unit} threads reach a barrier")
        races.pass_barrier()
        running = [running[pick] for pick in sorted(arrived)]


def _start(launch: Launch, block: tuple, first: int, count: int, shared: Memory, races: Races) -> Iterator[str]:
    threads = Threads(first, count, block, launch.parameters, shared, races, launch.memory, launch.counts)
    threads.division_error = launch.division_error
    return _run(launch, threads)


def _run(launch: Launch, threads: Threads) -> Iterator[str]:
    """Execute until the exit; yield at every barrier."""
    code, opcodes, at, done = launch.code.code, launch.counts.opcodes, 0, 0
    while at < len(code):
        decoded = code[at]
        done += 1
        if done > _LONGEST:
            raise Fault(f"does not end, {decoded.instruction}")
        opcodes[decoded.instruction.opcode] = opcodes.get(decoded.instruction.opcode, 0) + 1
        try:
            mask = _mask(threads, decoded.instruction)
            if decoded.kind == "step":
                decoded.step(threads, mask)
            elif decoded.kind != "nothing" and mask is not None and mask.any():
                raise Fault("divergent: only a part of the threads takes this way")
        except Fault as fault:
            raise Fault(f"{fault}, {decoded.instruction}") from None
        at += 1
        if decoded.kind == "step" or mask is not None:
            continue
        if decoded.kind == "branch":
            at = decoded.target
        elif decoded.kind == "exit":
            return
        elif decoded.kind == "barrier":
            yield "barrier"
    raise Fault("runs past the end of the kernel")


def _mask(threads: Threads, instruction: Instruction) -> Mask:
    """Return which threads execute an instruction, None for all."""
    if instruction.guard is None:
        return None
    values = threads.read(instruction.guard)
    values = ~values if instruction.guard_negated else values
    return None if values.all() else values
