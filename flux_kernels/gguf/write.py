"""Write GGUF files: the whole header first, then one tensor after another.

The file is written next to the target and renamed when complete.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import GGUFError
from ..files import written_whole
from ..formats import BlockFormat, PlainType, types_by_name
from .spec import (
    ALIGNMENT_KEY,
    ARRAY,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_ARRAY_DEPTH,
    MAX_NAME_BYTES,
    MAX_WRITTEN_DIMS,
    SCALARS,
    STRING,
    VERSIONS,
    alignment_problem,
    padded,
    shape_problem,
    shown,
    shown_path,
    tensor_nbytes,
)

# Bytes a write call; more than one are needed for a tensor past 2 GiB on any system.
_CHUNK = 2**24

Data = Tensor | Callable[[], Tensor]
Metadata = Mapping[str, tuple[str, Any]]


@dataclass(frozen=True)
class _Plan:
    """Describe one checked tensor of a file to be written."""

    name: str
    row: BlockFormat | PlainType
    shape: tuple[int, ...]
    nbytes: int


def write_gguf(
    path: str | os.PathLike[str],
    tensors: Iterable[tuple[str, str, Iterable[int], Data]],
    metadata: Metadata,
    *,
    alignment: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Write a GGUF file of version 3 with the bytes gguf-py's GGUFWriter would write.

    The file appears under its name only when it is complete, replacing one that stands there, also one that is mapped.

    Args:
        path: a file name in an existing directory.
        tensors: (name, ggml type name, shape in torch order, data), in file order. data is a tensor as GGUFTensor.data
            gives it (uint8 [*shape[:-1], row bytes] for block formats, else the typed tensor of `shape`, any device), or
            a function that returns it, called when its turn comes: no more than one is held at a time.
        metadata: key -> (type, value) with types as in GGUFFile.metadata_types: "UINT32", "STRING", "ARRAY[INT32]", ...
        alignment: of the tensor data in bytes, a power of two from 8; None takes the metadata's general.alignment, else
            32. Another than 32 is added to the metadata where it is missing there.
        progress: called after every tensor with its name, the bytes of the file written so far, and those in all.

    Raises:
        GGUFError: where a name, type, shape, value or a tensor's data is not legal.
        OSError: where the file cannot be written.
    """
    target = os.path.realpath(os.fsdecode(path))
    if os.path.exists(target) and not os.path.isfile(target):
        raise GGUFError(f"{shown_path(target)}: exists and is not a regular file. Give the name of a file.")
    if not os.path.isdir(os.path.dirname(target)):
        raise GGUFError(f"{shown_path(os.path.dirname(target))} is no folder. Make it first.")
    tensors = list(tensors)
    plans, header, alignment = _plan([entry[:3] for entry in tensors], metadata, alignment)
    total = len(header) + sum(padded(plan.nbytes, alignment) for plan in plans)
    with written_whole(target) as part, part.open("xb") as file:
        file.write(header)
        for plan, entry in zip(plans, tensors):
            _write_tensor(file, plan, entry[3])
            file.write(bytes(padded(plan.nbytes, alignment) - plan.nbytes))
            if progress:
                progress(plan.name, file.tell(), total)
        file.flush()
        os.fsync(file.fileno())


def planned_size(tensors: Iterable[tuple[str, str, Iterable[int]]], metadata: Metadata, *, alignment: int | None = None) -> int:
    """Return the size in bytes of the file that `write_gguf` would write, exactly.

    It is given (name, type, shape) of the tensors and the key-values.
    """
    plans, header, alignment = _plan(list(tensors), metadata, alignment)
    return len(header) + sum(padded(plan.nbytes, alignment) for plan in plans)


def _plan(
    tensors: list[tuple[str, str, Iterable[int]]], metadata: Metadata, alignment: int | None
) -> tuple[list[_Plan], bytes, int]:
    """Check everything but the data; return the tensors, the padded header and the alignment."""
    alignment, metadata = _align(metadata, alignment)
    plans: dict[str, _Plan] = {}
    for name, format, shape in tensors:
        if name in plans:
            raise GGUFError(f"tensor {shown(name)} is given twice; names must differ.")
        plans[name] = _checked(name, format, tuple(shape))
    header = bytearray(MAGIC + struct.pack("<IQQ", VERSIONS[-1], len(plans), len(metadata)))
    for key, (value_type, value) in metadata.items():
        header += _name(key, "key") + _value(f"key {shown(key)}", value_type, value)
    offset = 0
    for plan in plans.values():
        dims = plan.shape[::-1]
        header += _name(plan.name, "tensor name")
        header += struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, plan.row.ggml_type, offset)
        offset += padded(plan.nbytes, alignment)
    header += bytes(padded(len(header), alignment) - len(header))
    return list(plans.values()), bytes(header), alignment


