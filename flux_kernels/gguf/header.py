"""Parse a GGUF header strictly.

No count, length or offset is used before it is checked against the bytes that are there. Layout, all little endian (source:
ggml docs/gguf.md and gguf.cpp): magic, version u32, tensor count u64, key-value count u64, the key-values, the tensor infos,
zeros up to the alignment, the tensor data. What is legal stands in spec.py.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from typing import Any, NoReturn

from ..errors import GGUFError
from ..formats import BlockFormat, PlainType, types_by_number
from .spec import (
    ALIGNMENT_KEY,
    ARRAY,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_ARRAY_DEPTH,
    MAX_DIMS,
    MAX_HEADER_BYTES,
    MAX_NAME_BYTES,
    SCALARS,
    STRING,
    VERSIONS,
    alignment_problem,
    padded,
    shape_problem,
    shown,
    tensor_nbytes,
    type_problem,
)

_SCALAR_NAMES = {number: name for name, (number, _) in SCALARS.items()}
_LEGAL_VALUES = ", ".join(
    f"{number} {name}" for number, name in sorted({**_SCALAR_NAMES, STRING: "STRING", ARRAY: "ARRAY"}.items())
)
_MIN_KEY_VALUE_BYTES = 8 + 1 + 4 + 1  # key length, one letter, value type, one byte of value
_MIN_ARRAY_BYTES = 4 + 8  # element type, length
_MIN_TENSOR_INFO_BYTES = 8 + 1 + 4 + 4 + 8  # name length, one letter, dimension count, type, offset
_FOREIGN_STARTS = {
    b"FUGG": "a byte-swapped GGUF file",
    b"PK\x03\x04": "a zip archive, such as a torch checkpoint",
    b"vers": "a Git LFS pointer: fetch the file itself",
    b"<!DO": "a web page: fetch the file itself",
    b"<!do": "a web page: fetch the file itself",
    b"<htm": "a web page: fetch the file itself",
    b"lmgg": "a ggml file older than GGUF",
    b"fmgg": "a ggml file older than GGUF",
    b"tjgg": "a ggml file older than GGUF",
}


@dataclass(frozen=True)
class TensorInfo:
    """Describe one validated entry of the tensor table.

    `shape` is in torch order, `offset` in bytes from the start of the data.
    """

    name: str
    row: BlockFormat | PlainType
    shape: tuple[int, ...]
    nbytes: int
    offset: int


@dataclass(frozen=True)
class Header:
    """Describe a validated header; `data_offset` in bytes from the start of the file."""

    version: int
    alignment: int
    metadata: dict[str, Any]
    metadata_types: dict[str, str]
    infos: list[TensorInfo]
    data_offset: int


class Cursor:
    """Read a mapped file front to back; every failure names the file, the byte and what was being read.

    path: as errors show it.
    """

    def __init__(self, buffer: mmap.mmap, path: str):
        self.buffer = buffer
        self.size = len(buffer)
        self.end = min(self.size, MAX_HEADER_BYTES)
        self.path = path
        self.position = 0
        self.where = "header"

    def fail(self, problem: str, at: int | None = None) -> NoReturn:
        """Raise the GGUFError; `at` is the byte, by default the next one to be read."""
        raise GGUFError(f"{self.path}: {self.where}, byte {self.position if at is None else at}: {problem}.") from None

    def take(self, count: int, what: str) -> int:
        """Step over `count` bytes and return where they start."""
        start = self.position
        if count > self.end - start:
            if self.end < self.size:
                self.fail(f"{what} needs {count} bytes, but a header may take {MAX_HEADER_BYTES} bytes in all")
            left = f"the file has {self.size - start} left of {self.size}"
            self.fail(f"{what} needs {count} bytes, but {left}: the number is wrong or the file is truncated")
        self.position = start + count
        return start

    def reserve(self, count: int, what: str) -> None:
        """Check that `count` bytes are left without stepping over them."""
        self.take(count, what)
        self.position -= count

    def u32(self, what: str) -> int:
        """Read a 32-bit number."""
        return struct.unpack_from("<I", self.buffer, self.take(4, what))[0]

    def u64(self, what: str) -> int:
        """Read a 64-bit number."""
        return struct.unpack_from("<Q", self.buffer, self.take(8, what))[0]

    def string(self, what: str) -> str:
        """Read a length and so many bytes of UTF-8."""
        length = self.u64(f"the length of {what}")
        start = self.take(length, what)
        try:
            return str(self.buffer[start : self.position], "utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8: {error.reason}", start + error.start)

    def name(self, what: str) -> str:
        """Read a key or tensor name: a string of 1 to 65535 bytes without NUL.

        C programs would cut it at a NUL.
        """
        start = self.position
        name = self.string(what)
        length = self.position - start - 8
        if not 0 < length <= MAX_NAME_BYTES or "\0" in name:
            self.fail(f"{what} is {shown(name)}, legal are 1 to {MAX_NAME_BYTES} bytes without NUL", start)
        return name


def parse_header(cursor: Cursor) -> Header:
    """Parse and validate everything before the tensor data, and that the tensors tile the data.

    Raises:
        GGUFError: where anything is not as it must be.
    """
    version = _read_version(cursor)
    tensor_count, key_count = cursor.u64("the tensor count"), cursor.u64("the key-value count")
    least = tensor_count * _MIN_TENSOR_INFO_BYTES + key_count * _MIN_KEY_VALUE_BYTES
    cursor.where = f"{key_count} key-values and {tensor_count} tensors"
    cursor.reserve(least, "what the counts announce")
    metadata, types = _read_metadata(cursor, key_count)
    alignment = _read_alignment(cursor, metadata, types)
    infos = _read_infos(cursor, tensor_count, alignment)
    data_offset = padded(cursor.position, alignment)
    cursor.where = "tensor data"
    _check_tiling(cursor, infos, data_offset, alignment)
    return Header(version, alignment, metadata, types, infos, data_offset)


def _read_version(cursor: Cursor) -> int:
    start = cursor.buffer[: len(MAGIC)]
    if start != MAGIC:
        guess = _FOREIGN_STARTS.get(start, "a safetensors file" if cursor.buffer[8:10] == b'{"' else "")
        cursor.fail(
            f"a GGUF file starts with {MAGIC!r}, this one with {start!r}" + (f"; it looks like {guess}" if guess else "")
        )
    cursor.take(len(MAGIC), "the magic")
    version = cursor.u32("the version")
    if version in VERSIONS:
        return version
    cursor.position -= 4
    if 0 < version >> 24 <= max(VERSIONS) and version & 0xFFFFFF == 0:
        cursor.fail(f"the file is big-endian (version {version >> 24}); only little-endian files are read. Convert it")
    cursor.fail(f"version {version} is not read, versions {VERSIONS[0]} and {VERSIONS[1]} are. Convert the model again")


def _read_metadata(cursor: Cursor, count: int) -> tuple[dict[str, Any], dict[str, str]]:
    metadata: dict[str, Any] = {}
    types: dict[str, str] = {}
    for index in range(count):
        cursor.where = f"key-value {index + 1} of {count}"
        start = cursor.position
        key = cursor.name("the key")
        cursor.where = f"key {shown(key)}"
        if key in metadata:
            cursor.fail("the key stands twice; keys must differ", start)
        metadata[key], types[key] = _read_value(cursor)
    return metadata, types


def _read_value(cursor: Cursor) -> tuple[Any, str]:
    number = cursor.u32("the value type")
    if number == STRING:
        return cursor.string("the string"), "STRING"
    if number == ARRAY:
        return _read_array(cursor, 1)
    name = _scalar_name(cursor, number)
    return _read_scalars(cursor, name, 1)[0], name


def _read_array(cursor: Cursor, depth: int) -> tuple[list[Any], str]:
    if depth > MAX_ARRAY_DEPTH:
        cursor.fail(f"arrays are nested deeper than {MAX_ARRAY_DEPTH}")
    number = cursor.u32("the element type")
    if number == ARRAY:
        return _read_arrays(cursor, depth)
    name = "STRING" if number == STRING else _scalar_name(cursor, number)
    count = cursor.u64("the array length")
    values = _read_strings(cursor, count) if number == STRING else _read_scalars(cursor, name, count)
    return values, f"ARRAY[{name}]"


def _read_arrays(cursor: Cursor, depth: int) -> tuple[list[Any], str]:
    count = cursor.u64("the array length")
    cursor.reserve(count * _MIN_ARRAY_BYTES, f"{count} arrays")
    arrays: list[Any] = []
    # The element type of an empty array of arrays is not known.
    inner = "ARRAY"
    for index in range(count):
        start = cursor.position
        values, value_type = _read_array(cursor, depth + 1)
        if index and value_type != inner:
            cursor.fail(f"an array holds both {inner} and {value_type}; one array has one element type", start)
        arrays.append(values)
        inner = value_type
    return arrays, f"ARRAY[{inner}]"


def _scalar_name(cursor: Cursor, number: int) -> str:
    if number not in _SCALAR_NAMES:
        cursor.fail(f"unknown value type {number}. Legal: {_LEGAL_VALUES}", cursor.position - 4)
    return _SCALAR_NAMES[number]


def _read_scalars(cursor: Cursor, name: str, count: int) -> list[Any]:
    code = SCALARS[name][1]
    start = cursor.take(count * struct.calcsize("<" + code), f"{count} x {name}")
    if name == "BOOL":
        invalid = cursor.buffer[start : cursor.position].translate(None, b"\0\1")
        if invalid:
            at = cursor.buffer.find(invalid[:1], start)
            cursor.fail(f"a BOOL is the byte 0 or 1, got {invalid[0]}", at)
    return list(struct.unpack_from(f"<{count}{code}", cursor.buffer, start))


def _read_strings(cursor: Cursor, count: int) -> list[str]:
    """Read an array of strings with one check and no call of ours a string.

    Vocabularies have up to a million.
    """
    cursor.reserve(count * 8, f"the lengths of {count} strings")
    buffer, end, position = cursor.buffer, cursor.end, cursor.position
    unpack = struct.Struct("<Q").unpack_from
    strings: list[str] = []
    append = strings.append
    try:
        for _ in range(count):
            start = position + 8
            if start > end:
                break
            position = start + unpack(buffer, position)[0]
            if position > end:
                break
            append(str(buffer[start:position], "utf-8"))
    except UnicodeDecodeError as error:
        cursor.fail(f"string {len(strings) + 1} of {count} is not UTF-8: {error.reason}", start + error.start)
    # The careful reader says what is wrong with the first that does not fit.
    if len(strings) < count:
        cursor.position = start - 8
        cursor.string(f"string {len(strings) + 1} of {count}")
    cursor.position = position
    return strings


def _read_alignment(cursor: Cursor, metadata: dict[str, Any], types: dict[str, str]) -> int:
    if ALIGNMENT_KEY not in metadata:
        return DEFAULT_ALIGNMENT
    cursor.where = f"key {ALIGNMENT_KEY!r}"
    if types[ALIGNMENT_KEY] != "UINT32":
        cursor.fail(f"the alignment is stored as {types[ALIGNMENT_KEY]}, legal is UINT32")
    problem = alignment_problem(metadata[ALIGNMENT_KEY])
    if problem:
        cursor.fail(problem)
    return metadata[ALIGNMENT_KEY]


def _read_infos(cursor: Cursor, count: int, alignment: int) -> list[TensorInfo]:
    rows = types_by_number()
    infos: dict[str, TensorInfo] = {}
    for index in range(count):
        cursor.where = f"tensor {index + 1} of {count}"
        start = cursor.position
        name = cursor.name("the tensor name")
        cursor.where = f"tensor {shown(name)}"
        if name in infos:
            cursor.fail("the tensor name stands twice; names must differ", start)
        infos[name] = _read_info(cursor, name, rows, alignment)
    return list(infos.values())


def _read_info(cursor: Cursor, name: str, rows: dict[int, BlockFormat | PlainType], alignment: int) -> TensorInfo:
    dims = cursor.u32("the number of dimensions")
    if dims > MAX_DIMS:
        cursor.fail(f"{dims} dimensions, legal are 0 to {MAX_DIMS}", cursor.position - 4)
    start = cursor.take(8 * dims, f"{dims} dimensions")
    shape = struct.unpack_from(f"<{dims}Q", cursor.buffer, start)[::-1]
    number = cursor.u32("the tensor type")
    if number not in rows:
        cursor.fail(type_problem(number, rows), cursor.position - 4)
    problem = shape_problem(rows[number], shape)
    if problem:
        cursor.fail(problem, start)
    offset = cursor.u64("the data offset")
    if offset % alignment:
        cursor.fail(f"data offset {offset} is not a multiple of the alignment, {alignment}", cursor.position - 8)
    return TensorInfo(name, rows[number], shape, tensor_nbytes(rows[number], shape), offset)


def _check_tiling(cursor: Cursor, infos: list[TensorInfo], data_offset: int, alignment: int) -> None:
    """Check that the tensors, in any order, lie one after another and fill the data section.

    A missing end of the last padding is legal (some writers leave it out). Unclaimed bytes are not: they mean that a count
    in the header is wrong, or that a download was appended to, and then no tensor is where the header says.
    """
    available = cursor.size - data_offset
    end = 0
    previous = None
    for info in sorted(infos, key=lambda info: (info.offset, info.nbytes)):
        cursor.where = f"tensor {shown(info.name)}"
        at = data_offset + info.offset
        if info.offset + info.nbytes > available:
            have = f"the tensor data has {max(available, 0)} bytes, from byte {data_offset}"
            cursor.fail(f"{info.nbytes} bytes at offset {info.offset} pass the end of the file: {have}", at)
        if info.offset < end:
            cursor.fail(f"its data overlaps that of tensor {shown(previous.name if previous else '')}", at)
        if info.offset > padded(end, alignment):
            unclaimed = f"{info.offset - padded(end, alignment)} bytes before its data belong to no tensor"
            cursor.fail(f"{unclaimed}; offset {padded(end, alignment)} is the next legal one", at)
        end, previous = info.offset + info.nbytes, info
    if available > padded(end, alignment):
        cursor.where = "end of the tensor data"
        unclaimed = f"{available - padded(end, alignment)} bytes after the last tensor belong to none"
        cursor.fail(f"{unclaimed}: the tensor count is wrong or the file was appended to", data_offset + end)
