"""`flux-kernels formats`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from ..formats import BlockFormat

# Heading -> what it means; short headings, so that a terminal of 80 columns holds them all.
_COLUMNS = {
    "type": "",
    "ggml": "number of the type in the headers of GGUF files",
    "bits": "per weight, scales included",
    "block": "weights of a block; rows of a weight (K) are whole blocks",
    "bytes": "of a block",
    "error": "bound of the relative RMS error of quantizing gaussian weights",
    "quantizer": "own, or libggml's (imatrix: needs an importance matrix; missing: libggml is not installed)",
    "table": "codes stand for a few values, or for vectors of a grid that are gathered from memory",
    "planes": "where Triton runs it, a row is stored field by field",
    "tiles": "in how many cases another than the default runs, and why: flux-kernels formats NAME",
}
_RIGHT = ("ggml", "bits", "block", "bytes", "error", "tiles")


def formats(
    name: Annotated[
        str | None, typer.Argument(help="A type, such as Q4_K: show its block byte by byte.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON, for machines.")] = False,
) -> None:
    """List the block types a GGUF file may store, or show formula and layout of the type NAME.

    Bits per weight are what a type costs in the file and in memory. The error is a bound, of the relative RMS error of quantizing
    gaussian weights: of two types of one size, take that of the smaller error, if it has a quantizer here.

    Rows are whole blocks: layers whose K is no multiple of a block's weights (64 in FLUX.1's image embedder) need another type.

    [bold]Examples[/]

      flux-kernels formats
      flux-kernels formats Q4_K
      flux-kernels formats --json | jq '.[] | select(.bits_per_weight < 3) | .name'
    """
    from ..formats import FORMATS, get_format

    console = Console(highlight=False)
    if name is not None:
        fmt = get_format(name.upper())
        if as_json:
            typer.echo(json.dumps(_facts(fmt)))
        else:
            _print_format(console, fmt)
        return
    rows = sorted(FORMATS.values(), key=lambda fmt: -fmt.bits_per_weight)
    if as_json:
        typer.echo(json.dumps([_facts(fmt) for fmt in rows]))
        return
    console.print(_table(rows))
    for heading, meaning in _COLUMNS.items():
        if meaning:
            console.print(f"[bold]{heading}[/]: {meaning}")


def _facts(fmt: BlockFormat) -> dict:
    from ..formats import describe
    from ._format_facts import odd_tiles_of

    return asdict(describe(fmt)) | {"libggml": _libggml(fmt), "odd_tiles": [asdict(row) for row in odd_tiles_of(fmt)]}


def _libggml(fmt: BlockFormat) -> str | None:
    """Tell whether libggml quantizes to a format: "yes", "with an importance matrix" or "no".

    None where it is not installed.
    """
    from ..errors import FormatError
    from ..torch_backend import libggml

    if not libggml.available():
        return None
    try:
        return "with an importance matrix" if libggml.requires_importance(fmt) else "yes"
    except FormatError:
        return "no"


def _table(rows: list[BlockFormat]) -> Table:
    from ._format_facts import odd_tiles_of

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in _COLUMNS:
        table.add_column(heading, justify="right" if heading in _RIGHT else "left")
    for fmt in rows:
        sizes = fmt.ggml_type, f"{fmt.bits_per_weight:g}", fmt.block_size, fmt.type_size
        lookup = "" if fmt.table is None else "grid" if fmt.gathers else "values"
        odd = len(odd_tiles_of(fmt))
        words = (
            f"{100 * fmt.relative_rms:g}%",
            _quantizer(fmt)[0],
            lookup,
            "yes" if fmt.planes else "",
            f"{odd} odd" if odd else "default",
        )
        table.add_row(fmt.name, *map(str, sizes), *words)
    return table


def _quantizer(fmt: BlockFormat) -> tuple[str, str]:
    """Name who quantizes to a format, in one word of the legend and as a phrase."""
    if fmt.quantize is not None:
        return "own", "own"
    return {
        None: ("missing", "libggml's, which is not installed"),
        "yes": ("libggml", "libggml's"),
        "with an importance matrix": ("imatrix", "libggml's, which needs an importance matrix"),
        "no": ("none", "none"),
    }[_libggml(fmt)]


def _print_format(console: Console, fmt: BlockFormat) -> None:
    from ..formats import describe, draw_layout
    from ._format_facts import facts_in_words, geometry, tiles_in_words

    facts = describe(fmt)
    console.print(f"[bold]{fmt.name}[/]  {escape(facts.formula)}  {facts.codes}", soft_wrap=True)
    console.print(geometry(fmt), soft_wrap=True)
    console.print(f"\n{draw_layout(fmt.layout)}\n", markup=False, soft_wrap=True)
    if facts.notes:
        console.print(" ".join(facts.notes.split()) + "\n", markup=False)
    table = Table(show_header=False)
    for title, phrase in facts_in_words(fmt, _quantizer(fmt)[1]).items():
        table.add_row(title, escape(phrase))
    table.add_row("tiles", escape("\n".join(tiles_in_words(fmt))))
    console.print(table)
