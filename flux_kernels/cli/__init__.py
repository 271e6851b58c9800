"""The command line `flux-kernels`: one typer app, one file a command."""

from __future__ import annotations

from typing import Annotated

import typer

from ..generation.base_pipeline import go_offline_quietly
from ._errors import OneLineErrors
from ._help_text import help_text
from .bench import bench
from .demo import demo
from .doctor import doctor
from .formats import formats
from .generate import generate
from .inspect import inspect
from .measure import measure
from .plan import plan
from .quantize import quantize
from .tune import tune
from .warmup import warmup

__all__ = ["app"]

app = typer.Typer(
    name="flux-kernels",
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with [bold]flux-kernels demo[/], then [bold]flux-kernels doctor[/].",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from ..version import own_version

        typer.echo(f"flux-kernels {own_version()}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error arose.")] = False,
) -> None:
    """GGUF-quantized Flux and its relatives in diffusers: draw with it, look into it."""
    go_offline_quietly()


for _command in (demo, generate, inspect, formats, quantize, measure, plan, doctor, tune, warmup, bench):
    app.command(help=help_text(_command.__doc__ or ""))(_command)
