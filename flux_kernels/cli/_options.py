"""Options that several commands share, and the reading of their texts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import typer

from ..backends import ACTIVATION_DTYPES
from ..compute import dtype_name

DTYPES = {dtype_name(dtype): dtype for dtype in ACTIVATION_DTYPES}

Width = Annotated[int, typer.Option(help="Picture width in pixels.")]
Height = Annotated[int, typer.Option(help="Picture height in pixels.")]
Batch = Annotated[int, typer.Option(help="Pictures at once.")]


def one_of(names: Iterable[str], help: str, **settings: Any) -> Any:
    """Return a typer option that takes one of `names` and refuses all else.

    Args:
        names: what is legal.
        help: text in which "{}" stands for the names.
        settings: further arguments of `typer.Option`.
    """
    legal = tuple(names)

    def check(value: str | None) -> str | None:
        if value is not None and value not in legal:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(legal)}.")
        return value

    return typer.Option(help=help.format(f"{', '.join(legal[:-1])} or {legal[-1]}"), callback=check, **settings)


def comma_separated(text: str) -> list[str]:
    """Return the names of a comma-separated list, each once, without the spaces around them."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
