"""`flux-kernels bench`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def bench(
    formats: Annotated[str, typer.Option(help="ggml types, comma-separated.")] = "Q4_K,Q6_K,Q8_0",
    peers: Annotated[bool, typer.Option("--peers", help="Other libraries too, where installed.")] = False,
    minutes: Annotated[float, typer.Option(help="Begin no new shape after this time.")] = 7.0,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each, in turn; the median counts.")] = 5,
    scale: Annotated[int, typer.Option(min=0, help="Divide M and N by this; 0: 1 on a GPU, 16 on a CPU.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Write the speeds of every call as a PNG.")] = None,
    contribute: Annotated[Path | None, typer.Option(help="Write the rows to this new CSV file, to send in.")] = None,
) -> None:
    """Time every linear call of a FLUX.1-dev step on this machine: unquantized, diffusers' GGUF layers, this library.

    A speed is shown only where the result is right, checked against float64 in the same run.

    [bold]Examples[/]

      flux-kernels bench
      flux-kernels bench --plot speed.png
      flux-kernels bench --formats Q4_K --peers --contribute my-card.csv
    """
    import torch

    from ..benchmark.ceilings import measure_ceilings
    from ..benchmark.linears import measure, summary
    from ..benchmark.providers import PROVIDERS
    from ..benchmark.record import append_csv, origin
    from ..benchmark.shapes import reduced, step_calls
    from ..benchmark.verdict import verdict
    from ..errors import FormatError
    from ..formats import get_format

    names = [get_format(name).name for name in formats.split(",")]
    if contribute is not None and contribute.exists():
        raise FormatError(f"{contribute} is there already. Name a new file for --contribute.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    scale = scale or (1 if device.type == "cuda" else 16)
    groups = ("base", "ours", "peer") if peers else ("base", "ours")
    wanted = [one.name for one in PROVIDERS.values() if one.group in groups and (peers or "compiled" not in one.name)]
    end, made_at, rows = time.monotonic() + 60 * minutes, origin(device), []
    console = Console(highlight=False)
    ceilings = measure_ceilings(device, dtype)
    work = [(name, call) for name in names for call in step_calls()]
    late = 0
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as bar:
        task = bar.add_task("measuring", total=len(work))
        for name, call in work:
            bar.update(task, description=f"{name} {call.where}")
            if time.monotonic() > end:
                late += 1
                continue
            for row in measure(name, reduced(call, scale), wanted, device, dtype, repeats, ceilings):
                rows.append(row)
                if contribute is not None:
                    append_csv(row | made_at, contribute)
            bar.advance(task)
    size = "" if scale == 1 else f", M and N divided by {scale}"
    console.print(f"{made_at['device']}, torch {made_at['torch']}, commit {made_at['commit']}{size}", soft_wrap=True)
    console.print(summary([row for row in rows if row["format"] in _complete(rows, len(work) // len(names))]), soft_wrap=True)
    whole = _complete(rows, len(work) // len(names))
    for line in verdict([row | made_at for row in rows if row["format"] in whole]):
        console.print(line, soft_wrap=True)
    for note in dict.fromkeys(f"{row['provider']}: {row['note']}" for row in rows if row["note"]):
        console.print(f"[dim]{note}[/]", soft_wrap=True)
    if late:
        console.print(
            f"{late} of {len(work)} shapes were not begun in {minutes:g} minutes; types they belong to are not summed."
        )
    measured = [row | made_at for row in rows if row["p50_ms"]]
    if plot is not None and measured:
        from ..benchmark.plots import speed_beside_rows

        part = plot.with_name(f"{plot.name}.part")
        part.write_bytes(speed_beside_rows(measured))
        part.replace(plot)
        console.print(f"Plot in [bold]{plot}[/].", soft_wrap=True)
    if contribute is not None:
        console.print(f"Rows in [bold]{contribute}[/]: add it under bench/results in a pull request.", soft_wrap=True)


def _complete(rows: list[dict], shapes: int) -> list[str]:
    """List the formats whose every shape was measured."""
    found: dict[str, set] = {}
    for row in rows:
        found.setdefault(row["format"], set()).add(row["where"])
    return [name for name, where in found.items() if len(where) == shapes]
