"""Describe a row to people: formula, geometry and a drawing of the block, all from the row itself."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass

from ._format import BlockFormat, Field, Layout

# How a format's file opens; a test holds every file to it.
_OPENING = re.compile(r"\w+: (?P<formula>x = [^,]+), (?P<codes>.+)\.")
# Characters of a drawn block, more where names of narrow fields need them.
_DRAWING_WIDTH = 72


@dataclass(frozen=True)
class FieldFacts:
    """Say where a field lies in a block: `offset` and `size` in bytes, `values` such as "2 x f16"."""

    name: str
    offset: int
    size: int
    values: str


@dataclass(frozen=True)
class FormatFacts:
    """State what a user who chooses a type wants to know of a row.

    Attributes:
        ggml_type: ggml's number of the type, as stored in GGUF tensor headers.
        file_type: llama.cpp's number (`general.file_type`) of a file of this type, None where it has none.
        formula: of a weight, such as "x = d * q", and codes: its codes and scales in words; "" where the file does not say.
        notes: how bits lie in the fields and what is exact, paragraphs; may be "".
        block_size: weights of a block, type_size: its bytes, sub_block: weights that share a scale.
        relative_rms: bound of the relative RMS error of quantizing gaussian weights, as a fraction.
        own_quantizer: whether the library has its own, or libggml's is used.
        triton: whether Triton kernels run it; the torch backend runs all.
        tensor_core_codes: whether few rows of x multiply the codes before the scales (`BlockFormat.code_tile`).
        table: the lookup table in words, "" where there is none.
        planes: whether rows are stored field by field where Triton runs them.
    """

    name: str
    ggml_type: int
    file_type: int | None
    formula: str
    codes: str
    notes: str
    bits_per_weight: float
    block_size: int
    type_size: int
    sub_block: int
    relative_rms: float
    own_quantizer: bool
    triton: bool
    tensor_core_codes: bool
    table: str
    planes: bool
    fields: tuple[FieldFacts, ...]
    source: str


def describe(fmt: BlockFormat) -> FormatFacts:
    """Collect the facts of a row."""
    opening = _OPENING.match(fmt.about or "")
    formula, codes = opening.group("formula", "codes") if opening else ("", "")
    fields = (FieldFacts(field.name, fmt.layout.offsets[field.name], field.size, _values(field)) for field in fmt.layout.fields)
    return FormatFacts(
        name=fmt.name,
        ggml_type=fmt.ggml_type,
        file_type=fmt.file_type,
        formula=formula,
        codes=codes,
        notes=(inspect.getdoc(fmt.decode) or "").partition("\n\n")[2],
        bits_per_weight=fmt.bits_per_weight,
        block_size=fmt.block_size,
        type_size=fmt.type_size,
        sub_block=fmt.sub_block,
        relative_rms=fmt.relative_rms,
        own_quantizer=fmt.quantize is not None,
        triton=fmt.decode_tile is not None,
        tensor_core_codes=fmt.code_tile is not None,
        table=_table(fmt),
        planes=fmt.planes,
        fields=tuple(fields),
        source=fmt.source,
    )


def _values(field: Field) -> str:
    return field.dtype if field.count == 1 else f"{field.count} x {field.dtype}"


def _table(fmt: BlockFormat) -> str:
    """Name the lookup table: a grid of vectors that is gathered from, or a few values."""
    if fmt.table is None:
        return ""
    size = fmt.table().numel()
    return f"grid of {size:,} bytes" if fmt.gathers else f"{size} values"


def draw_layout(layout: Layout) -> str:
    """Draw a block as boxes in file order, about as wide as their fields are long.

    Above each stands its offset in bytes.
    """
    rows = ["", "", "", ""]
    for field in layout.fields:
        texts = str(layout.offsets[field.name]), "", f" {field.name} ", f" {_values(field)} "
        width = max(*map(len, texts), _DRAWING_WIDTH * field.size // layout.type_size)
        for row, (text, edge, fill) in enumerate(zip(texts, " +||", " -  ", strict=True)):
            rows[row] += text.ljust(width + 1) if row == 0 else edge + text.ljust(width, fill)
    rows[0] += str(layout.type_size)
    line = rows[1] + "+"
    return "\n".join([rows[0], line, rows[2] + "|", rows[3] + "|", line])
