"""Torch helpers that split packed bytes into fields of 1, 2 or 4 bits."""

from __future__ import annotations

import torch
from torch import Tensor


def bit_planes(data: Tensor, width: int) -> Tensor:
    """Split uint8 [..., n] into fields of `width` bits, lowest first: [..., 8 // width, n], all low fields together."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=data.device)
    return data.unsqueeze(-2) >> shifts[:, None] & (1 << width) - 1


def bit_fields(data: Tensor, width: int) -> Tensor:
    """Split uint8 [..., n] into fields of `width` bits, lowest first: [..., n, 8 // width], each byte's fields together."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=data.device)
    return data.unsqueeze(-1) >> shifts & (1 << width) - 1
