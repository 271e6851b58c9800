"""Map ggml type names to rows: FORMATS, built from one explicit tuple of format files."""

from __future__ import annotations

from ..errors import FormatError
from . import (
    iq1_m,
    iq1_s,
    iq2_s,
    iq2_xs,
    iq2_xxs,
    iq3_s,
    iq3_xxs,
    iq4_nl,
    iq4_xs,
    mxfp4,
    nvfp4,
    q1_0,
    q2_0,
    q2_k,
    q3_k,
    q4_0,
    q4_1,
    q4_k,
    q5_0,
    q5_1,
    q5_k,
    q6_k,
    q8_0,
    tq1_0,
    tq2_0,
)
from ._describe import FieldFacts, FormatFacts, describe, draw_layout
from ._format import SLICE, SUPERBLOCK, BlockFormat, Field, Layout
from .packed import Packed
from .plain import PLAIN_TYPES, PlainType

# In the order of ggml's type numbers.
_FORMAT_FILES = (
    *(q4_0, q4_1, q5_0, q5_1, q8_0),
    *(q2_k, q3_k, q4_k, q5_k, q6_k),
    *(iq2_xxs, iq2_xs, iq3_xxs, iq1_s, iq4_nl, iq3_s, iq2_s, iq4_xs, iq1_m),
    *(tq1_0, tq2_0, mxfp4, nvfp4, q1_0, q2_0),
)

FORMATS: dict[str, BlockFormat] = {file.FORMAT.name: file.FORMAT for file in _FORMAT_FILES}


def get_format(name: str | BlockFormat) -> BlockFormat:
    """Return the row of a ggml type name such as "Q4_K"; raise FormatError with the legal names."""
    if isinstance(name, BlockFormat):
        return name
    if name not in FORMATS:
        hint = f" {name} names a kind of file; its block format is {name[:-2]}." if name[:-2] in FORMATS else ""
        raise FormatError(f"Unknown block format {name!r}. Known: {', '.join(FORMATS)}.{hint}")
    return FORMATS[name]


def types_by_name() -> dict[str, BlockFormat | PlainType]:
    """Map ggml's type names to the rows of all types a file may store, the plain types first."""
    return {**PLAIN_TYPES, **FORMATS}


def types_by_number() -> dict[int, BlockFormat | PlainType]:
    """Map ggml's type numbers to the rows of all types a file may store."""
    return {row.ggml_type: row for row in types_by_name().values()}


def type_row(name: str) -> BlockFormat | PlainType:
    """Return the row of any ggml type, plain or packed; raise FormatError with the legal names."""
    row = PLAIN_TYPES.get(name) or FORMATS.get(name)
    if row is None:
        raise FormatError(f"Unknown ggml type {name!r}. Known: {', '.join(types_by_name())}.")
    return row


def block_format(name: str) -> BlockFormat | None:
    """Return the row of a packed type, None for a plain type; raise FormatError for an unknown name."""
    row = type_row(name)
    return row if isinstance(row, BlockFormat) else None


__all__ = [
    "FORMATS",
    "PLAIN_TYPES",
    "SLICE",
    "SUPERBLOCK",
    "BlockFormat",
    "Field",
    "FieldFacts",
    "FormatFacts",
    "Layout",
    "Packed",
    "PlainType",
    "block_format",
    "describe",
    "draw_layout",
    "get_format",
    "type_row",
    "types_by_name",
    "types_by_number",
]
