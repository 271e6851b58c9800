"""Command line of the compile-time report: `python -m bench.aot --help`."""

from __future__ import annotations

import csv
import json
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

os.environ["TRITON_INTERPRET"] = "0"  # a kernel decorated for the interpreter cannot be compiled

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

RECORD = Path(__file__).parents[1] / "results" / "aot.csv"


def main(
    formats: Annotated[str, typer.Option(help="Comma-separated ggml types; empty means all.")] = "",
    capabilities: Annotated[str, typer.Option(help="Comma-separated, such as 86,89; empty means all.")] = "",
    kernels: Annotated[
        str,
        typer.Option(
            help="wide, medium, narrow, split_k (fused GEMM), small_m, fp16, int8, int8_rows, dequantize, unpack_int8, "
            "unpack_int8_rows, row_largest, quantize_activation, scale_to_fp16; wide_branch, fp16_branch, int8_branch and "
            "int8_rows_branch have a low-rank branch; empty means all."
        ),
    ] = "",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    check: Annotated[
        bool, typer.Option(help="Exit 1 when an invariant is broken or the record's ratchet is exceeded.")
    ] = False,
    write: Annotated[Path | None, typer.Option(help="Write the rows into a CSV (the record is bench/results/aot.csv).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows and problems as JSON.")] = False,
    jobs: Annotated[int, typer.Option(help="Compiling processes.")] = 2,
) -> None:
    """Compile the shipped tiles for cards that are not here and report registers, spills, main loop and predicted clocks."""
    from .cards import CARDS
    from .report import FORMAT_FREE, FORMATS, SHIPPED

    unknown = set(filter(None, formats.split(","))) - FORMATS.keys()
    if unknown:
        raise typer.BadParameter(f"unknown formats {sorted(unknown)}; known: {', '.join(FORMATS)}")
    if unknown := set(filter(None, kernels.split(","))) - SHIPPED.keys():
        raise typer.BadParameter(f"unknown kernels {sorted(unknown)}; known: {', '.join(SHIPPED)}")
    names = formats.split(",") if formats else list(FORMATS)
    work = [
        (kernel, name, int(capability), dtype)
        for capability in (capabilities.split(",") if capabilities else CARDS)
        for kernel in (kernels.split(",") if kernels else SHIPPED)
        for name in (names[:1] if kernel in FORMAT_FREE else names)
    ]
    with ProcessPoolExecutor(jobs) as pool:
        results = pool.map(_one, work)
        rows = list(track(results, "compiling", total=len(work), disable=as_json, console=Console(stderr=True)))
    broken = _problems(rows)
    if write:
        _write(rows, write)
    if as_json:
        print(json.dumps({"rows": rows, "problems": broken}))
    else:
        _print(rows)
        for problem in broken:
            print(problem)
    raise typer.Exit(1 if check and broken else 0)


def _one(item: tuple) -> dict:
    from .report import SHIPPED, as_dict

    kernel, name, capability, dtype = item
    return as_dict(SHIPPED[kernel](name, capability, dtype))


def _problems(rows: list[dict]) -> list[str]:
    from .invariants import key, problems
    from .report import Row

    recorded = {}
    if RECORD.exists():
        with RECORD.open(newline="") as file:
            recorded = {key(row): row for row in csv.DictReader(file)}
    found = []
    for row in rows:
        found += problems(Row(**row), recorded.get(key(row)))
    return found


def _write(rows: list[dict], path: Path) -> None:
    """Write rows, in place of those of the same kernel, format, card, Triton, dtype and tile that the file has; keep the rest."""
    from bench.record import write_csv

    from .invariants import key

    kept = {}
    if path.exists():
        with path.open(newline="") as file:
            kept = {key(row): row for row in csv.DictReader(file)}
    merged = kept | {key(row): row for row in rows}
    order = sorted(merged, key=lambda one: (one[0], one[1], int(one[2]), *one[3:]))
    write_csv([merged[one] for one in order], path)


# What the table shows: column title -> field of a row.
_COLUMNS = {
    "kernel": "kernel",
    "format": "format",
    "sm": "capability",
    "tile": "tile",
    "regs": "registers",
    "spills": "spills",
    "shared": "shared_bytes",
    "per SM": "programs_per_sm",
    "loop": "loop_instructions",
    "LDG": "loop_global",
    "decodes": "decodes_per_weight",
    "tensor clk": "tensor_clocks",
    "issue clk": "issue_clocks",
}
_WIDTH = 150  # characters the table takes, also where the output is a file or a narrow terminal


def _print(rows: list[dict]) -> None:
    table = Table(*_COLUMNS)
    for row in rows:
        table.add_row(*(str(row[field]) for field in _COLUMNS.values()))
    Console(width=max(Console().width, _WIDTH)).print(table)


if __name__ == "__main__":
    typer.run(main)
