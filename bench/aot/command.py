"""What the command lines of the compile-time report and of the interpreter share."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import typer
from rich.console import Console

# Characters the tables take, also where the output is a file or a narrow terminal
_WIDTH = 170


def refuse_unknown(option: str, given: Iterable[object], known: Collection[object]) -> None:
    """Raise typer.BadParameter where an option, such as "formats", was given what is not known."""
    if unknown := set(given) - set(known):
        words = (", ".join(map(str, names)) for names in (sorted(unknown, key=str), known))
        raise typer.BadParameter("--{}: unknown {}; known: {}".format(option, *words))


def wide_console() -> Console:
    """Return a console on standard output that a table of many columns fits."""
    return Console(width=max(Console().width, _WIDTH))
