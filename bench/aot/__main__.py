"""Command line of the compile-time report: `python -m bench.aot --help`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

os.environ["TRITON_INTERPRET"] = "0"  # a kernel decorated for the interpreter cannot be compiled

import triton
import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn
from rich.table import Table

from bench.record import AOT
from flux_kernels.cli._options import comma_separated
from flux_kernels.cli._progress import progress

from .cards import CARDS
from .command import refuse_unknown, wide_console
from .invariants import problems
from .launches import ANY, DTYPES, FORMATS, ROWS
from .recorder import Recorder, compiled, items, lacking, read_record
from .report import Row, key


def main(
    formats: Annotated[str, typer.Option(help="Comma-separated ggml types; empty means all.")] = "",
    capabilities: Annotated[str, typer.Option(help="Comma-separated, such as 86,89; empty means all.")] = "",
    kernels: Annotated[
        str, typer.Option(help="Comma-separated, such as fused_gemm,small_m_branch (--list names them); empty means all.")
    ] = "",
    dtypes: Annotated[str, typer.Option(help="Of x, comma-separated: bf16, fp16, fp32; empty means all.")] = "",
    rows: Annotated[str, typer.Option(help="M of the calls, comma-separated; empty means every class of the tables.")] = "",
    k: Annotated[int, typer.Option(help="K of the calls, 0 means all.")] = 0,
    missing: Annotated[
        bool, typer.Option(help="Only what the record lacks, or has from another state of the kernel's source.")
    ] = False,
    list_only: Annotated[
        bool, typer.Option("--list", help="Compile nothing: count what is launched and what of it the record has.")
    ] = False,
    check: Annotated[
        bool, typer.Option(help="Exit 1 when an invariant is broken, the ratchet is exceeded or (--list) a launch has no row.")
    ] = False,
    write: Annotated[
        Path | None, typer.Option(help="Add the rows to a CSV as they come (the record is bench/results/aot.csv).")
    ] = None,
    tritons: Annotated[str, typer.Option(help="With --list: the versions whose rows are looked for.")] = triton.__version__,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows and problems as JSON.")] = False,
    jobs: Annotated[int, typer.Option(help="Compiling processes.")] = 2,
) -> None:
    """Compile the library's launches for absent cards; report registers, spills, main loop and clocks."""
    record = read_record(write or AOT)
    wanted = _wanted(
        comma_separated(formats),
        comma_separated(capabilities),
        comma_separated(kernels),
        comma_separated(dtypes),
        comma_separated(rows),
        k,
    )
    if list_only:
        unrecorded = _list(wanted, record, comma_separated(tritons))
        raise typer.Exit(1 if check and unrecorded else 0)
    rows_made, broken = _compile(lacking(wanted, record) if missing else wanted, record, write, jobs, quiet=as_json)
    if write and not any((formats, capabilities, kernels, dtypes, rows, k)):
        _drop_unlaunched(write)
    if as_json:
        print(json.dumps({"rows": rows_made, "problems": broken}))
    else:
        _print(rows_made)
        print("\n".join(broken))
    raise typer.Exit(1 if check and broken else 0)


def _wanted(formats: list[str], capabilities: list[str], kernels: list[str], dtypes: list[str], rows: list[str], k: int):
    """Return the launches that the options name, with those that are the same for all formats or dtypes."""
    cards = [int(capability) for capability in capabilities] or list(CARDS)
    every = items(cards, tuple(map(int, rows)) or ROWS)
    refuse_unknown("capabilities", cards, CARDS)
    refuse_unknown("formats", formats, FORMATS)
    refuse_unknown("dtypes", dtypes, DTYPES)
    refuse_unknown("kernels", kernels, sorted({item.launch.name for item in every}))
    return [
        item
        for item in every
        if item.launch.format in (*(formats or FORMATS), ANY)
        and item.launch.dtype in (*(dtypes or DTYPES), ANY)
        and item.launch.name in (kernels or [item.launch.name])
        and item.launch.k in (k or item.launch.k, 0)
    ]


def _compile(wanted: list, record: dict, write: Path | None, jobs: int, quiet: bool) -> tuple[list[dict], list[str]]:
    """Compile launches; return their rows, and what is wrong with them."""
    rows, broken, recorder = [], [], Recorder(write) if write else None
    with progress(Console(stderr=True), MofNCompleteColumn(), shown=not quiet) as bar:
        task = bar.add_task("compiling", total=len(wanted))
        try:
            for row in compiled(wanted, jobs):
                bar.advance(task)
                if isinstance(row, str):
                    broken.append(row)
                    continue
                rows.append(row)
                broken += problems(Row(**row), record.get(key(row)))
                if recorder:
                    recorder.add(row)
        finally:
            if recorder:
                recorder.save()
    return rows, broken


def _drop_unlaunched(write: Path) -> None:
    recorder = Recorder(write)
    if gone := recorder.drop_unlaunched():
        Console(stderr=True).print(f"dropped {gone} rows that nothing launches any more")
        recorder.save()


def _list(wanted: list, record: dict, tritons: list[str]) -> int:
    """Print how many launches there are, and how many the record has; return how many it lacks."""
    table, lacking = Table("kernel", "launches", *(f"in {version}, out of date, lacking" for version in tritons)), 0
    for name in sorted({item.launch.name for item in wanted}):
        named, cells = [item for item in wanted if item.launch.name == name], []
        for version in tritons:
            there = [(item, record[item.key(version)]) for item in named if item.key(version) in record]
            stale = sum(row["code"] != item.launch.code for item, row in there)
            cells.append(f"{len(there)}, {stale}, {len(named) - len(there)}")
            lacking += len(named) - len(there)
        table.add_row(name, str(len(named)), *cells)
    wide_console().print(table)
    print(f"{len(wanted)} launches; the record lacks {lacking}")
    return lacking


# What the table shows: column title -> field of a row.
_COLUMNS = {
    "kernel": "kernel",
    "format": "format",
    "sm": "capability",
    "x": "dtype",
    "K": "k",
    "tile": "tile",
    "regs": "registers",
    "spills": "spills",
    "shared": "shared_bytes",
    "per SM": "programs_per_sm",
    "loop": "loop_instructions",
    "decodes": "decodes_per_weight",
    "a weight": "instructions_per_weight",
    "tensor clk": "tensor_clocks",
    "issue clk": "issue_clocks",
}


def _print(rows: list[dict]) -> None:
    table = Table(*_COLUMNS)
    for row in rows:
        table.add_row(*(str(row[field]) for field in _COLUMNS.values()))
    wide_console().print(table)


if __name__ == "__main__":
    typer.run(main)
