"""`flux-kernels bench`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn

from ..backends import own_device
from ._options import comma_separated
from ._progress import progress

if TYPE_CHECKING:
    import torch

    from ..benchmark.session import Found, Plan

_MINUTES = dict(cuda=7.0, cpu=2.7)
_CPU_SCALE = 16


def bench(
    model: Annotated[
        str, typer.Option(help="Whose linear calls: flux1-dev, flux2-klein-4b, z-image-turbo, ... An unknown name lists all.")
    ] = "flux1-dev",
    formats: Annotated[str, typer.Option(help="ggml types, comma-separated.")] = "Q4_K,Q6_K,Q8_0",
    peers: Annotated[
        bool,
        typer.Option("--peers", help="Other libraries too, where installed. Some compile for minutes a type: raise --minutes."),
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="All types, all sizes of picture, all peers. Takes hours.")] = False,
    step: Annotated[
        bool, typer.Option(help="Also one step as a whole: FLUX.1-dev's on a GPU, the embedded model's on a CPU.")
    ] = True,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Begin nothing new after this time: 7 by default, 2.7 on a CPU, no limit with --all.", show_default=False
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each, in turn; the median counts.")] = 5,
    scale: Annotated[int, typer.Option(min=0, help="Divide M and N by this; 0: 1 on a GPU, 16 on a CPU.")] = 0,
    report: Annotated[Path | None, typer.Option(help="Write an HTML page: plots, every row, what a speed costs.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the speeds of every call as a PNG.")] = None,
    contribute: Annotated[
        Path | None, typer.Option(help="Write the rows to this new CSV file, to send in; whole steps to NAME-step.csv.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows and verdict as JSON, for machines.")] = False,
) -> None:
    """Time every linear call of a step of FLUX.1-dev or another model.

    Of FLUX.1-dev, a step as a whole is timed too.

    Unquantized, diffusers' GGUF layers and this library are compared. A speed is shown only where the result is right,
    checked in the same run. Ends with what the numbers say, in plain words.

    [bold]Examples[/]

      flux-kernels bench
      flux-kernels bench --model flux2-klein-4b
      flux-kernels bench --report bench.html
      flux-kernels bench --formats Q4_K --peers --contribute my-card.csv
      flux-kernels bench --all --report everything.html
    """
    from ..benchmark.json_rows import document, unfinished
    from ..benchmark.page import fidelity_rows, page
    from ..benchmark.row_files import RowFiles
    from ..files import write_whole

    # Not NaN either.
    if minutes is not None and not minutes >= 0:
        raise typer.BadParameter(f"{minutes:g} is no time. Give 0 or more.", param_hint="--minutes")
    console = Console(highlight=False, stderr=as_json)
    files = RowFiles(contribute, lambda line: console.print(line, markup=False, soft_wrap=True))
    _check_targets(report, plot)
    device = own_device()
    plan = _plan(device, model, formats, peers or everything, everything, step, minutes, repeats, scale)
    rows: dict[str, list[dict]] = dict(linear=[], step=[])

    def keep(kind: str, row: dict) -> None:
        rows[kind].append(row)
        files.add(kind, row)

    try:
        with files:
            measured = _measure(plan, device, console, keep)
    # SystemExit is SIGTERM's.
    except (KeyboardInterrupt, SystemExit):
        if as_json:
            typer.echo(unfinished(rows["linear"], rows["step"]))
        raise
    lines = _verdict(measured, plan)
    if as_json:
        typer.echo(document(measured, lines, fidelity_rows()))
    else:
        _print(console, measured, plan, lines)
    if report is not None:
        write_whole(report, page(measured, lines, fidelity_rows()).encode())
        console.print(f"Report in [bold]{escape(str(report))}[/]: one page, to open in a browser.", soft_wrap=True)
    if plot is not None and not any(row["p50_ms"] for row in measured.linears):
        console.print("No plot is written: no linear call was timed.")
    elif plot is not None:
        from ..benchmark.plots import speed_over_rows

        write_whole(plot, speed_over_rows(measured.linears))
        console.print(f"Plot in [bold]{escape(str(plot))}[/].", soft_wrap=True)
    for path in files.made:
        console.print(f"Rows in [bold]{escape(str(path))}[/]: add it under bench/results in a pull request.", soft_wrap=True)


def _measure(plan: Plan, device: torch.device, console: Console, keep: Callable[[str, dict], None]) -> Found:
    """Measure what the plan says, under a progress bar; every row is kept at once."""
    import torch

    from ..benchmark.session import measure_all

    with progress(console, MofNCompleteColumn()) as bar:
        task = bar.add_task("measuring", total=plan.work(device))
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return measure_all(
            plan, device, dtype, lambda words, done: bar.update(task, description=words, advance=done), on_row=keep
        )


def _check_targets(report: Path | None, plot: Path | None) -> None:
    """Raise, before anything is measured, where what is asked for cannot be written."""
    from ..files import check_writable

    for option, target in (("--report", report), ("--plot", plot)):
        if target is not None:
            check_writable(target, option)
            # A missing package is reported before the measuring.
            import matplotlib  # noqa: F401


def _plan(
    device: torch.device,
    model: str,
    formats: str,
    peers: bool,
    everything: bool,
    step: bool,
    minutes: float | None,
    repeats: int,
    scale: int,
) -> Plan:
    from ..benchmark import linears  # noqa: F401 - registers every side
    from ..benchmark.providers import PROVIDERS
    from ..benchmark.session import MAIN_SIZE, Plan
    from ..formats import FORMATS, get_format
    from ..models.calls import STEPS
    from ..models.variant_calls import find_variant

    groups = ("base", "ours", "peer") if peers else ("base", "ours")
    wanted = [side.name for side in PROVIDERS.values() if side.group in groups and (peers or "compiled" not in side.name)]
    return Plan(
        formats=list(FORMATS) if everything else [get_format(name).name for name in comma_separated(formats)],
        providers=wanted,
        sizes=list(STEPS) if everything else [MAIN_SIZE],
        scale=scale or (1 if device.type == "cuda" else _CPU_SCALE),
        repeats=repeats,
        minutes=_MINUTES[device.type] if minutes is None and not everything else minutes,
        steps=step,
        denoise=len(FORMATS) if everything else 1,
        model=find_variant(model)[1].slug,
    )


def _verdict(measured: Found, plan: Plan) -> list[str]:
    from ..benchmark.session import MAIN_SIZE
    from ..benchmark.verdict import verdict

    steps = [row for row in measured.steps if row["size"] == MAIN_SIZE or row["what"] == "embedded step"]
    return verdict(measured.whole(plan.size_name(MAIN_SIZE)), steps)


def _print(console: Console, measured: Found, plan: Plan, lines: list[str]) -> None:
    from ..benchmark.linears import summary
    from ..benchmark.record import origin_text
    from ..benchmark.verdict import step_verdict

    console.print(origin_text(measured.origin), soft_wrap=True)
    console.print(summary([row for size in plan.sizes for row in measured.whole(plan.size_name(size))]), soft_wrap=True)
    for row in (row for row in measured.steps if row["p50_ms"]):
        time = f"{float(row['p50_ms']):10.1f} ms"
        console.print(f"{row['format']:8} {row['provider']:30} {time} {row['what']}, {row['size']}", soft_wrap=True)
    for line in step_verdict(measured.steps):
        console.print(line, markup=False, soft_wrap=True)
    without = [row for row in measured.linears if not row["p50_ms"]]
    for note in dict.fromkeys(f"{row['provider']}: {row['note']}" for row in without):
        console.print(note, style="dim", markup=False, soft_wrap=True)
    for line in [*measured.left_out(), *lines]:
        console.print(line, markup=False, soft_wrap=True)
