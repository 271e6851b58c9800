"""Decide what CI refuses: properties that compiled code must have, and a ratchet against the recorded report.

Predicted clocks are no criterion: a kernel that decodes every weight four times still looks perfect in them.
"""

from __future__ import annotations

from flux_kernels.kernels.tuning import GRID_FORMATS

from .cards import CARDS
from .report import Row

# Packed bytes to tensor cores in one loop.
FUSED_KERNELS = ("fused_gemm", "split_k", "fp16_gemm", "fused_gemm_branch", "fp16_gemm_branch")
TENSOR_CORE_KERNELS = (*FUSED_KERNELS, *(f"int8_gemm{kind}" for kind in ("", "_branch", "_rows", "_rows_branch")))
UNCOUNTED = frozenset(
    {("fp16_gemm", "Q1_0"), ("fp16_gemm_branch", "Q1_0")}
)  # weights of +d and -d: the compiler flips a sign, no rounding is left to count
RATCHET = 1.05  # main-loop instructions may grow by this factor before the record must be changed on purpose


def problems(row: Row, recorded: dict | None) -> list[str]:
    """Return what is wrong with a row, each as one sentence; empty when it may ship."""
    card = CARDS[row.capability]
    found = []
    if row.spills:
        found.append(f"{row.spills} register spills")
    if not row.mma and row.kernel in TENSOR_CORE_KERNELS and row.dtype != "fp32":
        found.append("no tensor-core instruction in the main loop")
    counted = row.dtype != "fp32" and (row.kernel, row.format) not in UNCOUNTED
    if row.decodes_per_weight != 1.0 and row.kernel in FUSED_KERNELS and counted:
        found.append(f"every weight is decoded {row.decodes_per_weight} times")
    if row.loop_global and row.kernel in FUSED_KERNELS and row.format not in GRID_FORMATS:
        found.append(f"{row.loop_global} loads in the main loop are not asynchronous copies")
    if row.shared_bytes > card.shared_per_block:
        found.append(f"{row.shared_bytes} bytes of shared memory, the card has {card.shared_per_block}")
    if recorded and row.loop_instructions > RATCHET * int(recorded["loop_instructions"]):
        found.append(f"{row.loop_instructions} main-loop instructions, recorded {recorded['loop_instructions']}")
    where = f"{row.kernel} {row.format} sm_{row.capability} {row.dtype} {row.tile} (Triton {row.triton})"
    return [f"{where}: {problem}" for problem in found]


def key(row: dict) -> tuple:
    """Return what identifies a row from one run of the report to the next."""
    return tuple(str(row[name]) for name in ("kernel", "format", "capability", "triton", "dtype", "tile"))
