"""Multiply as a warpgroup (128 threads) of sm_90 does: wgmma runs on until somebody waits for it.

The left matrix comes from registers or, like the right matrix, from shared memory through a descriptor. From its start to its
wait a product owns its registers: its accumulator cannot be read or written (another product may go on adding to it), its left
registers cannot be written, and the shared memory it reads must stay as it is. Before the start, registers written since the
last wgmma.fence and shared memory written since the last fence.proxy.async must not be used.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .descriptors import row_pieces
from .faults import Fault
from .forms import Step, form
from .numbers import from_bits, width_of
from .parse import Instruction, names_in
from .products import gather, pack, places, product, unpack
from .threads import WARP, Mask, Reader, Threads, reader

GROUP = 128  # threads
_ROWS = 64  # of a product
_PIECE = 16  # bytes
_SHAPES = {("f32", "bf16"): 16, ("f32", "f16"): 16, ("f16", "f16"): 16, ("s32", "s8"): 32}  # (sum, operand) -> K


@dataclass(frozen=True)
class _Tile:
    """Hold what a product read from shared memory, and where, to see at its end that nobody overwrote it."""

    addresses: np.ndarray
    words: np.ndarray


@dataclass(frozen=True)
class Product:
    """Hold a product under way: what its accumulator will hold, the registers and memory it reads."""

    results: dict[str, np.ndarray]
    sources: tuple[str, ...]
    tiles: tuple[_Tile, ...]
    label: str


def _opcodes() -> list[str]:
    return [
        f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.{result}.{operand}.{operand}"
        for (result, operand), k in _SHAPES.items()
        for n in range(8, 257, 8)
    ]


@form(*_opcodes())
def _multiply(instruction: Instruction) -> Step:
    shape, result, operand = instruction.opcode.split(".")[4:7]
    columns, k = (int(part) for part in shape[4:].split("k"))
    sums, left, right, goes_on, *modifiers = instruction.operands
    _refuse_modifiers(instruction, modifiers, left.startswith("{"), operand)
    names, left_names = names_in(sums), names_in(left) if left.startswith("{") else []
    each, each_sum = 4 // width_of(operand), 4 // width_of(result)
    if len(names) != columns // 2 // each_sum or left_names and len(left_names) != 4:
        raise Fault(f"wrong number of registers, {instruction}")
    read_left, read_right = None if left_names else reader(left, "b64"), reader(right, "b64")
    read_goes_on = reader(goes_on, "pred")
    exact = np.int64 if result == "s32" else np.float64
    left_at, sum_at = places("left", 4, each), _sum_places(columns, each_sum)

    def step(threads: Threads, mask: Mask) -> None:
        if mask is not None or threads.count % GROUP:
            raise Fault("a product that not every thread of the warpgroup executes")
        _refuse_unfenced(threads, [*names, *left_names])
        tiles = []
        if left_names:
            rows = gather(unpack([threads.read(name) for name in left_names], operand), left_at, (16, k), exact)
        else:
            rows = _from_shared(threads, read_left, _ROWS, k, operand, tiles).reshape(-1, 16, k)
        by_column = _from_shared(threads, read_right, columns, k, operand, tiles)
        before = _accumulator(threads, names, read_goes_on, result, sum_at, columns, exact)
        right_matrix = by_column.transpose(0, 2, 1).repeat(GROUP // WARP, axis=0).astype(exact)
        total = product(rows.astype(exact), right_matrix, before, result)
        values = dict(zip(names, pack(total[:, sum_at[0], sum_at[1]], result), strict=True))
        _start(threads, Product(values, tuple(left_names), tuple(tiles), f"the product of line {instruction.line}"))

    return step


def _refuse_modifiers(instruction: Instruction, modifiers: list[str], left_in_registers: bool, operand: str) -> None:
    """Know only products without negation (1, 1) of K-major operands (0 for each in shared memory)."""
    known = [] if operand == "s8" else ["1", "1", *["0"] * (1 if left_in_registers else 2)]
    if modifiers != known:
        raise Fault(f"unknown modifiers {modifiers}, {instruction}")


def _sum_places(columns: int, each: int) -> tuple[np.ndarray, np.ndarray]:
    """Return row and column of the accumulator's registers in 16 rows: groups of eight columns in turn."""
    row, column = places("sum", 4 // each, each)
    groups = np.arange(columns // 8)
    rows = np.tile(row, (1, len(groups), 1))
    return rows, np.tile(column, (1, len(groups), 1)) + 8 * np.repeat(groups, 4 // each)[None, :, None]


def _accumulator(threads: Threads, names, read_goes_on: Reader, result: str, at, columns: int, exact) -> np.ndarray:
    goes_on = read_goes_on(threads)
    if goes_on.any() != goes_on.all():
        raise Fault("the threads of a product disagree on whether it adds to the accumulator")
    if not goes_on.all():
        return np.zeros((threads.count // WARP, 16, columns), exact)
    bits = [threads.in_flight[name] if name in threads.in_flight else threads.read(name) for name in names]
    return gather(unpack(bits, result), at, (16, columns), exact)


def _from_shared(threads: Threads, read: Reader, rows: int, k: int, operand: str, tiles: list[_Tile]) -> np.ndarray:
    """Return the matrices [warpgroups, rows, k] that a descriptor per warpgroup names, after every check."""
    descriptors = threads.spread(read(threads)).reshape(-1, GROUP)
    if (descriptors != descriptors[:, :1]).any():
        raise Fault("the threads of a warpgroup give different matrix descriptors")
    matrices = []
    for group, descriptor in enumerate(descriptors[:, 0]):
        pieces = row_pieces(int(descriptor), rows, k * width_of(operand)).reshape(-1)
        words = threads.shared.load(pieces, 4, _PIECE // 4)
        warps = np.full(len(pieces), threads.warp[group * GROUP])
        threads.races.read_by_warpgroup(pieces, _PIECE, warps)
        tiles.append(_Tile(pieces, words))
        matrices.append(from_bits(words.view(f"u{width_of(operand)}"), operand).reshape(rows, k))
    return np.stack(matrices)


def _refuse_unfenced(threads: Threads, names: list[str]) -> None:
    for name in names:
        if name not in threads.in_flight and threads.registers.get(name) is not threads.fenced.get(name):
            raise Fault(f"uses {name}, which was written after the last wgmma.fence")


def _start(threads: Threads, started: Product) -> None:
    threads.products[-1].append(started)
    for name, values in started.results.items():
        threads.registers.pop(name, None)
        threads.in_flight[name] = values
    _reserve(threads)


def _reserve(threads: Threads) -> None:
    """Note which registers belong to products under way."""
    threads.reserved = {
        name: under_way.label
        for group in threads.products
        for under_way in group
        for name in (*under_way.sources, *under_way.results)
    }


@form("wgmma.fence.sync.aligned")
def _fence(instruction: Instruction) -> Step:
    def step(threads: Threads, mask: Mask) -> None:
        threads.fenced = dict(threads.registers)

    return step


@form("fence.proxy.async.shared::cta", "fence.proxy.async")
def _fence_memory(instruction: Instruction) -> Step:
    return lambda threads, mask: threads.races.fence(threads.warp)


@form("wgmma.commit_group.sync.aligned")
def _commit(instruction: Instruction) -> Step:
    return lambda threads, mask: threads.products.append([])


@form("wgmma.wait_group.sync.aligned")
def _wait(instruction: Instruction) -> Step:
    pending = int(instruction.operands[0], 0)

    def step(threads: Threads, mask: Mask) -> None:
        landed = []
        while len(threads.products) - 1 > pending:
            landed += threads.products.pop(0)
        for ended in landed:
            _finish(threads, ended)
        _reserve(threads)
        # What products delivered is in order with the next products.
        threads.fenced = dict(threads.registers)

    return step


def _finish(threads: Threads, ended: Product) -> None:
    """Deliver a product's results, unless a later product goes on with them."""
    for tile in ended.tiles:
        if not np.array_equal(threads.shared.load(tile.addresses, 4, _PIECE // 4), tile.words):
            raise Fault(f"shared memory that {ended.label} was reading has been overwritten")
    for name, values in ended.results.items():
        if threads.in_flight.get(name) is values:
            threads.registers[name] = threads.in_flight.pop(name)
