"""Turn compiled kernels into rows: what was measured in the machine code, and a predicted time by pipe."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import triton

from flux_kernels.formats import FORMATS
from flux_kernels.kernels.tuning import Tile, fused_tile

from .cards import CARDS, occupancy
from .compile import Compiled, compile_fused

# Tile shapes the library ships, by the number of rows they are chosen for (see kernels/tuning.py).
SHIPPED_M = {"wide": 4608, "medium": 64, "narrow": 16}


@dataclass(frozen=True)
class Row:
    """Hold one line of the report; clocks are predictions per main-loop iteration of one program."""

    kernel: str
    format: str
    capability: int
    triton: str
    dtype: str
    tile: str
    registers: int
    spills: int
    shared_bytes: int
    programs_per_sm: int
    mma: str
    loop_instructions: int
    loop_tensor: int
    loop_fp32: int
    loop_int: int
    loop_convert: int
    loop_shared: int
    loop_async: int
    loop_global: int
    decodes_per_weight: float
    tensor_clocks: int
    issue_clocks: int
    int_clocks: int
    convert_clocks: int


def fused_row(name: str, capability: int, tile: Tile, dtype: str = "bf16") -> Row:
    """Compile the fused GEMM and describe it."""
    built = compile_fused(name, capability, tile, dtype)
    text = f"{tile.block_m}x{tile.block_n}x{tile.tile_k} warps {tile.num_warps} stages {tile.num_stages}"
    return _row("fused_gemm", name, capability, dtype, text, built, tile.block_n * tile.tile_k)


def shipped_rows(names=None, capabilities=None):
    """Yield the rows of the tiles that `fused_tile` chooses, format by format and card by card."""
    for capability in capabilities or CARDS:
        for name in names or FORMATS:
            for m in SHIPPED_M.values():
                yield fused_row(name, capability, fused_tile(FORMATS[name], m, 3072, 3072))


def _row(kernel: str, name: str, capability: int, dtype: str, tile: str, built: Compiled, weights: int) -> Row:
    card = CARDS[capability]
    code, pipes = built.code, built.code.by_pipe()
    total = sum(code.loop.values())
    warps_per_quadrant = built.threads // 128 or 1
    # Every decoded weight passes one float32 -> 16-bit packing instruction (two weights each), whatever way it was decoded.
    decodes = code.count("F2FP") * 2 * built.threads / weights if dtype != "fp32" else float("nan")
    return Row(
        kernel=kernel,
        format=name,
        capability=capability,
        triton=triton.__version__,
        dtype=dtype,
        tile=tile,
        registers=code.registers,
        spills=code.spills,
        shared_bytes=built.shared,
        programs_per_sm=occupancy(card, code.registers, built.shared, built.threads),
        mma=code.mma,
        loop_instructions=total,
        loop_tensor=pipes["tensor"],
        loop_fp32=pipes["fp32"],
        loop_int=pipes["int"],
        loop_convert=pipes["convert"],
        loop_shared=pipes["shared"],
        loop_async=pipes["async"],
        loop_global=pipes["global"],
        decodes_per_weight=round(decodes, 3),
        tensor_clocks=_tensor_clocks(code, card.tensor_clocks) * warps_per_quadrant,
        issue_clocks=total * warps_per_quadrant,
        int_clocks=pipes["int"] * warps_per_quadrant * 128 // card.int_rate,
        convert_clocks=pipes["convert"] * warps_per_quadrant * 128 // card.convert_rate,
    )


def _tensor_clocks(code, per_hmma: int) -> int:
    """Return tensor-core clocks of one warp's share of an iteration, in units of 16x8x16 products."""
    clocks = 0
    for opcode, n in code.loop.items():
        if opcode.startswith("HGMMA"):
            m, columns, k = (int(part) for part in opcode.split(".")[1].split("x"))
            clocks += n * per_hmma * (m * columns * k) // (16 * 8 * 16 * 4)
        elif opcode.startswith("HMMA.16816"):
            clocks += n * per_hmma
    return clocks


def as_dict(row: Row) -> dict:
    """Return the row as a plain dict in column order."""
    return asdict(row)
