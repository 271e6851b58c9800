"""Define the row: all that the library knows of one ggml block type stands in one `BlockFormat`.

A row derives its geometry (bytes per block, offsets, bits per weight) from its fields, so that a format file states each
number once. Source of all layouts: ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import FormatError

_FIELD_DTYPES = {"u8": torch.uint8, "i8": torch.int8, "u16": torch.uint16, "u32": torch.uint32, "f16": torch.float16}
# Weights a Triton tile decoder returns at a time.
SLICE = 32
# Weights in one step of the fused kernels, and in one block of every K-quant.
SUPERBLOCK = 256


@dataclass(frozen=True)
class Field:
    """Name one member of a ggml block struct.

    Attributes:
        dtype: "u8", "i8", "u16", "u32" or "f16".
        count: values of `dtype`.
        scale_bits: of a scale that is no f16, what its bytes are in a plausible weight (random_rows makes such): for each
            byte in turn, and again from the first, the bits that take any value and the bits that are set.
    """

    name: str
    dtype: str
    count: int = 1
    scale_bits: tuple[tuple[int, int], ...] = ()

    @property
    def size(self) -> int:
        """Bytes of the field in one block."""
        return self.count * _FIELD_DTYPES[self.dtype].itemsize


class Layout:
    """Slice byte tensors by the fields of a block, which stand in file order."""

    def __init__(self, *fields: Field):
        self.fields = fields
        self.offsets: dict[str, int] = {}
        offset = 0
        for field in fields:
            self.offsets[field.name] = offset
            offset += field.size
        self.type_size = offset

    def split(self, data: Tensor, planes: bool = False) -> dict[str, Tensor]:
        """Split packed rows into fields.

        Args:
            data: uint8 [..., num_blocks * type_size].
            planes: whether the row is stored field by field (see `to_planes`).

        Returns:
            name -> [..., num_blocks, count]; "f16" fields as float32 (exact), "u16" and "u32" as int32 and int64, bytes as
            they are.
        """
        num_blocks = data.shape[-1] // self.type_size
        if not planes:
            blocks = data.unflatten(-1, (num_blocks, self.type_size))
        fields = {}
        for field in self.fields:
            start = self.offsets[field.name]
            if planes:
                plane = data[..., num_blocks * start : num_blocks * (start + field.size)]
                raw = plane.unflatten(-1, (num_blocks, field.size))
            else:
                raw = blocks[..., start : start + field.size]
            fields[field.name] = _typed(raw, field.dtype)
        return fields

    def to_planes(self, data: Tensor) -> Tensor:
        """Rearrange packed rows field by field, same size and dtype.

        All of the first field of the row comes first, then all of the second, ...
        """
        blocks = data.unflatten(-1, (-1, self.type_size))
        parts = blocks.split([field.size for field in self.fields], dim=-1)
        return torch.cat([part.flatten(-2) for part in parts], dim=-1)

    def from_planes(self, data: Tensor) -> Tensor:
        """Undo `to_planes`, bit for bit."""
        num_blocks = data.shape[-1] // self.type_size
        parts = data.split([num_blocks * field.size for field in self.fields], dim=-1)
        return torch.cat([part.unflatten(-1, (num_blocks, -1)) for part in parts], dim=-1).flatten(-2)


def _typed(raw: Tensor, dtype: str) -> Tensor:
    """View bytes as `dtype` and widen what torch has little arithmetic for (unsigned words, half)."""
    if dtype == "u8":
        return raw
    if dtype == "i8":
        return raw.view(torch.int8)
    typed = raw.contiguous().view(_FIELD_DTYPES[dtype])
    return typed.to({"f16": torch.float32, "u16": torch.int32, "u32": torch.int64}[dtype])


@dataclass(frozen=True)
class CodeTile:
    """Describe the integer codes of a format to the small-M kernel.

    weight = unit * scale * (code - zero) + offset. The functions are Triton's; see _code_tiles.py for their shapes.

    Attributes:
        codes: (row_ptr, block, i, NUM_BLOCKS, PLANES, PACKED) -> the codes of slice i (32 weights), two bytes a value.
        scales: (row_ptr, block, j, NUM_BLOCKS, PLANES) -> (scale, offset) of sub-block j, float32 [SPLITS, BLOCK_N] each.
        units: (row_ptr, block, NUM_BLOCKS, PLANES) -> what a superblock multiplies its scales and its offsets with, or None.
        bits: of an unsigned code, bits above them are ignored; 8 is a signed byte.
        zero: the code that stands for 0.
        offsets: whether the weights have an offset; `scales` returns its scale twice where they have none.
    """

    codes: Any
    scales: Any
    units: Any = None
    bits: int = 7
    zero: int = 0
    offsets: bool = False


@dataclass(frozen=True, eq=False)
class BlockFormat:
    """Describe one ggml block type: geometry, decodes, quantizer and error bound.

    Attributes:
        name: ggml's type name, such as "Q4_K".
        ggml_type: ggml's enum value, as stored in GGUF tensor headers.
        block_size: weights per block.
        sub_block: weights that share one scale.
        layout: the block's fields in file order.
        decode: torch decode; takes the fields of `Layout.split` by name ([..., num_blocks, count]) and returns float32
            [..., num_blocks, block_size], bit-equal to libggml's `type_traits.to_float`.
        decode_tile: Triton decode of one 32-weight slice; see kernels/__init__.py for the contract.
        quantize: torch quantizer of float32 rows [rows, K] (and importance [rows, K] or None) to uint8 [rows, row bytes].
        code_tile: the codes for the small-M kernel on tensor cores; None where a code stands for a table entry.
        table: builds the lookup table of the codebook formats (uint8, CPU), handed to both decodes; None where unused.
        gathers: whether `decode_tile` gathers from that table, a grid, in memory; the few values of a smaller table are
            immediates in its code.
        planes: whether Triton wants the row rearranged with `Layout.to_planes`, because blocks that are only 2-byte
            aligned cannot be loaded wide or by asynchronous copies.
        unpacker: makes, for a number of blocks, what unpacks as many on a CPU faster than `decode` and libggml do: uint8
            [blocks, type_size] -> (codes int8 [blocks, block_size], scales float32 [blocks, block_size / sub_block], whose
            float32 product is the decoded weight), in memory that its next call overwrites; None where there is no such way.
        relative_rms: bound of the relative RMS error of quantizing gaussian weights, as a fraction.
        source: where layout and decode were read.
        about: the docstring of the format's file, which opens with its formula and says its codes and geometry.
        file_type: llama.cpp's number (`general.file_type`) of a file whose matrices are of this type; None where it has none.
    """

    name: str
    ggml_type: int
    block_size: int
    sub_block: int
    layout: Layout
    decode: Callable[..., Tensor]
    relative_rms: float
    source: str
    about: str | None = None
    file_type: int | None = None
    decode_tile: Any = None
    quantize: Callable[[Tensor, Tensor | None], Tensor] | None = None
    table: Callable[[], Tensor] | None = None
    gathers: bool = False
    planes: bool = False
    code_tile: CodeTile | None = None
    unpacker: Callable[[int], Callable[[Tensor], tuple[Tensor, Tensor]]] | None = None

    @property
    def type_size(self) -> int:
        """Bytes per block."""
        return self.layout.type_size

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, scales included."""
        return self.type_size * 8 / self.block_size

    def __post_init__(self) -> None:
        # Made now, not at first use: a table first made while a graph is traced would be a fake tensor.
        tables = {} if self.table is None else {torch.device("cpu"): self.table()}
        object.__setattr__(self, "_tables", tables)

    def table_on(self, device: torch.device) -> Tensor:
        """Return the lookup table (uint8, 1-D) on `device`, made once per device."""
        tables: dict[torch.device, Tensor] = self._tables  # type: ignore[attr-defined]
        if not tables:
            raise FormatError(f"{self.name} has no lookup table.")
        if device in tables:
            return tables[device]
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise FormatError(
                f"{self.name}'s lookup table is not on {device} yet and cannot be copied there while a CUDA graph is captured. "
                "Call the layer once before the capture."
            )
        table = tables[torch.device("cpu")].to(device)
        # The fake table of a trace is not kept.
        if type(table) is Tensor:
            tables[device] = table
        return table

    def row_bytes(self, k: int, name: str = "") -> int:
        """Return the bytes of one row of `k` weights; raise FormatError where `k` is not whole blocks."""
        if k <= 0 or k % self.block_size:
            where = f' ({name}). Leave the layer out with exclude="{name}" or use' if name else "; use"
            raise FormatError(
                f"{self.name} needs K % {self.block_size} == 0, got K={k}{where} a type whose block size divides K, such as "
                "Q8_0 for multiples of 32."
            )
        return k // self.block_size * self.type_size

    def row_weights(self, row_bytes: int) -> int:
        """Return K of a row of `row_bytes` bytes; raise FormatError where that is not whole blocks."""
        if row_bytes % self.type_size:
            raise FormatError(
                f"{self.name} rows are whole blocks of {self.type_size} bytes, got {row_bytes} bytes in the last dimension."
            )
        return row_bytes // self.type_size * self.block_size

    def __repr__(self) -> str:
        return f"BlockFormat({self.name}, {self.type_size} bytes per {self.block_size} weights)"
