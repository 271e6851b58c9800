"""Make a case's inputs: packed rows, strided x, bias and branch, in shapes that are no whole tiles."""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor

from flux_kernels.formats import FORMATS, BlockFormat, Packed
from flux_kernels.machine.random_rows import random_rows
from flux_kernels.torch_backend import reference

from ..launches import DTYPES
from .cases import Case

# Flux's K are odd multiples of 1024 (3072, 15360) or of 4096: rows of K = 1024 have the alignment of those, 8 bytes for Q6_K.
K = 1024
RANK = 20  # of a branch: not a multiple of 16
# (M, N) of which no tile is whole: with N a multiple of 16, and not (which decides how wide y is stored)
_SHAPES = {
    "narrow": ((13, 80), (16, 77)),  # up to eight rows small M has the call
    "medium": ((33, 80), (17, 77)),
    **dict.fromkeys(("wide", "split_k"), ((70, 144), (65, 133))),
    "int8": ((70, 144), (33, 133)),
    "fp16": ((33, 144), (17, 133)),
    "small_m": ((2, 80), (7, 77)),
}
_UNPACKED = ((37, 40), (37, 37))


@dataclass(frozen=True)
class Inputs:
    """Hold x [M, K], packed rows, float32 weights [N, K], bias [N], branch ([M, R], [N, R]) or None."""

    fmt: BlockFormat
    x: Tensor
    data: Tensor
    weight: Tensor
    bias: Tensor
    branch: tuple[Tensor, Tensor] | None

    @property
    def packed(self) -> Packed:
        """Return the rows as kernels take them."""
        return Packed(self.data, self.fmt, self.fmt.planes)

    @property
    def dtype(self) -> torch.dtype:
        """Return x's dtype."""
        return self.x.dtype

    def exact(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return, in float64, y of weights rounded to `dtype`, and the magnitudes that bound its errors."""
        x, weight, bias = self.x.double(), self.weight.to(dtype).double(), self.bias.double()
        y, magnitude = x @ weight.T + bias, x.abs() @ weight.abs().T + bias.abs()
        if self.branch is not None:
            hidden, up = (part.double() for part in self.branch)
            y, magnitude = y + hidden @ up.T, magnitude + hidden.abs() @ up.abs().T
        return y, magnitude


def make(case: Case, k: int = K) -> Inputs:
    """Make a case's inputs, the same in every process."""
    fmt, dtype = FORMATS[case.format], DTYPES[case.dtype]
    seed = crc32(str(case).encode())
    generator = torch.Generator().manual_seed(seed)
    kernel = case.kernel.removesuffix("_branch").removesuffix("_rows")
    even = seed % 2 == 0
    m, n = _SHAPES.get(kernel, _UNPACKED)[0 if even else 1]
    data = random_rows(fmt, n, k, fmt.planes, seed=seed)
    x = _strided(torch.randn(m, k, generator=generator).to(dtype), *((8, 16) if even else (1, 3)))
    branch = None
    if case.kernel.endswith("_branch"):
        hidden, up = torch.randn(m, RANK, generator=generator), torch.randn(n, RANK, generator=generator) / 4
        branch = hidden.to(dtype), up.to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype)
    return Inputs(fmt, x, data, reference.dequantize(Packed(data, fmt, fmt.planes), torch.float32), bias, branch)


def _strided(x: Tensor, offset: int, padding: int) -> Tensor:
    """Return x [M, K] as columns `offset` and up of rows `padding` elements longer, NaN around it."""
    wide = x.new_full((x.shape[0], x.shape[1] + padding), float("nan"))
    view = wide[:, min(offset, padding) : min(offset, padding) + x.shape[1]]
    return view.copy_(x)
