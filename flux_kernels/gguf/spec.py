"""State the rules of the GGUF format that reader and writer share.

They are numbers, limits, sizes, and what is not legal. Where the specification (ggml docs/gguf.md) and ggml's own reader
(gguf.cpp) differ, the stricter one holds, with two exceptions: ggml stops tensor names at 63 bytes, which tools for image
models do not, and reads no arrays of arrays.
"""

from __future__ import annotations

from math import prod

from ..formats import BlockFormat, PlainType

MAGIC = b"GGUF"
# Both are the same bytes; 3 only added big-endian files, which nobody writes for image models.
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
# gguf-py writes what torch has: weights of 3-D convolutions have five.
MAX_DIMS = 5
# ggml's own reader takes no more; of what has more, the first dimensions are written as one.
MAX_WRITTEN_DIMS = 4
# The specification's limit for keys, taken for tensor names too.
MAX_NAME_BYTES = 2**16 - 1
# The specification sets none; ggml itself reads only depth 1.
MAX_ARRAY_DEPTH = 4
# The largest real vocabularies need 2^24; bounds the work a sparse file can ask for.
MAX_HEADER_BYTES = 2**28
SCALARS = {  # GGUF value type -> (number in the file, struct code)
    "UINT8": (0, "B"),
    "INT8": (1, "b"),
    "UINT16": (2, "H"),
    "INT16": (3, "h"),
    "UINT32": (4, "I"),
    "INT32": (5, "i"),
    "FLOAT32": (6, "f"),
    "BOOL": (7, "?"),
    "UINT64": (10, "Q"),
    "INT64": (11, "q"),
    "FLOAT64": (12, "d"),
}
STRING, ARRAY = 8, 9
_REMOVED_TYPES = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"} | {
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}
# In a matrix product ggml quantizes activations to them.
_UNSTORED_TYPES = {9: "Q8_1", 15: "Q8_K"}


def shown(text: str, limit: int = 80) -> str:
    """Quote a name from a file so that it can neither break a terminal nor flood it."""
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}... ({len(text)} characters)"


def shown_path(path: str) -> str:
    """Return a path as it is, or quoted where it holds what a terminal would obey."""
    return path if path.isprintable() else repr(path)


def padded(size: int, alignment: int) -> int:
    """Round a number of bytes up to a multiple of `alignment`."""
    return -(-size // alignment) * alignment


def tensor_nbytes(row: BlockFormat | PlainType, shape: tuple[int, ...]) -> int:
    """Return the bytes a tensor of `shape` (torch order, weights) takes in a file."""
    return prod(shape) // row.block_size * row.type_size


def shape_problem(row: BlockFormat | PlainType, shape: tuple[int, ...]) -> str:
    """Say why no file can hold a tensor of this type and shape (torch order, weights); empty where it can."""
    row_weights = shape[-1] if shape else 1
    if row_weights % row.block_size:
        return f"{row.name} rows are whole blocks of {row.block_size} weights, got rows of {row_weights} weights"
    # As torch computes the strides of empty tensors.
    extent = tuple(max(dim, 1) for dim in shape)
    if max(prod(extent), tensor_nbytes(row, extent)) >= 2**63:
        return f"shape {list(shape)} of {row.name} is 2^63 elements or bytes or more"
    return ""


def alignment_problem(alignment: int) -> str:
    """Say why `alignment` (bytes) is not legal; empty where it is."""
    if 8 <= alignment < 2**32 and alignment & (alignment - 1) == 0:
        return ""
    return f"alignment {alignment} is not legal: a power of two from 8 to 2147483648 is, {DEFAULT_ALIGNMENT} is usual"


def type_problem(number: int, rows: dict[int, BlockFormat | PlainType]) -> str:
    """Say why a tensor cannot have this type number."""
    legal = ", ".join(f"{known} {rows[known].name}" for known in sorted(rows))
    if number in _REMOVED_TYPES:
        return f"ggml has removed type {number} ({_REMOVED_TYPES[number]}); convert the model again. Legal: {legal}"
    if number in _UNSTORED_TYPES:
        return f"type {number} ({_UNSTORED_TYPES[number]}) holds activations and is never stored. Legal: {legal}"
    return f"unknown tensor type {number}. Legal: {legal}"
