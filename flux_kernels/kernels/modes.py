"""The compute modes as the Triton backend runs them.

Algorithms and sources of each, and the choice that a call runs with.
"""

from __future__ import annotations

from dataclasses import dataclass

from .tiles import Tile


@dataclass(frozen=True)
class Mode:
    """Describe a compute mode.

    Attributes:
        algorithms: what a call can run, by name.
        sources: files of this folder whose change makes a measurement old.
    """

    algorithms: tuple[str, ...]
    sources: tuple[str, ...]


MODES = {
    "exact": Mode(
        ("small_m", "fused", "split_k", "two_stage"),
        ("fused_gemm", "split_k", "small_m", "small_m_codes", "two_stage", "dequantize", "branch", "ldmatrix"),
    ),
    "fp16_accumulate": Mode(("fused",), ("fp16_gemm", "activations", "branch", "ldmatrix")),
    "int8": Mode(("two_stage", "row_scales"), ("int8_gemm", "unpack_int8", "activations", "branch")),
}
"""Compute mode -> what there is to know of it; the module of the same name runs it."""


@dataclass(frozen=True)
class Choice:
    """Name what a call runs.

    Attributes:
        algorithm: one of the mode's.
        tile: the kernel's, None where torch's matmul does the product.
        why: one phrase.
        rows: of the weight that are unpacked at a time, None for all; algorithms that decode in registers ignore it.
    """

    algorithm: str
    tile: Tile | None
    why: str
    rows: int | None = None

    @property
    def kernel_tile(self) -> Tile:
        """The tile of a choice whose product is a kernel's."""
        if self.tile is None:
            raise ValueError(f"{self.algorithm} needs a tile and was chosen without one.")
        return self.tile

    def __str__(self) -> str:
        chunks = f" in chunks of {self.rows} rows" if self.rows else ""
        return f"{self.algorithm} {self.tile}{chunks}" if self.tile else f"{self.algorithm}{chunks}"