def _align(metadata: Metadata, alignment: int | None) -> tuple[int, Metadata]:
    """Make `alignment` and general.alignment agree."""
    if ALIGNMENT_KEY in metadata:
        value_type, stored = metadata[ALIGNMENT_KEY]
        if value_type != "UINT32" or alignment not in (None, stored):
            raise GGUFError(
                f"{ALIGNMENT_KEY} is {value_type} {stored!r}, legal is UINT32 and the alignment asked for, {alignment}."
            )
        alignment = stored
    elif alignment is None:
        alignment = DEFAULT_ALIGNMENT
    elif alignment != DEFAULT_ALIGNMENT:
        metadata = {**metadata, ALIGNMENT_KEY: ("UINT32", alignment)}
    problem = alignment_problem(alignment)
    if problem:
        raise GGUFError(f"{problem}.")
    return alignment, metadata


def _checked(name: str, format: str, shape: tuple[int, ...]) -> _Plan:
    rows = types_by_name()
    if format not in rows:
        raise GGUFError(f"tensor {shown(name)}: unknown type {format!r}. Legal: {', '.join(rows)}.")
    row = rows[format]
    problem = shape_problem(row, shape)
    if len(shape) > MAX_WRITTEN_DIMS:
        problem = f"{len(shape)} dimensions, legal are 0 to {MAX_WRITTEN_DIMS}"
    if not problem and min(shape, default=0) < 0:
        problem = f"negative dimension in shape {list(shape)}"
    if problem:
        raise GGUFError(f"tensor {shown(name)}: {problem}.")
    return _Plan(name, row, shape, tensor_nbytes(row, shape))


def _name(name: str, what: str) -> bytes:
    encoded = _string(f"{what} {shown(name)}", name)
    if not 8 < len(encoded) <= 8 + MAX_NAME_BYTES or b"\0" in encoded[8:]:
        raise GGUFError(f"{what} {shown(name)} is not legal: 1 to {MAX_NAME_BYTES} bytes without NUL are.")
    return encoded


def _string(where: str, value: Any) -> bytes:
    if not isinstance(value, str):
        raise GGUFError(f"{where}: a STRING must be str, got {type(value).__name__}.")
    try:
        encoded = value.encode()
    except UnicodeEncodeError as error:
        raise GGUFError(f"{where}: a STRING must be encodable as UTF-8: {error.reason}.") from None
    return struct.pack("<Q", len(encoded)) + encoded


def _value(where: str, value_type: str, value: Any) -> bytes:
    """Encode a value with its type number."""
    if value_type.startswith("ARRAY["):
        return struct.pack("<I", ARRAY) + _array(where, value_type, value, 1)
    if value_type == "STRING":
        return struct.pack("<I", STRING) + _string(where, value)
    return struct.pack("<I", _scalar(where, value_type)[0]) + _scalars(where, value_type, [value])


def _array(where: str, value_type: str, value: Any, depth: int) -> bytes:
    """Encode an array without the type number before it, which the arrays inside an array do not have."""
    element = value_type.removeprefix("ARRAY[").removesuffix("]")
    if not isinstance(value, (list, tuple)):
        raise GGUFError(f"{where}: {value_type} must be a list, got {type(value).__name__}.")
    length = struct.pack("<Q", len(value))
    if element == "STRING":
        return struct.pack("<I", STRING) + length + b"".join([_string(where, item) for item in value])
    if not element.startswith("ARRAY"):
        return struct.pack("<I", _scalar(where, element)[0]) + length + _scalars(where, element, value)
    if depth == MAX_ARRAY_DEPTH or (element == "ARRAY" and value):
        raise GGUFError(
            f"{where}: {value_type} is not legal for this value: name the innermost type, and nest at most {MAX_ARRAY_DEPTH}."
        )
    return struct.pack("<I", ARRAY) + length + b"".join([_array(where, element, item, depth + 1) for item in value])


def _scalar(where: str, value_type: str) -> tuple[int, str]:
    if value_type not in SCALARS:
        raise GGUFError(
            f"{where}: unknown value type {value_type!r}. Legal: {', '.join(SCALARS)}, STRING, and ARRAY[...] of them."
        )
    return SCALARS[value_type]


def _scalars(where: str, value_type: str, values: Any) -> bytes:
    code = SCALARS[value_type][1]
    if value_type == "BOOL" and not all(isinstance(value, bool) for value in values):
        raise GGUFError(f"{where}: a BOOL must be True or False.")
    try:
        return struct.pack(f"<{len(values)}{code}", *values)
    except (struct.error, OverflowError) as error:
        raise GGUFError(f"{where}: not {value_type}: {error}.") from None


def _write_tensor(file: BinaryIO, plan: _Plan, data: Data) -> None:
    """Check one tensor's data and write its bytes."""
    tensor = data if isinstance(data, Tensor) else data()
    if isinstance(plan.row, PlainType):
        dtype, shape = plan.row.dtype, plan.shape
    else:
        dtype = torch.uint8
        shape = (*plan.shape[:-1], plan.shape[-1] // plan.row.block_size * plan.row.type_size)
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise GGUFError(
            f"tensor {shown(plan.name)}: {plan.row.name} {list(plan.shape)} is stored as {dtype} {list(shape)}, "
            f"got {tensor.dtype} {list(tensor.shape)}."
        )
    tensor = tensor.detach().cpu().contiguous()
    if not tensor.numel():
        return
    raw = memoryview((ctypes.c_char * plan.nbytes).from_address(tensor.data_ptr())).cast("B")
    file.writelines(raw[start : start + _CHUNK] for start in range(0, plan.nbytes, _CHUNK))
