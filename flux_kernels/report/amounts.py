"""Amounts in words: sizes in bytes, and how many there are of a thing."""

from __future__ import annotations

_MB, _GB = 1e6, 1e9


def unit_of(nbytes: float) -> tuple[float, str]:
    """Return the bytes of the unit that a size is written in, and its name: GB from 1e9 bytes on, else MB."""
    return (_GB, "GB") if abs(nbytes) >= _GB else (_MB, "MB")


def size_text(nbytes: float, digits: int = 1) -> str:
    """Return a size in bytes as text with `digits` decimals: "6.8 GB", "12.4 MB"."""
    unit, name = unit_of(nbytes)
    return f"{nbytes / unit:,.{digits}f} {name}"


def megabytes(nbytes: float) -> str:
    """Return a size in bytes as the cell of a column of MB, with two decimals: "6,809.52"."""
    return f"{nbytes / _MB:,.2f}"


def counted(count: int, noun: str) -> str:
    """Return how many there are of a thing, whose plural ends in "s": "1 step", "1,200 steps"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
