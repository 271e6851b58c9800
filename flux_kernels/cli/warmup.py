"""`flux-kernels warmup`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn

from ..report.amounts import counted
from ._options import DTYPES, Batch, Height, Width, one_of
from ._progress import progress


def warmup(
    gguf: Annotated[Path, typer.Option("--gguf", help="The transformer's GGUF file.", show_default=False)],
    width: Width = 1024,
    height: Height = 1024,
    batch: Batch = 1,
    compute: Annotated[str, typer.Option(help='"exact", "fp16_accumulate" or "int8".')] = "exact",
    dtype: Annotated[str, one_of(DTYPES, "Of the activations: {}.")] = "bfloat16",
    as_json: Annotated[bool, typer.Option("--json", help="Print what was compiled as JSON.")] = False,
) -> None:
    """Compile ahead of time what a file needs on this card, so that the first image does not stall.

    The result stays in Triton's cache on disk (~/.triton/cache, or $TRITON_CACHE_DIR): run it once for each new version,
    card, file type or compute mode. Other picture sizes need at most a few kernels more. Nothing is compiled for a CPU.

    [bold]Example[/]

      flux-kernels warmup --gguf flux1-dev-Q4_K_S.gguf --compute int8
    """
    from ..machine.warmup import warmup
    from ..models import load_transformer

    model = load_transformer(gguf, dtype=DTYPES[dtype], compute=compute)
    console = Console(highlight=False, stderr=as_json)
    with progress(console, MofNCompleteColumn()) as bar:
        task = bar.add_task("compiling", total=None)

        def show(done, total, compiled):
            s = compiled.signature
            bar.update(task, completed=done, total=total, description=f"{s.format} {s.m} x {s.k} x {s.n}")

        compiled = warmup(model, [(width, height)], batch=batch, on_compiled=show)
    if as_json:
        typer.echo(json.dumps([_as_dict(call) for call in compiled]))
    elif not compiled:
        console.print("Nothing to compile: on this machine the layers run on the torch backend (see flux-kernels doctor).")
    else:
        seconds = sum(call.seconds for call in compiled)
        console.print(f"Ready: {counted(len(compiled), 'kind')} of calls ({seconds:.1f} s).")


def _as_dict(compiled) -> dict:
    from ..compute import dtype_name

    s, choice = compiled.signature, compiled.choice
    call = dict(format=s.format, compute=s.compute, m=s.m, n=s.n, k=s.k, dtype=dtype_name(s.dtype))
    return call | dict(
        algorithm=choice.algorithm, tile=str(choice.tile or ""), why=choice.why, seconds=round(compiled.seconds, 3)
    )
