"""Pack eight 6-bit scales and eight 6-bit minimums to 12 bytes, as Q4_K and Q5_K do (torch side).

Bytes 0-3 hold sc 0-3, bytes 4-7 hold m 0-3 in their low six bits; bytes 8-11 hold the low nibbles of sc 4-7 (low) and
m 4-7 (high), whose top two bits sit in the top two bits of bytes 0-3 and 4-7. Source: ggml-quants.c get_scale_min_k4.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unpack_scales_and_mins(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Unpack uint8 [..., 12] to (sc, m), each uint8 [..., 8] with values 0 to 63."""
    a, b, c = scales.unflatten(-1, (3, 4)).unbind(-2)
    sc = torch.cat([a & 63, (c & 0xF) | (a >> 6) << 4], dim=-1)
    m = torch.cat([b & 63, (c >> 4) | (b >> 6) << 4], dim=-1)
    return sc, m


def pack_scales_and_mins(sc: Tensor, m: Tensor) -> Tensor:
    """Pack (sc, m), each uint8 [..., 8] with values 0 to 63, to uint8 [..., 12]."""
    a = sc[..., :4] | (sc[..., 4:] >> 4) << 6
    b = m[..., :4] | (m[..., 4:] >> 4) << 6
    c = (sc[..., 4:] & 0xF) | (m[..., 4:] & 0xF) << 4
    return torch.cat([a, b, c], dim=-1)
