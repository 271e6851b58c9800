"""One product without its tensors: what is chosen for it, and what decides its launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..compute import Branch
from ..formats import BlockFormat, Packed
from .tiles import Tile

Run = Callable[[Tensor, Packed, "Tensor | None", Tensor, "Branch | None"], None]
"""What computes a product: (x [M, K], weight, bias, y [M, N], branch), y written."""


@dataclass(frozen=True)
class Call:
    """Describe y[M, N] = x[M, K] @ w.T for a card: what a choice depends on.

    Attributes:
        fmt: of w.
        capability: of the card, None for one that is not NVIDIA's.
        processors: multiprocessors of the card.
        dtype: of x.
        branch: whether a low-rank branch is added.
    """

    fmt: BlockFormat
    m: int
    n: int
    k: int
    capability: tuple[int, int] | None
    processors: int
    dtype: torch.dtype = torch.bfloat16
    branch: bool = False


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


class Problem(NamedTuple):
    """Describe y[M, N] = x[M, K] @ weight.T + bias + hidden[M, R] @ up[N, R].T.

    Hashable, so that launches are prepared once.

    Attributes:
        m, n, k: sizes of the product.
        stride: elements between rows of x.
        row_bytes: of one packed row.
        fmt: the format's row.
        planes: whether rows are stored field by field.
        dtype: of x and y.
        bias: dtype of the bias, or None.
        rank: R of the low-rank branch, 0 where there is none.
        device: of everything.
    """

    m: int
    n: int
    k: int
    stride: int
    row_bytes: int
    fmt: BlockFormat
    planes: bool
    dtype: torch.dtype
    bias: torch.dtype | None
    rank: int
    device: torch.device

    @classmethod
    def of(cls, x: Tensor, weight: Packed, bias: Tensor | None, branch: Branch | None = None) -> Problem:
        """Describe the product of these tensors; x [M, K] has unit stride along K."""
        (m, k), (n, row_bytes) = x.shape, weight.data.shape
        bias_dtype, rank = None if bias is None else bias.dtype, 0 if branch is None else branch[0].shape[1]
        return cls(m, n, k, x.stride(0), row_bytes, weight.fmt, weight.planes, x.dtype, bias_dtype, rank, x.device)

    @classmethod
    def of_rows(cls, weight: Packed, dtype: torch.dtype) -> Problem:
        """Describe the decoding of a weight to a dtype, without a product."""
        n, row_bytes = weight.data.shape
        return cls(0, n, weight.k, weight.k, row_bytes, weight.fmt, weight.planes, dtype, None, 0, weight.data.device)

    @property
    def format_constants(self) -> dict:
        """The constexprs that a kernel takes from the format's row."""
        return dict(
            K=self.k,
            DECODE=self.fmt.decode_tile,
            NUM_BLOCKS=self.row_bytes // self.fmt.type_size,
            ROW_BYTES=self.row_bytes,
            PLANES=self.planes,
        )
