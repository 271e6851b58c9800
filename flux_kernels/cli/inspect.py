"""`flux-kernels inspect`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..generation.memory_plan import GIB
from ..report.amounts import megabytes, size_text

if TYPE_CHECKING:
    from ..generation.inspect_file import FileFacts

# TypeCount.kind of the matrices inside the blocks.
BLOCK = "block"
_PLURALS = {"leftover": "(matrices outside the blocks)", "vector": "(biases and norm scales)"}


def inspect(
    file: Annotated[Path, typer.Argument(help="A GGUF file.", show_default=False)],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON, for machines.")] = False,
) -> None:
    """Show what a GGUF file holds: a transformer, or the T5 encoder of a FLUX.1 pipeline.

    That is its variant, layout, types, bits per weight and which card it fits, or why it is refused.

    Only the header is read, so it is quick on any size. The exit code is 1 for a file that would be refused.

    [bold]Examples[/]

      flux-kernels inspect flux1-dev-Q4_K_S.gguf
      flux-kernels inspect flux1-dev-Q4_K_S.gguf --tensors
      flux-kernels inspect flux1-dev-Q4_K_S.gguf --json | jq .fits
    """
    from ..generation.inspect_file import inspect_file

    facts = inspect_file(file)
    rows = _tensor_rows(file) if tensors and facts.types else []
    if as_json:
        typer.echo(json.dumps({**asdict(facts), **({"tensors": rows} if tensors else {})}))
    else:
        _print(Console(), facts, rows)
    if facts.refused:
        raise typer.Exit(1)


def _tensor_rows(file: Path) -> list[dict]:
    from ..gguf.file import read_gguf

    return [
        {"name": name, "type": tensor.format, "shape": list(tensor.shape), "bytes": tensor.nbytes}
        for name, tensor in read_gguf(file).tensors.items()
    ]


def _print(console: Console, facts: FileFacts, rows: list[dict]) -> None:
    console.print(f"[bold]{facts.path}[/], {size_text(facts.nbytes)}", highlight=False, soft_wrap=True)
    if facts.refused:
        console.print(f"[bold red]Refused:[/] {facts.refused}", highlight=False, soft_wrap=True)
    else:
        layout = f"layout {facts.layout}, " if facts.layout else ""
        console.print(f"{facts.variant}; {layout}{facts.naming} names", highlight=False, soft_wrap=True)
    for note in (*facts.notes, *([facts.settings] if facts.settings else [])):
        console.print(f"[yellow]Note:[/] {note}", highlight=False, soft_wrap=True)
    if facts.pipelines:
        console.print(f"For diffusers' {' and '.join(facts.pipelines)}", highlight=False, soft_wrap=True)
    if facts.types:
        console.print(
            f"{facts.parameters / 1e6:,.1f} M weights, {facts.bits_per_weight:.2f} bits per weight "
            f"({facts.block_bits_per_weight:.2f} inside the blocks)",
            highlight=False,
        )
        console.print(_types_table(facts))
    if rows:
        console.print(_tensors_table(rows))
    if facts.fits:
        _print_fits(console, facts)


def _types_table(facts: FileFacts) -> Table:
    """Give each class of block matrices a row, and what lies outside the blocks a row a type."""
    table = Table()
    table.add_column("tensors", overflow="fold")
    for heading in ("type", "count", "weights", "MB"):
        table.add_column(heading, justify="right")
    groups: dict[tuple[str, str], list] = {}
    for count in facts.types:
        title = count.tensor_class.removesuffix(".weight") if count.kind == BLOCK else _PLURALS[count.kind]
        groups.setdefault((title, count.type), []).append(count)
    for (title, kind), counts in sorted(groups.items(), key=lambda item: (item[0][0] in _PLURALS.values(), item[0])):
        weights, nbytes = sum(count.parameters for count in counts), sum(count.nbytes for count in counts)
        table.add_row(title, kind, str(sum(count.tensors for count in counts)), f"{weights:,}", megabytes(nbytes))
    return table


def _tensors_table(rows: list[dict]) -> Table:
    table = Table()
    table.add_column("tensor", overflow="fold")
    table.add_column("type")
    for heading in ("shape", "bytes"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(row["name"], row["type"], " x ".join(map(str, row["shape"])), f"{row['bytes']:,}")
    return table


def _print_fits(console: Console, facts: FileFacts) -> None:
    need = facts.resident_bytes + facts.overhead_bytes
    cards = "  ".join(f"{card} GB [{'green]fits' if fits else 'red]no'}[/]" for card, fits in facts.fits.items())
    console.print(f"Needs about {need / GIB:.2f} GiB of GPU memory while it runs: {cards}", highlight=False, soft_wrap=True)
    for held, by_card in facts.offloads.items():
        modes = "  ".join(f"{card} GB {mode}" for card, mode in by_card.items())
        console.print(f"generate --offload auto, {held}: {modes}", highlight=False, soft_wrap=True)
    console.print(f"[dim]Assumed: {facts.overhead_model}.[/]", highlight=False, soft_wrap=True)
