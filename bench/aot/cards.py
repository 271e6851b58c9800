"""Limits and rates of the cards the report compiles for, each with its source.

Instruction rates are results per clock per SM from the CUDA C++ Programming Guide, table "Throughput of Native Arithmetic
Instructions"; tensor clocks per HMMA.16816 with fp32 accumulation per SM quadrant follow from the peak rates of the
vendor's whitepapers (see docs/decisions/compile-time-report.md). Predictions from them are information, never acceptance.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """Hold one capability's limits (bytes, registers, threads per SM) and issue rates (results per clock per SM)."""

    capability: int
    example: str
    shared_per_block: int
    shared_per_sm: int
    registers_per_sm: int
    threads_per_sm: int
    fp32_rate: int
    int_rate: int
    convert_rate: int
    tensor_clocks: int  # per HMMA.16816.F32 on one SM quadrant


CARDS = {
    card.capability: card
    for card in (
        Card(80, "A100", 163 << 10, 164 << 10, 65536, 2048, 64, 64, 64, 8),
        Card(86, "RTX 3090", 99 << 10, 100 << 10, 65536, 1536, 128, 64, 64, 32),
        Card(89, "RTX 4090", 99 << 10, 100 << 10, 65536, 1536, 128, 64, 64, 32),
        Card(90, "H100", 227 << 10, 228 << 10, 65536, 2048, 128, 64, 64, 4),
        Card(120, "RTX 5090", 99 << 10, 100 << 10, 65536, 1536, 128, 128, 64, 32),
    )
}


def occupancy(card: Card, registers: int, shared: int, threads: int) -> int:
    """Return how many programs fit on one SM (registers are allocated in units of 8 per thread)."""
    by_registers = card.registers_per_sm // (-(-registers // 8) * 8 * threads)
    by_shared = card.shared_per_sm // (shared + 1024) if shared else card.threads_per_sm
    return min(by_registers, by_shared, card.threads_per_sm // threads)
