"""Turn compiled kernels into rows: what was measured in the machine code, and a predicted time by pipe."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial

import triton

from flux_kernels.formats import FORMATS
from flux_kernels.kernels.tuning import (
    INT8_TILE,
    QUANTIZE_ROWS,
    SCALE_BLOCK,
    UNPACK_ROWS,
    Tile,
    branch_tile,
    fp16_tile,
    fused_tile,
    largest_tile_k,
    small_m_tile,
    split_k_tile,
)

from .cards import CARDS, occupancy
from .compile import (
    Compiled,
    compile_dequantize,
    compile_fp16,
    compile_fused,
    compile_int8,
    compile_quantize_activation,
    compile_row_largest,
    compile_scale_to_fp16,
    compile_small_m,
    compile_split_k,
    compile_unpack_int8,
)


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
    decodes_per_weight: float  # 0 where it is not counted
    tensor_clocks: int
    issue_clocks: int
    int_clocks: int
    convert_clocks: int


def fused_row(name: str, capability: int, tile: Tile, dtype: str = "bf16", branch: bool = False) -> Row:
    """Compile the fused GEMM with a tile and describe it."""
    built = compile_fused(name, capability, tile, dtype, branch=branch)
    return _row(
        "fused_gemm_branch" if branch else "fused_gemm", name, capability, dtype, str(tile), built, tile.block_n * tile.tile_k
    )


def _shipped_fused(m: int, branch: bool = False):
    def row(name: str, capability: int, dtype: str) -> Row:
        fmt, card = FORMATS[name], divmod(capability, 10)
        tile = fused_tile(fmt, m, _N, _K, card)
        return fused_row(name, capability, branch_tile("fused_gemm", fmt, tile, card) if branch else tile, dtype, branch)

    return row


def _split_k(name: str, capability: int, dtype: str) -> Row:
    tile = replace(split_k_tile(FORMATS[name], 512, _N, _K, divmod(capability, 10)), splits=SPLITS)
    built = compile_split_k(name, capability, tile, dtype)
    return _row("split_k", name, capability, dtype, str(tile), built, tile.block_n * tile.tile_k)


def _shipped_fp16(kernel: str, branch: bool):
    def row(name: str, capability: int, dtype: str) -> Row:
        fmt, card = FORMATS[name], divmod(capability, 10)
        tile = fp16_tile(fmt, _K, card)
        tile = branch_tile("fp16_gemm", fmt, tile, card) if branch else tile
        built = compile_fp16(name, capability, tile, dtype, branch=branch)
        return _row(kernel, name, capability, dtype, str(tile), built, tile.block_n * tile.tile_k)

    return row


def _shipped_int8(kernel: str, **options: bool):
    def row(name: str, capability: int, dtype: str) -> Row:
        built = compile_int8(capability, INT8_TILE, dtype, **options)
        return _row(kernel, "int8", capability, dtype, str(INT8_TILE), built, None)

    return row


def _shipped_small_m(name: str, capability: int, dtype: str) -> Row:
    tile = small_m_tile(FORMATS[name], _K)
    built = compile_small_m(name, capability, tile, dtype)
    return _row("small_m", name, capability, dtype, str(tile), built, None)


def _shipped_unpack(kernel: str, compiler):
    def row(name: str, capability: int, dtype: str) -> Row:
        text = f"{UNPACK_ROWS}x{largest_tile_k(FORMATS[name], _K)}"
        return _row(kernel, name, capability, dtype, text, compiler(name, capability, dtype), None)

    return row


def _shipped_activation(kernel: str, compiler, block: int):
    def row(name: str, capability: int, dtype: str) -> Row:
        return _row(kernel, "activation", capability, dtype, str(block), compiler(capability, dtype), None)

    return row


_N = _K = 3072
SPLITS = 4  # what the report compiles split-K with; tuning also tries others
# What the library launches, by the name the command line takes.
SHIPPED = {
    "wide": _shipped_fused(4608),
    "medium": _shipped_fused(64),
    "narrow": _shipped_fused(16),
    "wide_branch": _shipped_fused(4608, branch=True),
    "split_k": _split_k,
    "small_m": _shipped_small_m,
    "fp16": _shipped_fp16("fp16_gemm", branch=False),
    "fp16_branch": _shipped_fp16("fp16_gemm_branch", branch=True),
    "int8": _shipped_int8("int8_gemm"),
    "int8_branch": _shipped_int8("int8_gemm_branch", branch=True),
    "int8_rows": _shipped_int8("int8_gemm_rows", row_scales=True),
    "int8_rows_branch": _shipped_int8("int8_gemm_rows_branch", row_scales=True, branch=True),
    "quantize_activation": _shipped_activation("quantize_activation", compile_quantize_activation, QUANTIZE_ROWS),
    "scale_to_fp16": _shipped_activation("scale_to_fp16", compile_scale_to_fp16, SCALE_BLOCK),
    "dequantize": _shipped_unpack("dequantize", compile_dequantize),
    "unpack_int8": _shipped_unpack("unpack_int8", compile_unpack_int8),
    "unpack_int8_rows": _shipped_unpack("unpack_int8_rows", partial(compile_unpack_int8, row_scales=True)),
    "row_largest": _shipped_unpack("row_largest", compile_row_largest),
}
FORMAT_FREE = frozenset(
    {"int8", "int8_branch", "int8_rows", "int8_rows_branch", "quantize_activation", "scale_to_fp16"}
)  # kernels that no format is compiled into


def _row(kernel: str, name: str, capability: int, dtype: str, tile: str, built: Compiled, weights: int | None) -> Row:
    card = CARDS[capability]
    code, pipes = built.code, built.code.by_pipe()
    total = sum(code.loop.values())
    warps_per_quadrant = built.threads // 128 or 1
    # Every decoded weight passes one float32 -> 16-bit packing instruction (two weights each), whatever way it was decoded.
    # Where a format is one product of two numbers that fit fp16 (Q8_0), newer LLVMs multiply in fp16 at once, with the same bits.
    counted = weights is not None and dtype != "fp32"
    decodes = (code.count("F2FP") or code.count("HMUL2")) * 2 * built.threads / weights if counted else 0.0
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
        elif opcode.startswith("HMMA.16816.F16"):
            clocks += n * max(per_hmma // 2, 8)  # GeForce runs fp16 accumulation at twice the rate
        elif opcode.startswith("HMMA.16816"):
            clocks += n * per_hmma
        elif opcode.startswith("IMMA.16832"):
            clocks += n * max(per_hmma // 2, 4)  # twice the K at four times (GeForce) or twice (A100) the bf16 rate
        elif opcode.startswith("IGMMA"):
            m, columns, k = (int(part) for part in opcode.split(".")[1].split("x"))
            clocks += n * per_hmma * (m * columns * k) // (16 * 8 * 16 * 4 * 2)
    return clocks


def as_dict(row: Row) -> dict:
    """Return the row as a plain dict in column order."""
    return asdict(row)
