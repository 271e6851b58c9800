"""Read GGUF files: a validated header, and tensors that are memory-mapped and never copied.

Writing: write.py.
"""

from __future__ import annotations

import mmap
import os
import stat
import sys
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..errors import FormatError, GGUFError
from ..formats import BlockFormat, PlainType
from .header import Cursor, Header, parse_header
from .spec import shown_path
from .split import check_parts, part_paths
from .write import planned_size, write_gguf

__all__ = ["GGUFFile", "GGUFTensor", "map_file", "planned_size", "read_gguf", "write_gguf"]

# Python names it from 3.13 on; the value is that of x86, ARM and RISC-V
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


@dataclass(frozen=True, eq=False)
class GGUFTensor:
    """Name one tensor of a file and map its bytes.

    Attributes:
        name: as in the file.
        block_format: the row of its type: a BlockFormat, or a PlainType such as F16.
        shape: weights, in torch order ([out, in] for a linear; the file's `ne` is reversed).
        nbytes: bytes in the file.
        offset: first byte, from the start of the file.
        path: of the file, of a split file the part that holds it.
    """

    name: str
    block_format: BlockFormat | PlainType
    shape: tuple[int, ...]
    nbytes: int
    offset: int
    path: str
    _map: mmap.mmap = field(repr=False)

    @property
    def format(self) -> str:
        """The ggml type name, a key of FORMATS or of PLAIN_TYPES."""
        return self.block_format.name

    @cached_property
    def data(self) -> Tensor:
        """Map the tensor, without a copy.

        Returns uint8 [*shape[:-1], row bytes] for block formats, the typed tensor of `shape` for plain types. The storage
        spans this tensor alone and lives as long as it is used; writes change memory, never the file.
        """
        return self._mapped(self.offset, self.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        """Map rows start..stop of the first dimension, as `data[start:stop]` but with a storage of their own.

        A 1-D tensor of a block format is cut in whole blocks; start and stop count weights.

        Raises:
            IndexError: where start..stop is not within the first dimension.
            FormatError: where a cut falls inside a block.
        """
        count = self.shape[0] if self.shape else 0
        if not 0 <= start <= stop <= count:
            raise IndexError(f"{self.name!r} has rows 0 to {count}, got {start} to {stop}.")
        width = prod(self.shape[1:])
        block_size = self.block_format.block_size
        if start * width % block_size or stop * width % block_size:
            raise FormatError(
                f"{self.name!r} is 1-D {self.format}, which can be cut at multiples of {block_size} weights, "
                f"got {start} to {stop}. Dequantize it first."
            )
        skipped = start * width // block_size * self.block_format.type_size
        return self._mapped(self.offset + skipped, (stop - start, *self.shape[1:]))

    def _mapped(self, offset: int, shape: tuple[int, ...]) -> Tensor:
        row = self.block_format
        dtype = torch.uint8
        if isinstance(row, PlainType):
            dtype = row.dtype
        else:
            shape = (*shape[:-1], shape[-1] // row.block_size * row.type_size)
        if not prod(shape):
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=prod(shape), offset=offset).view(shape)

    def __repr__(self) -> str:
        return f"GGUFTensor({self.name!r}, {self.format}, {list(self.shape)}, {self.nbytes} bytes)"


@dataclass(frozen=True, eq=False)
class GGUFFile:
    """Describe a GGUF file, which stays mapped as long as this or a tensor of it lives.

    Of a split file, any part stands for all: tensors of every part, the key-values of the first.

    Attributes:
        path: as given.
        version: 2 or 3.
        alignment: of the tensor data, in bytes.
        metadata: key -> int, float, bool, str or list of these, in file order.
        metadata_types: key -> "UINT32", "STRING", "ARRAY[INT32]", ...: what `write_gguf` needs next to the value.
        tensors: name -> GGUFTensor, in file order.
        size: of the file, in bytes; of a split file, of all parts.
        parts: paths of the parts; of a whole file its own.
    """

    path: str
    version: int
    alignment: int
    metadata: dict[str, Any]
    metadata_types: dict[str, str]
    tensors: dict[str, GGUFTensor]
    size: int
    parts: tuple[str, ...] = ()

    @property
    def typed_metadata(self) -> dict[str, tuple[str, Any]]:
        """The metadata in the form `write_gguf` takes: key -> (type, value)."""
        return {key: (self.metadata_types[key], value) for key, value in self.metadata.items()}

    def __repr__(self) -> str:
        return f"GGUFFile({self.path!r}, {len(self.tensors)} tensors, {len(self.metadata)} keys, {self.size} bytes)"


def read_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Read and validate a GGUF file's header and map its tensors.

    Args:
        path: a regular file, little-endian GGUF of version 2 or 3, or any part of a split file whose parts lie together.

    Raises:
        GGUFError: where the file cannot be read or anything in it is not as it must be; the message names the file, the
            byte, the key or tensor, and what is legal.

    Source: ggml docs/gguf.md, gguf.cpp.
    """
    path = os.fsdecode(path)
    file = _read_part(path)
    paths = part_paths(path, file.metadata)
    return file if len(paths) == 1 else _joined(path, [file if part == path else _read_part(part) for part in paths])


def _joined(path: str, parts: list[GGUFFile]) -> GGUFFile:
    """Return one file of all parts of a split file."""
    tensors: dict[str, GGUFTensor] = {}
    for part in parts:
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise GGUFError(f"{shown_path(path)}: {name!r} is in two parts, {tensors[name].path} and {part.path}.")
            tensors[name] = tensor
    check_parts(path, [part.metadata for part in parts], len(tensors))
    first, size, paths = parts[0], sum(part.size for part in parts), tuple(part.path for part in parts)
    return replace(first, path=path, tensors=tensors, size=size, parts=paths)


def _read_part(path: str) -> GGUFFile:
    """Read one file."""
    mapped = map_file(path)
    try:
        header = parse_header(Cursor(mapped, shown_path(path)))
    except GGUFError:
        # A traceback would keep the file open, which Windows minds.
        mapped.close()
        raise
    return GGUFFile(
        path=path,
        version=header.version,
        alignment=header.alignment,
        metadata=header.metadata,
        metadata_types=header.metadata_types,
        tensors=_tensors(path, header, mapped),
        size=len(mapped),
        parts=(path,),
    )


def _tensors(path: str, header: Header, mapped: mmap.mmap) -> dict[str, GGUFTensor]:
    return {
        info.name: GGUFTensor(info.name, info.row, info.shape, info.nbytes, header.data_offset + info.offset, path, mapped)
        for info in header.infos
    }


def map_file(path: str) -> mmap.mmap:
    """Map a regular file copy-on-write: torch wants writable memory, and the file must never change."""
    try:
        # Before opening, since a pipe would wait for its writer.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise GGUFError(f"{shown_path(path)}: not a regular file. A GGUF model is one file; give its path.")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                raise GGUFError(f"{shown_path(path)}: the file is empty. Get it again.")
            if sys.platform == "linux":
                # Without NORESERVE, Linux refuses private mappings larger than its memory
                flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
                return mmap.mmap(file.fileno(), size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    except GGUFError:
        raise
    # A path with a NUL raises ValueError.
    except (OSError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise GGUFError(f"{shown_path(path)}: cannot be read: {reason}.") from error
