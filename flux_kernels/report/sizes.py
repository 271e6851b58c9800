"""Sizes in bytes, in words."""

from __future__ import annotations


def unit_of(nbytes: float) -> tuple[float, str]:
    """Return the bytes of the unit that a size is written in, and its name: GB from a thousand million bytes on, else MB."""
    return (1e9, "GB") if abs(nbytes) >= 1e9 else (1e6, "MB")


def size_text(nbytes: float, digits: int = 1) -> str:
    """Return a size in bytes as text with `digits` decimals: "6.8 GB", "12.4 MB"."""
    unit, name = unit_of(nbytes)
    return f"{nbytes / unit:,.{digits}f} {name}"
