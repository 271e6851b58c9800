"""Name the plain (unquantized) ggml types that a GGUF file may hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PlainType:
    """Name a plain ggml type, one weight per block.

    Attributes:
        ggml_type: ggml's enum value, as stored in GGUF tensor headers.
        file_type: llama.cpp's number (`general.file_type`) of a file whose matrices are of this type; None where it has none.
    """

    name: str
    ggml_type: int
    dtype: torch.dtype
    file_type: int | None = None

    block_size = 1

    @property
    def type_size(self) -> int:
        """Bytes per weight."""
        return self.dtype.itemsize

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight."""
        return 8.0 * self.type_size


PLAIN_TYPES: dict[str, PlainType] = {
    plain.name: plain
    for plain in (
        PlainType("F32", 0, torch.float32, file_type=0),
        PlainType("F16", 1, torch.float16, file_type=1),
        PlainType("I8", 24, torch.int8),
        PlainType("I16", 25, torch.int16),
        PlainType("I32", 26, torch.int32),
        PlainType("I64", 27, torch.int64),
        PlainType("F64", 28, torch.float64),
        PlainType("BF16", 30, torch.bfloat16, file_type=32),
    )
}
