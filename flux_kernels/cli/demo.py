"""`flux-kernels demo`."""

from __future__ import annotations

import json
import time
from math import isinf
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import TaskProgressColumn
from rich.table import Table

from ..report.amounts import counted, megabytes
from ._own_command import own_command
from ._progress import progress


def demo(
    out: Annotated[Path, typer.Option(help="Contact sheet to write; the GGUF files go to its folder.")] = Path("demo.png"),
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "--prompts", "-p", help="A row of the sheet; give it several times.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the first row's noise; each further row has the next seed. 2 by default.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; the model's own number by default.")] = None,
    backend: Annotated[str, typer.Option(help="auto, triton or torch.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON, for machines.")] = False,
) -> None:
    """Draw with the small model inside this package, in five types, without a network or a GPU.

    For each of 16 bit, Q8_0, Q6_K, Q4_K and mixed types a GGUF file is written, loaded without decoding it, swapped and drawn
    with. The contact sheet shows the pictures side by side with file size and error.

    [bold]Examples[/]

      flux-kernels demo
      flux-kernels demo -p "a red seven" -p "the digit 4 in blue" --seed 5 --out /tmp/sheet.png
    """
    started = time.perf_counter()
    console = Console(stderr=as_json)
    with console.status("loading diffusers and the embedded model"):
        from ..generation import demo as work
        from ..generation.embedded import words_note
    prompts = prompt or list(work.PROMPTS)
    seed = work.SEED if seed is None else seed
    with progress(console, TaskProgressColumn()) as bar:
        task = bar.add_task("quantizing", total=work.demo_steps(steps) * len(work.VARIANTS))
        drawn = work.run_demo(
            out.parent,
            prompts=prompts,
            seed=seed,
            backend=backend,
            steps=steps,
            step=lambda status: bar.update(task, advance=1, description=status),
        )
    work.demo_sheet(drawn, prompts).save(out, "PNG", optimize=True)
    if note := words_note(*prompts):
        console.print(f"[yellow]Note:[/] {escape(note)}", soft_wrap=True)
    seconds = time.perf_counter() - started
    if as_json:
        typer.echo(
            json.dumps({"sheet": str(out), "seconds": round(seconds, 2), "variants": [_plain(variant) for variant in drawn]})
        )
        return
    console.print(_table(drawn, len(prompts)))
    ran = ", ".join(sorted({variant.runs_as for variant in drawn[1:]}))
    console.print(f"Packed layers ran on the {ran} backend, {counted(len(prompts), 'prompt')}, {seconds:.0f} s in all.")
    console.print(f"Contact sheet: [bold]{out}[/]. Look into a file, or draw with it:", soft_wrap=True)
    for command in (f"inspect {drawn[-1].file}", f'generate --gguf {drawn[-1].file} --prompt "{prompts[0]}" --seed {seed}'):
        console.print(f"  {own_command()} {command}", soft_wrap=True, markup=False, highlight=False)


def _table(drawn: list, count: int) -> Table:
    table = Table(title="The embedded model against its own 16-bit file")
    table.add_column("", no_wrap=True)
    for heading in ("file, MB", "bits/weight", "weights off", "PSNR, dB", "same digit"):
        table.add_column(heading, justify="right", no_wrap=True)
    for variant in drawn:
        compared = ("", "", "") if variant is drawn[0] else _compared(variant, count)
        table.add_row(variant.name, megabytes(variant.nbytes), f"{variant.bits_per_weight:.2f}", *compared)
    return table


def _compared(variant: Any, count: int) -> tuple[str, str, str]:
    quality = "identical" if isinf(variant.psnr) else f"{variant.psnr:.1f}"
    return f"{variant.weight_error:.2%}", quality, f"{variant.same_digit} of {count}"


def _plain(variant: Any) -> dict[str, Any]:
    facts = {key: value for key, value in vars(variant).items() if key != "images"}
    return {**facts, "file": str(variant.file), "psnr": None if isinf(variant.psnr) else variant.psnr}
