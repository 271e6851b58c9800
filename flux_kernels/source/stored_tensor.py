"""One tensor of a file on disk, read row by row: bytes of a type at an offset.

Rows are read, not mapped: a mapped source counts as the process's memory page by page, and as address space at once, so its
peak would be the size of the file.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from io import FileIO
from math import prod

import torch
from torch import Tensor

from ..errors import GGUFError
from ..formats import FORMATS, PLAIN_TYPES
from ..gguf.spec import shown, shown_path
from ..ops import dequantize

FLOATS: dict[str, torch.dtype] = {
    **{name: plain.dtype for name, plain in PLAIN_TYPES.items() if plain.dtype.is_floating_point},
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
FP8 = ("F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class StoredTensor:
    """Say where a tensor lies and how it is decoded.

    Attributes:
        name: as in the file.
        path: of the file.
        offset: first byte, from the start of the file.
        type: a key of FLOATS or of FORMATS; any other is no weight.
        shape: weights, in torch order.
        scale: tensor that the values are multiplied by (scaled fp8): one number, or one a row.
    """

    name: str
    path: str
    offset: int
    type: str
    shape: tuple[int, ...]
    scale: StoredTensor | None = None

    @property
    def rows(self) -> int:
        """Size of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def quantized(self) -> bool:
        """Whether it holds blocks of a quantized type."""
        return self.type in FORMATS

    @property
    def row_nbytes(self) -> float:
        """Bytes of a row; a fraction where rows are shorter than a block (1-D)."""
        width = prod(self.shape[1:])
        fmt = FORMATS.get(self.type)
        return width / fmt.block_size * fmt.type_size if fmt else width * FLOATS[self.type].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return round(self.rows * self.row_nbytes)

    def check(self) -> None:
        """Raise GGUFError where the tensor cannot be weights."""
        if self.type not in FLOATS and self.type not in FORMATS:
            legal = ", ".join((*FLOATS, *FORMATS))
            raise GGUFError(f"{shown(self.name)} has type {self.type}, which cannot be weights here. Legal: {legal}.")
        if self.scale is not None and prod(self.scale.shape) not in (1, self.rows):
            raise GGUFError(
                f"{shown(self.scale.name)} has shape {list(self.scale.shape)} beside weights {list(self.shape)}; legal is one "
                "number, or one a row. Use the 16-bit file."
            )

    def raw(self, start: int, stop: int) -> Tensor:
        """Read rows as they are stored: uint8 [stop - start, row bytes...] for blocks, typed rows otherwise."""
        first = self.offset + round(start * self.row_nbytes)
        data = bytearray(round(stop * self.row_nbytes) - round(start * self.row_nbytes))
        with open(self.path, "rb", buffering=0) as file:
            file.seek(first)
            _read_into(file, memoryview(data), self)
        if not data:
            return torch.empty(0, dtype=torch.uint8)
        tensor = torch.frombuffer(data, dtype=torch.uint8)
        if self.quantized:
            row_bytes = FORMATS[self.type].row_bytes(self.shape[-1], self.name)
            return tensor.view(stop - start, *self.shape[1:-1], row_bytes) if len(self.shape) > 1 else tensor
        return tensor.view(FLOATS[self.type]).view(stop - start, *self.shape[1:])

    def mapped(self, start: int, stop: int, file: mmap.mmap) -> Tensor:
        """Map rows of an unscaled float tensor as they are stored; `file` is the whole file."""
        dtype, shape = FLOATS[self.type], (stop - start, *self.shape[1:])
        if not prod(shape):
            return torch.empty(shape, dtype=dtype)
        offset = self.offset + round(start * self.row_nbytes)
        return torch.frombuffer(file, dtype=dtype, count=prod(shape), offset=offset).view(shape)

    def read(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Read and decode rows: float32 [stop - start, ...] on `device`."""
        if self.quantized:
            # Blocks span rows of one weight.
            if len(self.shape) == 1:
                return dequantize(self.raw(0, self.rows).to(device), self.type)[start:stop]
            return dequantize(self.raw(start, stop).to(device), self.type)
        values = self.raw(start, stop).to(device).float()
        if self.scale is None:
            return values
        scale = self.scale.read(0, self.scale.rows, device).flatten()
        if scale.numel() > 1:
            scale = scale[start:stop].view(-1, *[1] * (values.dim() - 1))
        return values * scale


def _read_into(file: FileIO, view: memoryview, tensor: StoredTensor) -> None:
    """Fill `view`: one call stops at 2 GiB, and at the end of a file that shrank."""
    while view:
        count = file.readinto(view)
        if not count:
            raise GGUFError(f"{shown_path(tensor.path)} ends inside {shown(tensor.name)}. It was cut short: get it again.")
        view = view[count:]
