"""IQ1_S: x = d*(2*sc+1) * (grid +- 1/8), 11-bit codes per 8, 3-bit sc per 32.

50 bytes per 256 weights, 1.5625 bits/weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._triton import jit, tl
from ._bits import word_fields
from ._codebooks import IQ1_S_GRID
from ._format import BlockFormat, Field, Layout
from ._tiles import gather_grid, load_half, load_word, spread_fields

LAYOUT = Layout(Field("d", "f16"), Field("qs", "u8", 32), Field("qh", "u16", 8))
TYPE_SIZE = tl.constexpr(LAYOUT.type_size)
QS = tl.constexpr(LAYOUT.offsets["qs"])
QH = tl.constexpr(LAYOUT.offsets["qh"])


def decode(d: Tensor, qs: Tensor, qh: Tensor, table: Tensor) -> Tensor:
    """Decode superblocks: d [..., 1], qs [..., 32], qh int32 [..., 8] -> float32 [..., 256].

    The table is the grid, uint8 [2048 * 8]. A word of qh holds the top three bits of its sub-block's four grid indices, then
    sc, then the sign of the 1/8 that is added to the grid's -1, 0 and 1. Exact (11 + 4 + 4 bits).
    """
    index = qs.unflatten(-1, (8, 4)).int() | word_fields(qh, 4, 3) << 8
    grid = table.view(torch.int8).view(-1, 8)[index].flatten(-2)
    delta = 0.125 - 0.25 * (qh >> 15)
    scale = d * (2 * (qh >> 12 & 7) + 1)
    return (scale[..., None] * (grid + delta[..., None])).flatten(-2)


@jit
def decode_tile(row_ptr, block, i: tl.constexpr, table_ptr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Decode sub-block i (32 weights) of superblock `block`."""
    d = load_half(row_ptr, block, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)
    low = load_word(row_ptr, block, QS, 32, i, TYPE_SIZE, NUM_BLOCKS, PLANES)
    qh = load_word(row_ptr, block, QH, 16, i // 2, TYPE_SIZE, NUM_BLOCKS, PLANES) >> (16 * (i % 2))
    index = (spread_fields(low, 8, 8) & 0xFF) | ((spread_fields(qh, 8, 3) & 7) << 8)
    scale = d * (2 * ((qh >> 12) & 7) + 1).to(tl.float32)
    delta = 0.125 - 0.25 * ((qh >> 15) & 1).to(tl.float32)
    return scale[:, None] * (gather_grid(table_ptr, index, 8) + delta[:, None])


FORMAT = BlockFormat(
    name="IQ1_S",
    ggml_type=19,
    file_type=24,
    block_size=256,
    sub_block=32,
    layout=LAYOUT,
    decode=decode,
    decode_tile=decode_tile,
    table=IQ1_S_GRID.table,
    gathers=True,
    planes=True,
    relative_rms=0.52,
    source="ggml-common.h block_iq1_s, iq1s_grid; ggml-quants.c dequantize_row_iq1_s",
    about=__doc__,
)
