"""Turn compiled kernels into rows: what is in the machine code, and a predicted time by pipe."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import triton

from .cards import CARDS, CONVERT_RATES, LANES, QUADRANTS, Card, occupancy, tensor_clocks
from .compile import Compiled, compile_launch
from .launches import Launch
from .sass import PIPES, MachineCode, stem

KEY = ("kernel", "format", "capability", "triton", "dtype", "k", "tile")  # what tells rows apart
# Packed bytes to tensor cores in one loop.
FUSED_KERNELS = tuple(f"{kernel}{branch}" for kernel in ("fused_gemm", "split_k", "fp16_gemm") for branch in ("", "_branch"))


@dataclass(frozen=True)
class Row:
    """Hold one line of the report; clocks are predictions per main-loop iteration of one program.

    The loop of a kernel without loops is the whole kernel. `mma_waits` counts where it waits for all products of a warpgroup,
    `instructions_per_weight` are those of all its threads per weight it decodes; `convert_clocks_16` and `_64` are for two rates
    of conversion. `code` is a hash of the kernel's source: where it is another than now, the row is out of date.
    """

    kernel: str
    format: str
    capability: int
    triton: str
    dtype: str
    k: int
    tile: str
    registers: int
    spills: int
    shared_bytes: int
    programs_per_sm: int
    mma: str
    mma_waits: int
    loop_instructions: int
    loop_tensor: int
    loop_fp32: int
    loop_int: int
    loop_convert: int
    loop_shared: int
    loop_async: int
    loop_global: int
    decodes_per_weight: float  # 0 where it is not counted
    instructions_per_weight: float  # 0 where it is not counted
    tensor_clocks: int
    issue_clocks: int
    int_clocks: int
    convert_clocks_16: int
    convert_clocks_64: int
    code: str


def key(row: dict) -> tuple[str, ...]:
    """Return what identifies a row from one run of the report to the next."""
    return tuple(str(row[name]) for name in KEY)


def is_looped(row: Row) -> bool:
    """Tell whether a kernel goes through K in steps: rows of one step (K of 64) leave no loop."""
    return int(row.tile.split()[0].split("x")[-1]) < row.k


def launch_key(launch: Launch, capability: int, version: str = triton.__version__) -> tuple[str, ...]:
    """Return the key of the row that a launch has."""
    return tuple(map(str, (launch.name, launch.format, capability, version, launch.dtype, launch.k, launch.tile)))


def row_of(launch: Launch, capability: int) -> dict:
    """Compile a launch for a card and describe it, as a plain dict in column order."""
    return asdict(_row(launch, capability, compile_launch(launch, capability)))


def _row(launch: Launch, capability: int, built: Compiled) -> Row:
    card, code, pipes = CARDS[capability], built.code, built.code.by_pipe()
    total = sum(code.loop.values())
    programs = occupancy(card, code.registers, built.shared, built.threads)
    # Of a quadrant. Programs of two warps share a multiprocessor's quadrants where more than one program fits.
    warps = max(built.threads / (LANES * QUADRANTS), min(1, 1 / max(programs, 1)))
    convert = pipes["convert"] * warps * LANES * QUADRANTS
    return Row(
        **dict(zip(KEY, launch_key(launch, capability), strict=True)) | dict(capability=capability, k=launch.k),
        registers=code.registers,
        spills=code.spills,
        shared_bytes=built.shared,
        programs_per_sm=programs,
        mma=code.mma,
        mma_waits=code.mma_waits,
        loop_instructions=total,
        **{f"loop_{pipe}": pipes[pipe] for pipe in ("tensor", "fp32", "int", "convert", "shared", "async", "global")},
        decodes_per_weight=_decodes_per_weight(launch, built),
        instructions_per_weight=_instructions_per_weight(launch, built),
        tensor_clocks=round(_tensor_clocks(code, card) * warps),
        issue_clocks=round(total * warps),
        int_clocks=round(pipes["int"] * warps * LANES * QUADRANTS / card.int_rate),
        **{f"convert_clocks_{rate}": round(convert / rate) for rate in CONVERT_RATES},
        code=launch.code,
    )


def _decodes_per_weight(launch: Launch, built: Compiled) -> float:
    """Count how often a weight is decoded: every one passes one packing to 16 bits, two an instruction.

    Where a format is one product of two numbers that fit fp16 (Q8_0), newer LLVMs multiply in fp16 at once, with the same bits.
    """
    if launch.name not in FUSED_KERNELS or (launch.dtype == "fp32" and "fp16" not in launch.name):
        return 0.0
    return round((built.code.count("F2FP") or built.code.count("HMUL2")) * 2 * built.threads / launch.weights, 3)


def _instructions_per_weight(launch: Launch, built: Compiled) -> float:
    if not launch.weights:
        return 0.0
    return round(sum(built.code.loop.values()) * built.threads / launch.weights, 2)


def _tensor_clocks(code: MachineCode, card: Card) -> float:
    """Return the clocks that one warp's products of an iteration keep its quadrant's tensor core busy."""
    return sum(n * tensor_clocks(opcode, card) for opcode, n in code.loop.items() if stem(opcode) in PIPES["tensor"])
