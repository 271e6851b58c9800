"""Multiply small matrices in a warp's registers: mma.sync (PTX ISA, "Matrix Fragments for mma").

With g = lane / 4 and t = lane % 4: register i of the left matrix holds row g + 8 (i % 2), of the right matrix column g, of the
accumulator rows g and g + 8. Sums are exact here (float64, int64) and rounded once; a GPU rounds or truncates in an order
that is not documented, so results are compared with a bound, not bit for bit.
"""

from __future__ import annotations

import numpy as np

from .faults import Fault
from .forms import Step, form
from .numbers import from_bits, to_bits, width_of
from .parse import Instruction, names_in
from .threads import WARP, Mask, Threads

_LANE = np.arange(WARP)
_G, _T = _LANE // 4, _LANE % 4


def unpack(registers: list[np.ndarray], ptx_type: str) -> np.ndarray:
    """Return the numbers of some registers of each warp: [warps, 32, registers, numbers per register]."""
    words = np.stack(registers, axis=-1).reshape(-1, WARP, len(registers))
    parts = np.ascontiguousarray(words)[..., None].view(f"u{width_of(ptx_type)}")
    return from_bits(parts, ptx_type)


def pack(numbers: np.ndarray, ptx_type: str) -> list[np.ndarray]:
    """Undo `unpack`: one uint32 array over all threads for each register."""
    words = np.ascontiguousarray(to_bits(np.ascontiguousarray(numbers), ptx_type)).view(np.uint32)[..., 0]
    return [np.ascontiguousarray(words[:, :, i]).reshape(-1) for i in range(words.shape[2])]


def places(role: str, registers: int, each: int) -> tuple[np.ndarray, np.ndarray]:
    """Return row and column [32, registers, each] of a warp's registers: "left", "right" or "sum"."""
    g, t = _G[:, None, None], _T[:, None, None]
    i, h = np.arange(registers)[None, :, None], np.arange(each)[None, None, :]
    zero = 0 * (g + i + h)
    if role == "left":
        return g + 8 * (i % 2) + zero, each * t + h + 4 * each * (i // 2) + zero
    if role == "right":
        return each * t + h + 4 * each * i + zero, g + zero
    # Of four: two neighbours in row g, two in row g + 8.
    element = each * i + h
    return g + 8 * (element // 2) + zero, 2 * t + element % 2 + zero


def gather(numbers: np.ndarray, where: tuple[np.ndarray, np.ndarray], shape: tuple[int, int], dtype) -> np.ndarray:
    """Put [warps, 32, registers, each] numbers into matrices [warps, *shape]."""
    matrices = np.empty((len(numbers), *shape), dtype)
    matrices[:, where[0], where[1]] = numbers
    return matrices


def product(left: np.ndarray, right: np.ndarray, accumulator: np.ndarray, result: str) -> np.ndarray:
    """Return left @ right + accumulator, float64 or int64, rounded (or saturated) to `result` once."""
    total = left @ right + accumulator
    if result == "s32":
        return np.clip(total, -(1 << 31), (1 << 31) - 1).astype(np.int32)
    return total.astype(np.float16 if result == "f16" else np.float32)


# opcode's types (sum, operand) -> K of the product
_SHAPES = {("f32", "bf16"): 16, ("f32", "f16"): 16, ("f16", "f16"): 16, ("s32", "s8"): 32}


def _opcode(result: str, operand: str, k: int, satfinite: bool) -> str:
    saturate = "satfinite." if satfinite else ""
    return f"mma.sync.aligned.m16n8k{k}.row.col.{saturate}{result}.{operand}.{operand}.{result}"


@form(*(_opcode(*types, k, types[0] == "s32") for types, k in _SHAPES.items()))
def _multiply(instruction: Instruction) -> Step:
    result, operand = instruction.opcode.split(".")[-4:-2]
    k = _SHAPES[result, operand]
    names = [names_in(text) for text in instruction.operands]
    each = 4 // width_of(operand)
    each_sum = 4 // width_of(result)
    if [len(group) for group in names] != [4 // each_sum, 4, 2, 4 // each_sum]:
        raise Fault(f"wrong number of registers, {instruction}")
    exact = np.int64 if result == "s32" else np.float64
    left_at, right_at, sum_at = places("left", 4, each), places("right", 2, each), places("sum", 4 // each_sum, each_sum)

    def step(threads: Threads, mask: Mask) -> None:
        if mask is not None:
            raise Fault("a matrix product that not every thread of the warp executes")
        left, right, accumulator = ([threads.read(name) for name in group] for group in names[1:])
        a = gather(unpack(left, operand), left_at, (16, k), exact)
        b = gather(unpack(right, operand), right_at, (k, 8), exact)
        c = gather(unpack(accumulator, result), sum_at, (16, 8), exact)
        total = product(a, b, c, result)
        for name, bits in zip(names[0], pack(total[:, sum_at[0], sum_at[1]], result), strict=True):
            threads.write(name, bits)

    return step
