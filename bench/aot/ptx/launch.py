"""Launch a kernel on arrays placed between guard bytes, run the grid, copy back what was written."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .block import Executable, Launch, run_block
from .faults import Fault
from .floats import check_division_error
from .memory import Memory
from .numbers import width_of
from .threads import Counts

_GUARD = 4096  # bytes around each buffer that nothing may touch
# Blocks along y and z (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability")
_LONGEST_AXIS = 65535
_ALIGNMENT = 512  # bytes, of what a GPU's allocator returns


@dataclass
class Buffer:
    """Hold one allocation: its bytes, which of them a kernel may touch, and which were written so far.

    `data` is a contiguous array whose bytes are copied back after a launch. With allowed = None all may be touched.
    """

    data: np.ndarray
    written: np.ndarray | None = None  # bool per byte; None: all
    allowed: np.ndarray | None = None
    address: int = field(default=0, init=False)

    @classmethod
    def empty(cls, shape, dtype) -> Buffer:
        """Return an allocation that nobody wrote yet."""
        data = np.zeros(shape, dtype)
        return cls(data, np.zeros(data.nbytes, bool))

    @property
    def raw(self) -> np.ndarray:
        """Return the bytes, uint8."""
        return self.data.reshape(-1).view(np.uint8)

    def result(self) -> np.ndarray:
        """Return the array; raise Fault where an element was never written."""
        if self.written is not None and not self.written.all():
            missing = int((~self.written).sum()) // self.data.itemsize
            raise Fault(f"{missing} of {self.data.size} elements of an output were never written")
        return self.data


@dataclass(frozen=True)
class Pointer:
    """Point into a buffer, `offset` bytes behind its beginning."""

    buffer: Buffer
    offset: int = 0


def launch(
    code: Executable,
    grid: tuple[int, ...],
    arguments: list,
    shared_bytes: int,
    order: np.random.Generator | None = None,
    division_error: int = 0,
    count_banks: bool = False,
    copies_need_fence: bool = True,
) -> Counts:
    """Run a grid of blocks, block after block, and update the buffers in place.

    Args:
        code: the decoded kernel.
        grid: blocks along x, and optionally y and z.
        arguments: in the order of the kernel's parameters: a Buffer, a Pointer, or an integer. Parameters without one (Triton's
            two scratch pointers) are null.
        shared_bytes: of shared memory a block has.
        order: draws the order of warps between barriers; None runs all threads of a block in step.
        division_error: units in the last place by which div.full.f32 is off, -2 to 2.
        count_banks: whether shared-memory wavefronts are counted.
        copies_need_fence: whether wgmma faults on what cp.async wrote and no fence.proxy.async followed.

    Returns:
        What ran.

    Raises:
        Fault: where a GPU would fault, race, or compute with what nobody wrote.
    """
    check_division_error(division_error)
    pointers = [
        argument if isinstance(argument, Pointer) else Pointer(argument)
        for argument in arguments
        if isinstance(argument, Buffer | Pointer)
    ]
    buffers = list({id(pointer.buffer): pointer.buffer for pointer in pointers}.values())
    memory = _place(buffers)
    counts = Counts(bank_conflicts={} if count_banks else None)
    whole = Launch(code, _bind(code, arguments), shared_bytes, memory, counts, division_error, copies_need_fence)
    across, down, deep = (*grid, 1, 1)[:3]
    if across >= 1 << 31 or max(down, deep) > _LONGEST_AXIS:
        raise Fault(f"a grid of {grid} blocks: a GPU takes {_LONGEST_AXIS} along y and z")
    with np.errstate(all="ignore"):
        for z in range(deep):
            for y in range(down):
                for x in range(across):
                    run_block(whole, (x, y, z), order)
    for buffer in buffers:
        _take_back(buffer, memory)
    return counts


def _place(buffers: list[Buffer]) -> Memory:
    """Give each buffer an address and return global memory with their bytes in it."""
    top = _ALIGNMENT * 8
    for buffer in buffers:
        buffer.address = top + _GUARD
        top = -(-(buffer.address + buffer.raw.size + _GUARD) // _ALIGNMENT) * _ALIGNMENT
    memory = Memory(top)
    for buffer in buffers:
        start, stop = buffer.address, buffer.address + buffer.raw.size
        memory.bytes[start:stop] = buffer.raw
        memory.allow(start, stop, buffer.allowed)
        memory.mark_written(start, stop, True if buffer.written is None else buffer.written)
    return memory


def _take_back(buffer: Buffer, memory: Memory) -> None:
    start, stop = buffer.address, buffer.address + buffer.raw.size
    written = memory.is_written(start, stop)
    buffer.raw[written] = memory.bytes[start:stop][written]
    buffer.written = None if written.all() else written.copy()


def _bind(code: Executable, arguments: list) -> dict[str, np.ndarray]:
    """Return the value of every parameter as a scalar of its width."""
    parameters = code.program.parameters
    if len(arguments) > len(parameters):
        raise Fault(f"{len(arguments)} arguments for {len(parameters)} parameters")
    values = [*arguments, *[0] * (len(parameters) - len(arguments))]
    return {name: _value(value, parameters[name]) for name, value in zip(parameters, values, strict=True)}


def _value(value, ptx_type: str) -> np.ndarray:
    if isinstance(value, Buffer):
        value = Pointer(value)
    if isinstance(value, Pointer):
        value = value.buffer.address + value.offset
    width = width_of(ptx_type)
    return np.array(int(value) & (1 << 8 * width) - 1, f"u{width}")
