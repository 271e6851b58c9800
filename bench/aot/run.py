"""Run compiled kernels without a GPU: `python -m bench.aot.run --help`."""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from typing import Annotated

os.environ["TRITON_INTERPRET"] = "0"  # a kernel decorated for Triton's interpreter cannot be compiled
os.environ.setdefault("OMP_NUM_THREADS", "1")

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn
from rich.table import Table

from flux_kernels.cli._options import comma_separated
from flux_kernels.cli._progress import progress

from .command import refuse_unknown, wide_console
from .sweep import cases
from .sweep.outcome import run_case

_EPILOG = """Examples:

python -m bench.aot.run --small    each kernel with each format once, cards and dtypes in turn: what CI runs

python -m bench.aot.run --kernels wide,narrow --formats Q4_K --capabilities 89    one thing

python -m bench.aot.run --warps --seed 3    warp by warp in another random order

python -m bench.aot.versions 3.6.0    fetches another Triton to out/triton-3.6.0; then put that folder first on PYTHONPATH"""


def main(
    kernels: Annotated[str, typer.Option(help="Comma-separated, such as wide,small_m; empty means all. See the table.")] = "",
    formats: Annotated[str, typer.Option(help="Comma-separated ggml types; empty means all.")] = "",
    dtypes: Annotated[
        str, typer.Option(help="Comma-separated of bf16, fp16, fp32; empty means what each kernel ships in.")
    ] = "",
    capabilities: Annotated[str, typer.Option(help="Comma-separated, such as 80,89; empty means all.")] = "",
    small: Annotated[
        bool, typer.Option("--small", help="Each kernel with each format once, on one card in one dtype.")
    ] = False,
    warps: Annotated[
        bool, typer.Option("--warps", help="Run warps in turn between barriers, in random order (slower).")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the order of warps.")] = 0,
    unfenced_copies: Annotated[
        bool,
        typer.Option(
            "--unfenced-copies", help="Let sm_90's products read asynchronous copies without a proxy fence (Triton 3.6)."
        ),
    ] = False,
    jobs: Annotated[int, typer.Option(help="Processes that compile and run.")] = 2,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with every outcome instead of a table.")
    ] = False,
) -> None:
    """Compile kernels for absent cards, execute the PTX in numpy, and hold results to derived bounds.

    A case faults where a GPU would read what nobody wrote, leave a buffer, misalign an access, race in shared memory or read an
    asynchronous copy too early, and where the code has an instruction that the interpreter does not know. Exit code 1 where
    any case faults or is wrong. A whole run takes about an hour on two cores, most of it compiling.
    """
    named = {"kernels": kernels, "formats": formats, "dtypes": dtypes, "capabilities": capabilities}
    known = (cases.KERNELS, cases.FORMATS, cases.FLOATS, list(map(str, cases.CAPABILITIES)))
    chosen = [comma_separated(text) for text in named.values()]
    for option, words, legal in zip(named, chosen, known, strict=True):
        refuse_unknown(option, words, legal)
    cards = [int(card) for card in chosen[-1]]
    work = cases.whole(*chosen[:-1], cards)
    if small:
        work = [case for case in cases.small(chosen[0], cards) if case in set(work)]
    outcomes = _run(work, (warps, seed, unfenced_copies), jobs, quiet=as_json)
    if as_json:
        print(json.dumps({"outcomes": [asdict(outcome) for outcome in outcomes]}))
    else:
        _print(outcomes)
    raise typer.Exit(1 if not outcomes or any(outcome.problem for outcome in outcomes) else 0)


def _run(work: list, options: tuple, jobs: int, quiet: bool) -> list:
    """Run all cases, with a progress bar on stderr, and print each problem as it comes."""
    outcomes, console = [], Console(stderr=True)
    with progress(console, MofNCompleteColumn(), shown=not quiet) as bar, ProcessPoolExecutor(jobs) as pool:
        task = bar.add_task("compiling and running", total=len(work))
        for case, outcome in zip(work, pool.map(run_case, work, *([option] * len(work) for option in options)), strict=True):
            bar.update(task, advance=1, description=str(case).ljust(44))
            if outcome.problem and not quiet:
                console.print(f"{case}: {outcome.problem}", style="red", markup=False)
            outcomes.append(outcome)
    return outcomes


def _print(outcomes: list) -> None:
    """Print one line per kernel and card: cases, worst error over its bound, problems, time."""
    table = Table("kernel", "sm", "cases", "wrong", "worst error / bound", "of", "instructions", "seconds")
    groups: dict[tuple, list] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.kernel, outcome.capability), []).append(outcome)
    for (kernel, capability), group in groups.items():
        right = [outcome for outcome in group if not outcome.problem]
        worst = max(right, key=lambda outcome: outcome.ratio, default=None)
        table.add_row(
            kernel,
            str(capability),
            str(len(group)),
            str(len(group) - len(right)),
            f"{worst.ratio:.3f}" if worst else "",
            f"{worst.format} {worst.dtype} {worst.what}" if worst else "",
            f"{sum(outcome.instructions for outcome in group):,}",
            f"{sum(outcome.seconds for outcome in group):.1f}",
        )
    console = wide_console()
    console.print(table)
    wrong = [outcome for outcome in outcomes if outcome.problem]
    opcodes = set().union(*(outcome.opcodes for outcome in outcomes)) if outcomes else set()
    console.print(f"{len(outcomes)} cases, {len(wrong)} wrong, {len(opcodes)} different opcodes executed")
    for outcome in wrong:
        console.print(
            f"{outcome.kernel} {outcome.format} {outcome.dtype} sm_{outcome.capability}: {outcome.problem}", markup=False
        )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command(epilog=_EPILOG)(main)
    app()
