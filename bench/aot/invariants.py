"""Decide what CI refuses: properties that compiled code must have, and growth past the record.

Predicted clocks are no criterion: a kernel that decodes every weight four times still looks perfect in them.
"""

from __future__ import annotations

from flux_kernels.formats import FORMATS

from .cards import CARDS
from .report import FUSED_KERNELS, Row, is_looped

TENSOR_CORE_KERNELS = (
    *FUSED_KERNELS,
    "small_m_codes",
    "small_m_codes_branch",
    *(f"int8_gemm{kind}" for kind in ("", "_branch", "_rows", "_rows_branch")),
)
# Weights of +d and -d as fp16: the compiler flips a sign, no rounding is left to count. fp16_gemm multiplies fp16 whatever x is.
UNCOUNTED = frozenset({("Q1_0", "fp16")})
# Main-loop instructions may grow by this factor before the record must be changed on purpose
RATCHET = 1.05
# Instructions per decoded weight at most, by kernel and format, for x in 16 bit. Q6_K has two scales to a slice of 32 weights, each
# with its half of x: selecting the halves of one copy (0.8) costs less than a second copy, whose requests an H200 waited for.
MOST_INSTRUCTIONS_PER_WEIGHT = {
    "small_m": {"Q4_K": 10.0, "Q6_K": 13.5, "Q8_0": 8.0},
    "small_m_codes": {"Q4_K": 4.0, "Q6_K": 4.8, "Q8_0": 4.0},
}


def problems(row: Row, recorded: dict | None) -> list[str]:
    """Return what is wrong with a row, each as one sentence; empty when it may ship."""
    faults = [*_limits(row), *_products(row), *_ratchet(row, recorded)]
    where = f"{row.kernel} {row.format} sm_{row.capability} {row.dtype} {row.tile} K={row.k} (Triton {row.triton})"
    return [f"{where}: {problem}" for problem in faults]


def _limits(row: Row) -> list[str]:
    card, faults = CARDS[row.capability], []
    if row.spills:
        faults.append(f"{row.spills} register spills")
    if row.shared_bytes > card.shared_per_block:
        faults.append(f"{row.shared_bytes} bytes of shared memory, the card has {card.shared_per_block}")
    most = MOST_INSTRUCTIONS_PER_WEIGHT.get(row.kernel, {}).get(row.format)
    if most is not None and row.dtype != "fp32" and is_looped(row) and row.instructions_per_weight > most:
        faults.append(f"{row.instructions_per_weight} instructions per weight, at most {most}")
    return faults


def _products(row: Row) -> list[str]:
    """Return what is wrong on the way to tensor cores, which cannot do products of float32 x."""
    faults, plain = [], row.dtype == "fp32" and not row.kernel.startswith(("fp16", "int8"))
    if not row.mma and row.kernel in TENSOR_CORE_KERNELS and not plain:
        faults.append("no tensor-core instruction")
    if row.mma and plain:
        faults.append(f"{row.mma} rounds float32 products")
    # Without a loop the epilogue would be counted, too.
    if row.kernel not in FUSED_KERNELS or not is_looped(row):
        return faults
    operands = "fp16" if row.kernel.startswith("fp16") else row.dtype
    if row.decodes_per_weight != 1.0 and not plain and (row.format, operands) not in UNCOUNTED:
        faults.append(f"every weight is decoded {row.decodes_per_weight} times")
    if row.loop_global and not FORMATS[row.format].gathers:
        faults.append(f"{row.loop_global} loads in the main loop are not asynchronous copies")
    return faults


def _ratchet(row: Row, recorded: dict | None) -> list[str]:
    if recorded and row.loop_instructions > RATCHET * int(recorded["loop_instructions"]):
        return [f"{row.loop_instructions} main-loop instructions, recorded {recorded['loop_instructions']}"]
    return []
