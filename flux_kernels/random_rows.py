"""Packed rows for timing and warm-up: random codes with sane scales, made in no time for any format."""

from __future__ import annotations

import torch
from torch import Tensor

from .formats import BlockFormat

_SCALE = 1 / 64


def random_rows(fmt: BlockFormat, n: int, k: int, planes: bool = False, seed: int = 0) -> Tensor:
    """Make uint8 [n, row bytes] on the CPU: every byte random but the half-precision fields, which are 1/64.

    Random bytes (not zeros) keep a GPU's power draw, and so its clock, as real weights would.
    """
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (n, fmt.row_bytes(k)), dtype=torch.uint8, generator=generator)
    blocks = data.view(n, -1, fmt.type_size)
    for field in fmt.layout.fields:
        if field.dtype == "f16":
            start = fmt.layout.offsets[field.name]
            blocks[..., start : start + field.size] = torch.full((field.count,), _SCALE, dtype=torch.float16).view(torch.uint8)
    return fmt.layout.to_planes(data) if planes else data
