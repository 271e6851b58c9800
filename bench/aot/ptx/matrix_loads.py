"""Move 8 x 8 matrices of 16 bits between shared memory and a warp's registers: ldmatrix, stmatrix.

Lanes 8 i to 8 i + 7 hold the addresses of matrix i's rows of 16 bytes. Lane l holds row l / 4, columns 2 (l % 4) and the next
one, of each matrix, or with .trans the same of the transposed matrix (PTX ISA, "Warp Level Matrix Load/Store Instruction").
"""

from __future__ import annotations

import numpy as np

from .accesses import load_shared, store_shared
from .faults import Fault
from .forms import Step, form
from .parse import Instruction, names_in
from .threads import WARP, Mask, Threads, address_reader

_COUNTS = (1, 2, 4)
_LANE = np.arange(WARP)
_ROW, _COLUMN = _LANE // 4, 2 * (_LANE % 4)


def _opcodes(name: str) -> list[str]:
    return [f"{name}.sync.aligned.m8n8.x{n}{trans}.shared.b16" for n in _COUNTS for trans in ("", ".trans")]


def _row_addresses(addresses: np.ndarray, matrix: int) -> np.ndarray:
    return addresses.reshape(-1, WARP)[:, 8 * matrix : 8 * matrix + 8].reshape(-1)


def _row_warps(threads: Threads) -> np.ndarray:
    return np.repeat(threads.warp[::WARP], 8)


def _whole_warps(mask: Mask) -> None:
    if mask is not None:
        raise Fault("a matrix access that not every thread of the warp executes")


@form(*_opcodes("ldmatrix"))
def _load(instruction: Instruction) -> Step:
    destinations, transposed = _shape(instruction, names_in(instruction.operands[0]))
    address = address_reader(instruction.operands[1])

    def step(threads: Threads, mask: Mask) -> None:
        _whole_warps(mask)
        addresses, warps = address(threads), _row_warps(threads)
        for matrix, name in enumerate(destinations):
            rows = load_shared(threads, _row_addresses(addresses, matrix), 2, 8, warps, instruction.opcode)
            elements = rows.reshape(-1, 8, 8)
            if transposed:
                elements = elements.transpose(0, 2, 1)
            pairs = elements[:, _ROW[:, None], _COLUMN[:, None] + np.arange(2)]
            threads.write(name, np.ascontiguousarray(pairs).view(np.uint32).reshape(-1))

    return step


@form(*_opcodes("stmatrix"))
def _store(instruction: Instruction) -> Step:
    sources, transposed = _shape(instruction, names_in(instruction.operands[1]))
    address = address_reader(instruction.operands[0])

    def step(threads: Threads, mask: Mask) -> None:
        _whole_warps(mask)
        addresses, warps = address(threads), _row_warps(threads)
        for matrix, name in enumerate(sources):
            pairs = np.ascontiguousarray(threads.read(name)).view(np.uint16).reshape(-1, WARP, 2)
            elements = np.empty((len(pairs), 8, 8), np.uint16)
            elements[:, _ROW[:, None], _COLUMN[:, None] + np.arange(2)] = pairs
            if transposed:
                elements = elements.transpose(0, 2, 1)
            rows = np.ascontiguousarray(elements).reshape(-1, 8)
            store_shared(threads, _row_addresses(addresses, matrix), rows, 2, warps, instruction.opcode)

    return step


def _shape(instruction: Instruction, registers: list[str]) -> tuple[list[str], bool]:
    parts = instruction.opcode.split(".")
    if len(registers) != int(parts[4][1:]):
        raise Fault(f"{parts[4]} needs {parts[4][1:]} registers, {instruction}")
    return registers, "trans" in parts
