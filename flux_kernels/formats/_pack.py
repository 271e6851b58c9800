"""Put packed rows together: the inverse of `_bits` and of `Layout.split`, for the quantizers."""

from __future__ import annotations

import torch
from torch import Tensor

from ._format import Layout


def bytes_of(t: Tensor) -> Tensor:
    """Turn search results [G, B, n], integers of 0 to 255 in float32, into uint8 [n, G * B]."""
    return t.to(torch.uint8).flatten(0, 1).t().contiguous()


def join_planes(fields: Tensor, width: int) -> Tensor:
    """Join uint8 [..., 8 // width * n] fields of `width` bits to [..., n].

    Undoes `bit_planes(...).flatten(-2)`.
    """
    return _joined(fields.unflatten(-1, (8 // width, -1)).unbind(-2), width)


def join_fields(fields: Tensor, width: int) -> Tensor:
    """Join uint8 [..., n * 8 // width] fields of `width` bits to [..., n].

    Undoes `bit_fields(...).flatten(-2)`.
    """
    return _joined(fields.unflatten(-1, (-1, 8 // width)).unbind(-1), width)


def _joined(fields: tuple[Tensor, ...], width: int) -> Tensor:
    joined = fields[0].clone()
    for position, field in enumerate(fields[1:], start=1):
        joined |= field << position * width
    return joined


def pack_rows(rows: Tensor, layout: Layout, **fields: Tensor) -> Tensor:
    """Pack the blocks of `rows` [rows, K] to uint8 [rows, row bytes].

    Args:
        rows: what was quantized; only its shape is read.
        layout: the block's fields.
        fields: by name; "f16" fields float32 [count, 1, n] as searches return them, others uint8 [n, bytes].
    """
    parts = [_f16_bytes(fields[f.name]) if f.dtype == "f16" else fields[f.name] for f in layout.fields]
    return torch.cat(parts, dim=-1).reshape(rows.shape[0], -1)


def _f16_bytes(t: Tensor) -> Tensor:
    count = t.shape[0]
    return t.flatten(0, 1).t().reshape(-1).half().view(torch.uint8).view(-1, 2 * count)
