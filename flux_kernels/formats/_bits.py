"""Take packed bytes apart into fields of a few bits, and put words together from bytes, in torch."""

from __future__ import annotations

import torch
from torch import Tensor


def bit_planes(data: Tensor, width: int) -> Tensor:
    """Split uint8 [..., n] into fields of `width` bits: [..., 8 // width, n].

    All lowest fields come first, then all of the bits above.
    """
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=data.device)
    return data.unsqueeze(-2) >> shifts[:, None] & (1 << width) - 1


def bit_fields(data: Tensor, width: int) -> Tensor:
    """Split uint8 [..., n] into fields of `width` bits: [..., n, 8 // width].

    Each byte's fields stay together, lowest first.
    """
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=data.device)
    return data.unsqueeze(-1) >> shifts & (1 << width) - 1


def word_of_bytes(data: Tensor) -> Tensor:
    """Join uint8 [..., n] (n = 2 or 4, lowest first) to int32 [...].

    A 32-bit word keeps its bits, as a signed number.
    """
    shifts = torch.arange(0, 8 * data.shape[-1], 8, dtype=torch.int32, device=data.device)
    return (data.to(torch.int32) << shifts).sum(-1, dtype=torch.int32)


def word_fields(word: Tensor, count: int, width: int) -> Tensor:
    """Split int32 [...] into its lowest `count` fields of `width` bits, lowest first: int32 [..., count]."""
    shifts = torch.arange(0, count * width, width, dtype=torch.int32, device=word.device)
    return word.unsqueeze(-1) >> shifts & (1 << width) - 1


def even_signs(index: Tensor) -> Tensor:
    """Complete 7-bit sign indices to eight sign bits: int32 [...] -> uint8 [...].

    The eighth sign (bit 7) makes the number of minus signs even, so it is the parity of the seven.
    """
    parity = index ^ index >> 4
    parity = parity ^ parity >> 2
    parity = (parity ^ parity >> 1) & 1
    return (index | parity << 7).to(torch.uint8)


def signed(magnitudes: Tensor, signs: Tensor) -> Tensor:
    """Negate magnitudes [..., n], of a signed dtype, where sign bits are set.

    signs: uint8 [..., n / 8], lowest bit first.
    """
    return torch.where(bit_fields(signs, 1).flatten(-2).bool(), -magnitudes, magnitudes)
