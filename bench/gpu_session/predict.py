"""Predict what is measured: by the compile-time model where it can, else by arithmetic from rates.

A prediction is written before the number it is for is known, so that a miss teaches something. See docs/decisions/gpu-session.md.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from bench.aot import model as compile_time
from bench.aot.model import Model
from bench.record import AOT, read_csv
from flux_kernels.formats import FORMATS
from flux_kernels.kernels.choice import Choice
from flux_kernels.kernels.chunks import wave_efficiency
from flux_kernels.models.calls import Call

# What a card reaches, not what its vendor states. An H100's is assumed: none was measured.
_H200 = replace(compile_time.H200_MEASURED, name="H200")
_H100 = replace(_H200, name="H100", bf16_tflops=790, memory_gb_s=2900, ghz=1.755)
_LAUNCH_MS = 0.0012  # a launch in a full queue or a graph


def rates_of(name: str) -> Model:
    """Return the rates assumed for a card by its driver's name; an unknown one counts as an H100."""
    return _H200 if "H200" in name else _H100


def moved_ms(rates: Model, nbytes: float) -> float:
    """Predict the time of reading and writing so many bytes."""
    return nbytes / rates.memory_gb_s / 1e6 + _LAUNCH_MS


def product_ms(rates: Model, m: int, n: int, k: int, rows: int | None = None, speed: float = 1.0) -> float:
    """Predict cuBLAS's y[M, N], `rows` columns at a time: waves of 128 x 128 tiles, or operands' bytes."""
    compute = 2 * m * n * k / rates.bf16_tflops / 1e9 / speed / wave_efficiency(m, n, rows, rates.processors)
    return max(compute, moved_ms(rates, 2 * (m * k + n * k + m * n)))


def two_stage_ms(
    rates: Model, format: str, m: int, n: int, k: int, rows: int | None = None, copied_bias: bool = False
) -> float:
    """Predict the two-stage call: packed bytes read, the weight written, the product, a copied bias."""
    unpack = moved_ms(rates, n * (FORMATS[format].row_bytes(k) + 2 * k))
    chunks = 1 if rows is None else -(-n // rows)
    bias = moved_ms(rates, 4 * m * n) if copied_bias else 0.0
    return unpack + product_ms(rates, m, n, k, rows) + bias + (chunks - 1) * 2 * _LAUNCH_MS


def read_ms(rates: Model, format: str, n: int, k: int) -> float:
    """Predict reading a packed weight once."""
    return moved_ms(rates, n * FORMATS[format].row_bytes(k))


def modelled_ms(rates: Model, compute: str, format: str, m: int, n: int, k: int, choice: Choice | None = None) -> float | None:
    """Return the compile-time model's prediction at these rates, with waits; None without a record."""
    return case_ms(compile_time.Case(rates, _record(), format, waits=True), compute, m, n, k, choice)


def case_ms(case: compile_time.Case, compute: str, m: int, n: int, k: int, choice: Choice | None = None) -> float | None:
    """Return the compile-time model's prediction of a call in a case; None without a record."""
    try:
        return compile_time.call_ms(case, compute, Call(m, n, k, 1, ""), choice)
    except LookupError:
        return None


@cache
def _record() -> compile_time.Record:
    return compile_time.Record(read_csv(AOT))
