"""mov, selp, ld.param, shfl and redux: values that move between registers and threads.

A mov alone may read a register that nobody wrote: LLVM leaves undefined what nobody looks at, such as the second half of a pair
of which the first is reduced. It gets poison there; every other instruction faults.
"""

from __future__ import annotations

import numpy as np

from .faults import Fault
from .forms import Step, elementwise, form
from .memory import UNSIGNED
from .numbers import width_of
from .parse import Instruction, names_in
from .threads import WARP, Mask, Threads, reader

_WORDS = tuple(f"{kind}{size}" for kind in "bsu" for size in (16, 32, 64)) + ("f32",)


@form(*(f"mov.{t}" for t in _WORDS), "mov.pred")
def _move(instruction: Instruction) -> Step:
    """Copy a register, pack {a, b} into it or split it into {a, b}, the first in the low bits."""
    destination, source = instruction.operands
    ptx_type = instruction.opcode.removeprefix("mov.")
    if source.startswith("{"):
        return _pack(destination, names_in(source), ptx_type)
    if destination.startswith("{"):
        return _split(names_in(destination), source, ptx_type)
    read = reader(source, ptx_type)
    return lambda threads, mask: threads.set(destination, read(threads), ptx_type, mask)


def _pack(destination: str, sources: list[str], ptx_type: str) -> Step:
    width = width_of(ptx_type)
    part = width // len(sources)
    readers = [reader(source, f"b{8 * part}") for source in sources]

    def step(threads: Threads, mask: Mask) -> None:
        for source in sources:
            threads.define(source, UNSIGNED[part])
        parts = np.stack([threads.spread(read(threads)) for read in readers], axis=-1)
        threads.write(destination, parts.view(UNSIGNED[width])[:, 0], mask)

    return step


def _split(destinations: list[str], source: str, ptx_type: str) -> Step:
    read = reader(source, ptx_type)
    part = UNSIGNED[width_of(ptx_type) // len(destinations)]
    pieces = {
        name: lambda value, index=index: value[:, None].view(part)[:, index].copy()
        for index, name in enumerate(destinations)
        if name != "_"
    }

    def step(threads: Threads, mask: Mask) -> None:
        if mask is None and threads.move_in_flight(source, pieces):
            return
        parts = threads.spread(read(threads))[:, None].view(part)
        for index, destination in enumerate(destinations):
            if destination != "_":
                threads.write(destination, parts[:, index].copy(), mask)

    return step


for _type in (*_WORDS, "f16", "f64"):
    _bits = f"b{8 * width_of(_type)}"
    elementwise(f"selp.{_type}", f"{_bits} {_bits} pred", _bits, lambda a, b, choice: np.where(choice, a, b))


@form(*(f"ld.param.{kind}{size}" for kind in "bsuf" for size in (16, 32, 64)))
def _load_parameter(instruction: Instruction) -> Step:
    destination, source = instruction.operands
    name = source.strip("[] ")
    width = width_of(instruction.opcode.split(".")[-1])

    def step(threads: Threads, mask: Mask) -> None:
        if name not in threads.parameters:
            raise Fault(f"no such parameter {name}")
        value = threads.parameters[name]
        if value.dtype.itemsize != width:
            raise Fault(f"parameter {name} has {value.dtype.itemsize} bytes, {width} are loaded")
        threads.write(destination, threads.spread(value), mask)

    return step


@form("shfl.sync.bfly.b32", "shfl.sync.idx.b32", "shfl.sync.up.b32", "shfl.sync.down.b32")
def _shuffle(instruction: Instruction) -> Step:
    """Take another lane's register; the form with a predicate and segments of a warp are not known."""
    destination, source, lane, clamp, members = instruction.operands
    mode = instruction.opcode.split(".")[2]
    if "|" in destination or (int(clamp, 0), int(members, 0) & 0xFFFFFFFF) != (0 if mode == "up" else 31, 0xFFFFFFFF):
        raise Fault(f"only whole warps shuffle, {instruction}")
    read, read_lane = reader(source, "b32"), reader(lane, "u32")

    def step(threads: Threads, mask: Mask) -> None:
        if mask is not None:
            raise Fault("a shuffle that not every thread executes")
        own = threads.index % WARP
        other = {
            "bfly": lambda amount: own ^ amount,
            "idx": lambda amount: amount,
            "up": lambda amount: np.where(own - amount >= 0, own - amount, own),
            "down": lambda amount: np.where(own + amount < WARP, own + amount, own),
        }[mode](read_lane(threads).astype(np.int64) & 31)
        place = np.arange(threads.count) - own + other
        threads.write(destination, threads.spread(read(threads))[place])

    return step


@form("redux.sync.max.s32")
def _largest_of_warp(instruction: Instruction) -> Step:
    """Give every lane the largest of its warp."""
    destination, source, members = instruction.operands
    read, read_members = reader(source, "s32"), reader(members, "u32")

    def step(threads: Threads, mask: Mask) -> None:
        if mask is not None or (threads.spread(read_members(threads)) != 0xFFFFFFFF).any():
            raise Fault(f"only whole warps are reduced, {instruction}")
        largest = threads.spread(read(threads)).reshape(-1, WARP).max(1)
        threads.write(destination, np.repeat(largest, WARP), None)

    return step
