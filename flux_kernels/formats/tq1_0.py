"""TQ1_0: x = d * (q - 1), ternary codes, five to a byte, one fp16 scale.

54 bytes per 256 weights, 1.6875 bits/weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._triton import jit, tl
from ._format import BlockFormat, Field, Layout
from ._tiles import field_ptr, load_half

LAYOUT = Layout(Field("qs", "u8", 48), Field("qh", "u8", 4), Field("d", "f16"))
TYPE_SIZE = tl.constexpr(LAYOUT.type_size)
QH = tl.constexpr(LAYOUT.offsets["qh"])
D = tl.constexpr(LAYOUT.offsets["d"])


def unpack_digits(data: Tensor, count: int) -> Tensor:
    """Unpack the first `count` ternary digits of each byte: uint8 [..., n] -> int32 [..., count * n].

    All first digits come first. A byte is a fraction of 256 in base 3: after digit - 1 multiplications by 3 (modulo 256) the
    next carries the digit out.
    """
    powers = 3 ** torch.arange(count, dtype=torch.int32, device=data.device)
    rotated = data.to(torch.int32).unsqueeze(-2) * powers[:, None] & 0xFF
    return (rotated * 3 >> 8).flatten(-2)


def decode(qs: Tensor, qh: Tensor, d: Tensor) -> Tensor:
    """Decode superblocks: qs [..., 48], qh [..., 4], d [..., 1] -> float32 [..., 256]; exact.

    In order: five digits of the first 32 bytes of qs, five of the last 16, four of qh.
    """
    codes = torch.cat([unpack_digits(qs[..., :32], 5), unpack_digits(qs[..., 32:], 5), unpack_digits(qh, 4)], dim=-1)
    return (codes.float() - 1) * d


@jit
def decode_tile(row_ptr, block, i: tl.constexpr, table_ptr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Decode weights 32*i to 32*i+31 of superblock `block`."""
    d = load_half(row_ptr, block, D, TYPE_SIZE, NUM_BLOCKS, PLANES)
    lane = tl.arange(0, 32)
    qs = field_ptr(row_ptr, block, 0, 48, TYPE_SIZE, NUM_BLOCKS, PLANES)
    if i < 5:
        packed = tl.load(qs[:, None] + lane[None, :])
        power = tl.full([32], 3**i, tl.int32)
    elif i < 7:
        packed = tl.load(qs[:, None] + (32 + lane % 16)[None, :])
        power = tl.where(lane < 16, 9 ** (i - 5), 3 * 9 ** (i - 5))
    else:
        qh = field_ptr(row_ptr, block, QH, 4, TYPE_SIZE, NUM_BLOCKS, PLANES)
        first = qs[:, None] + (32 + lane % 16)[None, :]
        packed = tl.load(tl.where((lane < 16)[None, :], first, qh[:, None] + (lane % 4)[None, :]))
        low = tl.where(lane % 8 < 4, 1, 3)
        power = tl.where(lane < 16, 81, tl.where(lane < 24, low, 9 * low))
    rotated = (packed.to(tl.int32) * power[None, :]) & 0xFF
    return (((rotated * 3) >> 8).to(tl.float32) - 1) * d[:, None]


FORMAT = BlockFormat(
    name="TQ1_0",
    ggml_type=34,
    file_type=36,
    block_size=256,
    sub_block=256,
    layout=LAYOUT,
    decode=decode,
    decode_tile=decode_tile,
    planes=True,
    relative_rms=0.9,
    source="ggml-common.h block_tq1_0; ggml-quants.c dequantize_row_tq1_0",
    about=__doc__,
)
