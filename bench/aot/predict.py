"""Predict the linears of a step from compiled code: what the busiest pipe would need, were nothing else in the way.

    python -m bench.aot.predict --formats Q4_K,Q8_0 --write bench/results/predictions.csv

A prediction is a lower bound of the time, not a measurement: latency, occupancy, memory and launch gaps are not in it, and a
kernel that decodes four times can still look perfect. It tells which pipe is the busiest and what a card could gain at best.
"""

from __future__ import annotations

import csv
import datetime
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench.record import write_csv
from flux_kernels.compute import GROUP, WEIGHT_ONLY_M
from flux_kernels.flux.calls import Call, step_calls

RESULTS = Path(__file__).parents[1] / "results"
_KERNEL = {"exact": "fused_gemm", "fp16_accumulate": "fp16_gemm", "int8": "int8_gemm"}


@dataclass(frozen=True)
class Model:
    """Hold one product: multiprocessors, boost clock in GHz, dense bf16 peak in TFLOP/s and memory in GB/s, as its vendor states."""

    name: str
    capability: int
    processors: int
    ghz: float
    bf16_tflops: float
    memory_gb_s: float


# Vendors' data sheets and whitepapers.
MODELS = (
    Model("RTX 3090", 86, 82, 1.695, 71.2, 936),
    Model("RTX 4090", 89, 128, 2.52, 165.2, 1008),
    Model("RTX 5090", 120, 170, 2.407, 209.5, 1792),
)


def predict(model: Model, mode: str, format: str, rows: list[dict]) -> dict:
    """Predict the linears of one 1024 x 1024 step of FLUX.1-dev in a mode: milliseconds, and the pipe that decides."""
    kernel = next(row for row in rows if _is(row, _KERNEL[mode], "int8" if mode == "int8" else format, model))
    block_m, block_n, tile_k = (int(size) for size in kernel["tile"].split()[0].split("x"))
    step = GROUP if mode == "int8" else tile_k
    clocks = {pipe: int(kernel[f"{pipe}_clocks"]) for pipe in ("tensor", "issue", "int", "convert")}
    busiest = max(clocks, key=clocks.__getitem__)
    total = 0.0
    for call in step_calls():
        if call.m <= WEIGHT_ONLY_M:
            total += call.calls * _read_ms(call, format, model)
            continue
        tiles = ceil(call.m / block_m) * ceil(call.n / block_n)
        waves = ceil(tiles / (model.processors * max(1, int(kernel["programs_per_sm"])))) * max(
            1, int(kernel["programs_per_sm"])
        )
        total += call.calls * waves * call.k / step * clocks[busiest] / (model.ghz * 1e6)
        if mode == "int8":
            total += call.calls * _around_ms(call, format, model)
    baseline = sum(
        call.calls * max(call.flops / model.bf16_tflops / 1e9, 2 * call.n * call.k / model.memory_gb_s / 1e6)
        for call in step_calls()
    )
    return dict(
        card=model.name,
        format=format,
        compute=mode,
        predicted_ms=round(total, 1),
        bf16_peak_ms=round(baseline, 1),
        ratio=round(baseline / total, 2),
        busiest_pipe=busiest,
        triton=kernel["triton"],
        tile=kernel["tile"],
    )


def _is(row: dict, kernel: str, format: str, model: Model) -> bool:
    wide = kernel != "fused_gemm" or row["tile"].startswith(("128x", "64x128"))
    return (row["kernel"], row["format"], row["capability"], row["dtype"]) == (
        kernel,
        format,
        str(model.capability),
        "bf16",
    ) and wide


def _read_ms(call: Call, format: str, model: Model) -> float:
    """Return the time of reading a packed weight once."""
    from flux_kernels.formats import FORMATS

    return call.n * FORMATS[format].row_bytes(call.k) / model.memory_gb_s / 1e6


def _around_ms(call: Call, format: str, model: Model) -> float:
    """Return the memory time around an int8 product: the activation read in 16 bit and written in 8, the packed weight read."""
    return 3 * call.m * call.k / model.memory_gb_s / 1e6 + _read_ms(call, format, model)


def main(
    formats: Annotated[str, typer.Option(help="Comma-separated ggml types that the record has.")] = "Q4_K,Q6_K,Q8_0",
    write: Annotated[Path | None, typer.Option(help="CSV to write.")] = None,
) -> None:
    """Predict each mode on an RTX 3090, 4090 and 5090 from bench/results/aot.csv, beside the bf16 peak."""
    with (RESULTS / "aot.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = [predict(model, mode, name, rows) for model in MODELS for name in formats.split(",") for mode in _KERNEL]
    table = Table(title="Predictions, not measurements: linears of one 1024 x 1024 step of FLUX.1-dev")
    for heading in found[0]:
        table.add_column(heading)
    for row in found:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    if write:
        write_csv([row | dict(date=datetime.date.today().isoformat()) for row in found], write)


if __name__ == "__main__":
    typer.run(main)
