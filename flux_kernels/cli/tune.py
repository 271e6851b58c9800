"""`flux-kernels tune`."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn

from ..backends import own_device
from ..report.amounts import counted
from ._options import DTYPES, Batch, Height, Width, comma_separated, one_of
from ._progress import progress

_COMPUTES = "exact,int8,fp16_accumulate"


def tune(
    formats: Annotated[str, typer.Option(help="ggml types, comma-separated.")] = "Q4_K,Q6_K,Q8_0",
    computes: Annotated[str, typer.Option("--compute", help="Compute modes, comma-separated.")] = _COMPUTES,
    width: Width = 1024,
    height: Height = 1024,
    batch: Batch = 1,
    model: Annotated[
        str, typer.Option(help="Whose calls: flux1-dev, flux2-klein-4b, z-image-turbo, ... An unknown name lists all.")
    ] = "flux1-dev",
    minutes: Annotated[float, typer.Option(help="Begin no new call after this time; a second run goes on.")] = 10.0,
    processes: Annotated[int, typer.Option(help="Processes that compile (each takes some 0.5 GB on the GPU).")] = 2,
    dtype: Annotated[str, one_of(DTYPES, "Of the activations: {}.")] = "bfloat16",
    again: Annotated[bool, typer.Option("--again", help="Measure anew what is up to date.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record's path and rows as JSON.")] = False,
) -> None:
    """Measure which kernel and tile is fastest for each call of a model's step on this card.

    Without it a table of defaults is used; with it the measured choice, from then on and in every program. The result is one
    file per card (flux-kernels doctor shows where); contribute it, so that others with this card need not measure.

    [bold]Examples[/]

      flux-kernels tune
      flux-kernels tune --formats Q4_K --compute exact --minutes 3
      flux-kernels tune --model z-image-turbo
      flux-kernels tune --width 1360 --height 768
    """
    from ..backends import BACKENDS, check_names, resolve
    from ..errors import BackendUnavailable
    from ..formats import get_format
    from ..machine.tune import tune
    from ..machine.tune_jobs import step_jobs
    from ..models.variant_calls import find_variant, variant_calls

    find_variant(model)
    device = own_device()
    names, modes = [get_format(name).name for name in comma_separated(formats)], comma_separated(computes)
    for mode in modes:
        check_names("triton", mode)
    refusal = "no GPU is seen" if device.type == "cpu" else BACKENDS["triton"].refusal(device, get_format(names[0]), "exact")
    if refusal:
        raise BackendUnavailable(f"There is nothing to tune: {refusal}. `flux-kernels doctor` tells more.")
    if computes == _COMPUTES:
        modes = [mode for mode in modes if BACKENDS["triton"].refusal(device, get_format(names[0]), mode) is None]
    for mode in modes:
        # Says why where this card refuses a mode that was asked for.
        resolve("triton", mode, device, get_format(names[0]))
    jobs = step_jobs(variant_calls(model, width=width, height=height, batch=batch), modes, names)
    console = Console(highlight=False, stderr=as_json)
    rows = []
    with progress(console, MofNCompleteColumn()) as bar:
        task = bar.add_task("tuning", total=len(jobs))

        def show(job, row):
            call = f"{job.format} {job.compute} {job.m} x {job.k} x {job.n}"
            bar.update(task, advance=1, description=call)
            if row is not None:
                rows.append(row)
                gain = row.default_ms / row.ms
                console.print(f"{call}: {row.algorithm} {row.tile or ''} {row.ms:.3f} ms, {gain:.2f} x the default")

        path = tune(jobs, device, dtype=DTYPES[dtype], minutes=minutes, again=again, processes=processes, on_row=show)
    if as_json:
        typer.echo(json.dumps(dict(record=str(path), measured=len(rows), jobs=len(jobs))))
    else:
        console.print(f"Written to {path}, {len(rows)} of {counted(len(jobs), 'call')} measured.")
