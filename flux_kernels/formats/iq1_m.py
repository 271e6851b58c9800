"""IQ1_M: x = d*(2*sc+1) * (grid +- 1/8), 11-bit codes per 8, 3-bit sc per 16.

56 bytes per 256 weights, 1.75 bits/weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._triton import jit, tl
from ._bits import bit_fields, word_fields, word_of_bytes
from ._codebooks import IQ1_S_GRID
from ._format import BlockFormat, Field, Layout
from ._tiles import gather_grid, halves_of_16, load_word, spread_fields, unpack_half

# The top nibbles of four 16-bit words are the half d, the highest last: 2^-7 is plausible.
_SCALE_BITS = ((0xFF, 0x00), (0x0F, 0x00)) * 3 + ((0xFF, 0x00), (0x0F, 0x20))
LAYOUT = Layout(Field("qs", "u8", 32), Field("qh", "u8", 16), Field("scales", "u8", 8, scale_bits=_SCALE_BITS))
TYPE_SIZE = tl.constexpr(LAYOUT.type_size)
QH = tl.constexpr(LAYOUT.offsets["qh"])
SCALES = tl.constexpr(LAYOUT.offsets["scales"])


def decode(qs: Tensor, qh: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    """Decode superblocks: qs [..., 32], qh [..., 16], scales [..., 8] -> float32 [..., 256].

    The table is the grid, uint8 [2048 * 8]. Nibble l of qh belongs to grid index l: three top bits, then the sign of the 1/8
    that is added to the grid's -1, 0 and 1. The four 16-bit words of scales hold four sc each, and in their top nibbles,
    lowest first, the half d. Exact (11 + 4 + 4 bits).
    """
    nibbles = bit_fields(qh, 4).flatten(-2).int()
    index = qs.int() | (nibbles & 7) << 8
    grid = table.view(torch.int8).view(-1, 8)[index]
    delta = 0.125 - 0.25 * (nibbles >> 3)
    sc = word_fields(word_of_bytes(scales.unflatten(-1, (4, 2))), 4, 3).flatten(-2)
    d_nibbles = (scales[..., 1::2] >> 4).unflatten(-1, (2, 2))
    d = (d_nibbles[..., 0] | d_nibbles[..., 1] << 4).view(torch.float16).float()
    scale = d * (2 * sc + 1)
    values = (grid + delta[..., None]).flatten(-2).unflatten(-1, (16, 16))
    return (scale[..., None] * values).flatten(-2)


@jit
def load_scale_pair(row_ptr, block, i: tl.constexpr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Load d * (2 * sc + 1) of sub-blocks 2*i and 2*i+1 as two float32 [BLOCK_N]."""
    low = load_word(row_ptr, block, SCALES, 8, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)
    high = load_word(row_ptr, block, SCALES, 8, 1, TYPE_SIZE, NUM_BLOCKS, PLANES)
    d = unpack_half(((low >> 12) & 0xF) | ((low >> 24) & 0xF0) | ((high >> 4) & 0xF00) | ((high >> 16) & 0xF000))
    sc = (low if i < 4 else high) >> (16 * ((i // 2) % 2) + 6 * (i % 2))
    return d * (2 * (sc & 7) + 1).to(tl.float32), d * (2 * ((sc >> 3) & 7) + 1).to(tl.float32)


@jit
def decode_tile(row_ptr, block, i: tl.constexpr, table_ptr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Decode sub-blocks 2*i and 2*i+1 (32 weights) of superblock `block`."""
    first, second = load_scale_pair(row_ptr, block, i, NUM_BLOCKS, PLANES)
    low = load_word(row_ptr, block, 0, 32, i, TYPE_SIZE, NUM_BLOCKS, PLANES)
    qh = load_word(row_ptr, block, QH, 16, i // 2, TYPE_SIZE, NUM_BLOCKS, PLANES) >> (16 * (i % 2))
    nibble = spread_fields(qh, 8, 4)
    index = (spread_fields(low, 8, 8) & 0xFF) | ((nibble & 7) << 8)
    delta = 0.125 - 0.25 * ((nibble >> 3) & 1).to(tl.float32)
    return halves_of_16(first, second) * (gather_grid(table_ptr, index, 8) + delta)


FORMAT = BlockFormat(
    name="IQ1_M",
    ggml_type=29,
    file_type=31,
    block_size=256,
    sub_block=16,
    layout=LAYOUT,
    decode=decode,
    decode_tile=decode_tile,
    table=IQ1_S_GRID.table,
    gathers=True,
    relative_rms=0.62,
    source="ggml-common.h block_iq1_m, iq1s_grid; ggml-quants.c dequantize_row_iq1_m",
    about=__doc__,
)
