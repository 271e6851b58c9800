"""Predict the linears of a step from compiled code: what the busiest pipe would need, were nothing else in the way.

    python -m bench.aot.predict --formats Q4_K,Q8_0 --write bench/results/predictions.csv

A prediction is a lower bound of the time, not a measurement: latency, occupancy, memory and launch gaps are not in it, and a
kernel that decodes four times can still look perfect. It tells which pipe is the busiest and what a card could gain at best.
"""

from __future__ import annotations

import csv
import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench.aot.model import KERNEL, MODELS, predict
from bench.record import write_csv

RESULTS = Path(__file__).parents[1] / "results"


def main(
    formats: Annotated[str, typer.Option(help="Comma-separated ggml types that the record has.")] = "Q4_K,Q6_K,Q8_0",
    write: Annotated[Path | None, typer.Option(help="CSV to write.")] = None,
) -> None:
    """Predict each mode on an RTX 3090, 4090 and 5090 from bench/results/aot.csv, beside the bf16 peak."""
    with (RESULTS / "aot.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = [predict(model, mode, name, rows) for model in MODELS for name in formats.split(",") for mode in KERNEL]
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
