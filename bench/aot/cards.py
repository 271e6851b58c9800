"""Limits and rates of the cards the report compiles for, each with its source.

Results per clock and multiprocessor of arithmetic: CUDA C++ Programming Guide, table "Throughput of Native Arithmetic Instructions".
Products of the tensor cores: the vendors' peak rates (architecture whitepapers, data sheets) divided by multiprocessors and boost clock;
tests/bench/test_model.py does that division for every product in model.py. Predictions from them are information, never acceptance.
"""

from __future__ import annotations

from dataclasses import dataclass

# Schedulers of a multiprocessor, each with a tensor core and one instruction of 32 threads a clock
QUADRANTS = 4
LANES = 32
# Results of I2F and F2I a clock and SM: the two rates in circulation. An H200 ran I2F.U8, I2F.F16 and F2I at 16
# (bench/results/nvidia-h200/rates.csv); what our loops have is I2F.U16, .S16 and .S8, which are taken to be alike. I2FP and F2FP,
# which count as integer arithmetic here, ran at 62 of 64.
CONVERT_RATES = (16, 64)
MEASURED_CONVERT_RATES = {90: 16}
# Clocks that a program waits for each shared-memory instruction of a warp's loop, whatever else runs on its multiprocessor: fitted
# to the fused kernel of Q4_K on an H200 (`bench.calibrate.fitted_wait`), checked on other rows (docs/decisions/predictions.md).
SHARED_WAIT = 84


@dataclass(frozen=True)
class Card:
    """Hold one capability's limits (bytes, registers, threads per SM) and rates per clock and SM.

    fp32_rate, int_rate: results. fp32_sums, fp16_sums, int8_products: multiply-adds of the tensor cores on 16-bit operands with
    float32 and with fp16 accumulation, and on int8.
    """

    capability: int
    example: str
    shared_per_block: int
    shared_per_sm: int
    registers_per_sm: int
    threads_per_sm: int
    fp32_rate: int
    int_rate: int
    fp32_sums: int
    fp16_sums: int
    int8_products: int


CARDS = {
    card.capability: card
    for card in (
        Card(80, "A100", 163 << 10, 164 << 10, 65536, 2048, 64, 64, 1024, 1024, 2048),
        Card(86, "RTX 3090", 99 << 10, 100 << 10, 65536, 1536, 128, 64, 256, 512, 1024),
        Card(89, "RTX 4090", 99 << 10, 100 << 10, 65536, 1536, 128, 64, 256, 512, 1024),
        Card(90, "H100", 227 << 10, 228 << 10, 65536, 2048, 128, 64, 2048, 2048, 4096),
        Card(120, "RTX 5090", 99 << 10, 100 << 10, 65536, 1536, 128, 128, 256, 512, 1024),
    )
}


def occupancy(card: Card, registers: int, shared: int, threads: int) -> int:
    """Return how many programs fit on one SM (registers are allocated in units of 8 per thread)."""
    by_registers = card.registers_per_sm // (-(-registers // 8) * 8 * threads)
    by_shared = card.shared_per_sm // (shared + 1024) if shared else card.threads_per_sm
    return min(by_registers, by_shared, card.threads_per_sm // threads)


def tensor_clocks(opcode: str, card: Card) -> float:
    """Return the clocks that one tensor-core instruction keeps its cores busy.

    A warp's instruction (HMMA, IMMA) runs on one quadrant's core, a warpgroup's (HGMMA, IGMMA) on all four.

    Raises:
        ValueError: for an opcode whose shape or rate is not known here.
    """
    stem, *words = opcode.split(".")
    if stem not in ("HMMA", "IMMA", "HGMMA", "IGMMA") or not words:
        raise ValueError(f"{opcode}: not a tensor-core instruction that is known here")
    if stem in ("IMMA", "IGMMA"):
        rate = card.int8_products
    else:
        rate = card.fp16_sums if "F16" in words and "F32" not in words else card.fp32_sums
    if stem in ("HGMMA", "IGMMA"):
        m, n, k = (int(size) for size in words[0].split("x"))
        return m * n * k / rate
    shapes = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "16832": 16 * 8 * 32}
    if words[0] not in shapes:
        raise ValueError(f"{opcode}: a shape that is not known here")
    return QUADRANTS * shapes[words[0]] / rate
