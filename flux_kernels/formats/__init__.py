"""The registry: FORMATS maps a ggml type name to its row, built from one explicit tuple of format files."""

from __future__ import annotations

from ..errors import FormatError
from . import q2_k, q3_k, q4_0, q4_1, q4_k, q5_0, q5_1, q5_k, q6_k, q8_0
from ._format import SLICE, SUPERBLOCK, BlockFormat, Field, Layout
from .plain import PLAIN_TYPES, PlainType

_FORMAT_FILES = (q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k, q6_k)

FORMATS: dict[str, BlockFormat] = {file.FORMAT.name: file.FORMAT for file in _FORMAT_FILES}


def get_format(name: str | BlockFormat) -> BlockFormat:
    """Return the row named `name` (a ggml type name such as "Q4_K"); raise FormatError with the legal names."""
    if isinstance(name, BlockFormat):
        return name
    if name not in FORMATS:
        raise FormatError(f"Unknown block format {name!r}. Known: {', '.join(FORMATS)}.")
    return FORMATS[name]


__all__ = ["FORMATS", "PLAIN_TYPES", "SLICE", "SUPERBLOCK", "BlockFormat", "Field", "Layout", "PlainType", "get_format"]
