"""One way to store a tensor: a ggml type, with or without a low-rank correction."""

from __future__ import annotations

import re
from typing import NamedTuple

from ..errors import FormatError
from ..formats import PLAIN_TYPES, type_row, types_by_name
from ..gguf.spec import tensor_nbytes
from ..models.low_rank_tensors import RANK_TYPE, low_rank_shapes

_TEXT = re.compile(r"(?P<type>\w+?)(\+r(?P<rank>[1-9][0-9]*))?")


class Option(NamedTuple):
    """Name a ggml type, and the rank of the 16-bit correction that is stored with it; rank 0 is none.

    Files and people write it as text: "Q4_K", or "Q4_K+r16".
    """

    type: str
    rank: int = 0

    @classmethod
    def parse(cls, text: str) -> Option:
        """Read the text of an option; raise FormatError where it is none, or of an unknown type."""
        match = _TEXT.fullmatch(text)
        if match is None or match["type"] not in types_by_name():
            known = ", ".join(types_by_name())
            raise FormatError(f"Unknown type {text!r}. Known: {known}, and each with a rank, as in Q4_K+r16.")
        return cls(match["type"], int(match["rank"] or 0))

    def __str__(self) -> str:
        return f"{self.type}+r{self.rank}" if self.rank else self.type

    @property
    def bits(self) -> float:
        """Bits per weight of the type, its rank left aside."""
        return type_row(self.type).bits_per_weight

    @property
    def is_plain(self) -> bool:
        """Whether the type is no block type, so that the tensor counts as unquantized."""
        return self.type in PLAIN_TYPES

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Tell whether rows of a matrix are whole blocks of the type, and the rank is not above the matrix's."""
        return shape[-1] % type_row(self.type).block_size == 0 and self.rank <= min(shape)

    def entries(self, name: str, shape: tuple[int, ...]) -> list[tuple[str, str, tuple[int, ...]]]:
        """Return (name, type, shape) of what a file holds: the tensor, then its correction's down and up."""
        halves = low_rank_shapes(name, shape, self.rank)
        return [(name, self.type, shape), *((half, RANK_TYPE, size) for half, size in halves.items())]

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a tensor, its correction included, padding and header left aside."""
        return sum(tensor_nbytes(type_row(type_name), size) for _, type_name, size in self.entries("", shape))
