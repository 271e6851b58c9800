"""`flux-kernels warmup`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress


def warmup(
    gguf: Annotated[Path, typer.Option("--gguf", help="The transformer's GGUF file.", show_default=False)],
    width: Annotated[int, typer.Option(help="Picture width in pixels.")] = 1024,
    height: Annotated[int, typer.Option(help="Picture height in pixels.")] = 1024,
    batch: Annotated[int, typer.Option(help="Pictures at once.")] = 1,
    compute: Annotated[str, typer.Option(help='"exact", "fp16_accumulate" or "int8".')] = "exact",
    dtype: Annotated[str, typer.Option(help='"bfloat16" or "float16".')] = "bfloat16",
    as_json: Annotated[bool, typer.Option("--json", help="Print what was compiled as JSON.")] = False,
) -> None:
    """Compile ahead of time what a file needs on this card, so that the first image does not stall.

    The result stays in Triton's cache on disk (~/.triton/cache, or $TRITON_CACHE_DIR): run it once for each new version,
    card, file type or compute mode. Other picture sizes need at most a few kernels more. Nothing is compiled for a CPU.

    [bold]Example[/]

      flux-kernels warmup --gguf flux1-dev-Q4_K_S.gguf --compute int8
    """
    import torch

    from ..generation.base_pipeline import go_offline_quietly

    go_offline_quietly()
    from ..flux import load_flux
    from ..machine.warmup import warmup

    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype not in dtypes:
        raise typer.BadParameter(f"{dtype!r} is none of {', '.join(dtypes)}", param_hint="--dtype")
    model = load_flux(gguf, dtype=dtypes[dtype], compute=compute)
    console = Console(highlight=False, stderr=as_json)
    with Progress(console=console) as progress:
        task = progress.add_task("compiling", total=None)

        def show(done, total, compiled):
            s = compiled.signature
            progress.update(task, completed=done, total=total, description=f"{s.format} {s.m} x {s.k} x {s.n}")

        compiled = warmup(model, [(height, width)], batch=batch, on_compiled=show)
        progress.update(task, completed=max(1, len(compiled)), total=max(1, len(compiled)))
    if as_json:
        typer.echo(json.dumps([_as_dict(found) for found in compiled]))
    elif not compiled:
        console.print("Nothing to compile: on this machine the layers run on the torch backend (see flux-kernels doctor).")
    else:
        seconds = sum(found.seconds for found in compiled)
        console.print(f"{len(compiled)} kinds of calls are ready ({seconds:.1f} s).")


def _as_dict(compiled) -> dict:
    from ..compute import dtype_name

    s, choice = compiled.signature, compiled.choice
    call = dict(format=s.format, compute=s.compute, m=s.m, n=s.n, k=s.k, dtype=dtype_name(s.dtype))
    return call | dict(
        algorithm=choice.algorithm, tile=str(choice.tile or ""), why=choice.why, seconds=round(compiled.seconds, 3)
    )
