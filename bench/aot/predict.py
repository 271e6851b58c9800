"""Predict the linears of a step from compiled code: the time of the busiest pipe and the memory.

    python -m bench.aot.predict --formats Q4_K,Q8_0 --write bench/results/predictions.csv

Each time stands twice. `predicted_ms` is a bound: everything overlaps that the code lets, and conversions run at 64 a clock and
multiprocessor where nobody measured them. `predicted_ms_waiting` is for conversions at 16, products and decoding in turn, and
programs that wait for shared memory as long as they did on an H200, where the large products took 0.8 to 1.3 of it. Torch's own
product is predicted at the same peaks, for the ratio; launch gaps are in neither.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench.aot.model import H200_MEASURED, MODELS, MODES, Record, predict
from bench.record import AOT, read_csv, write_csv


def main(
    formats: Annotated[str, typer.Option(help="Comma-separated ggml types that the record has.")] = "Q4_K,Q6_K,Q8_0",
    write: Annotated[Path | None, typer.Option(help="CSV to write.")] = None,
) -> None:
    """Predict each mode on cards from an RTX 3060 to an H200, and torch's bf16 product."""
    record, rows = Record(read_csv(AOT)), []
    for model in (*MODELS, H200_MEASURED):
        for name in formats.split(","):
            for mode, fused in (("exact", False), ("exact", True), *((mode, False) for mode in MODES[1:])):
                try:
                    rows.append(predict(model, mode, name, record, fused))
                except LookupError as lacking:
                    Console(stderr=True).print(f"left out: {lacking}")
    if not rows:
        raise SystemExit("nothing to predict: the record lacks these kernels")
    table = Table(*rows[0], title="Predictions, not measurements: linears of one 1024 x 1024 step of FLUX.1-dev")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=max(Console().width, 190)).print(table)
    if write:
        write_csv([row | dict(date=datetime.date.today().isoformat()) for row in rows], write)


if __name__ == "__main__":
    typer.run(main)
