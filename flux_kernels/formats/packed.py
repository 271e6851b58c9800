"""A packed weight: the bytes, the format they are in, and how its rows are arranged."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ._format import BlockFormat


class Packed(NamedTuple):
    """Name a weight [..., N, K] in a block format; what kernels, backends and layers hand to each other.

    It is a tuple, because making it is part of every call and a frozen dataclass takes twice as long
    (docs/decisions/launch-cost.md). Two of them cannot be compared with ==: tensors cannot.

    Attributes:
        data: uint8 [..., N, row bytes].
        fmt: the row of the block type.
        planes: whether rows are stored field by field (`Layout.to_planes`), not in the order of a GGUF file.
        row_scale: float32 [N], the scales of compute="int8" where a layer keeps them; they follow from the other three.
    """

    data: Tensor
    fmt: BlockFormat
    planes: bool = False
    row_scale: Tensor | None = None

    @property
    def n(self) -> int:
        """Number of rows: output features."""
        return self.data.shape[-2]

    @property
    def k(self) -> int:
        """Weights of a row: input features."""
        return self.fmt.row_weights(self.data.shape[-1])

    def contiguous(self) -> Packed:
        """Return the same weight in contiguous memory."""
        scale = None if self.row_scale is None else self.row_scale.contiguous()
        return self._replace(data=self.data.contiguous(), row_scale=scale)

    def arranged(self, planes: bool) -> Packed:
        """Return the weight with its rows as planes or as a GGUF file stores them: itself where they are so."""
        if planes == self.planes:
            return self
        rearrange = self.fmt.layout.to_planes if planes else self.fmt.layout.from_planes
        return self._replace(data=rearrange(self.data), planes=planes)

    def rows(self, chosen: slice) -> Packed:
        """Return some rows, as views."""
        scale = None if self.row_scale is None else self.row_scale[chosen]
        return Packed(self.data[..., chosen, :], self.fmt, self.planes, scale)
