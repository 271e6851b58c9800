"""IQ2_S: x = d*(sc+1/2)/4 * +-grid, 10-bit codes per 8, 4-bit sc per 16.

82 bytes per 256 weights, 2.5625 bits/weight.
"""

from __future__ import annotations

from torch import Tensor

from .._triton import jit, tl
from ._bits import bit_fields, signed
from ._codebooks import IQ2_S_GRID
from ._format import BlockFormat, Field, Layout
from ._tiles import gather_grid, halves_of_16, load_half, load_word, spread_fields, unpack_bits

LAYOUT = Layout(Field("d", "f16"), Field("qs", "u8", 64), Field("qh", "u8", 8), Field("scales", "u8", 8))
TYPE_SIZE = tl.constexpr(LAYOUT.type_size)
QS = tl.constexpr(LAYOUT.offsets["qs"])
QH = tl.constexpr(LAYOUT.offsets["qh"])
SCALES = tl.constexpr(LAYOUT.offsets["scales"])


def decode(d: Tensor, qs: Tensor, qh: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    """Decode superblocks: d [..., 1], qs [..., 64], qh and scales [..., 8] -> float32 [..., 256].

    The table is the grid, uint8 [1024 * 8]. The first 32 bytes of qs are the low bits of the grid indices, whose two top bits
    are the fields of qh in order; the last 32 bytes are the sign bits. The nibbles of scales are sc in order. Exact (11 + 5 +
    6 bits).
    """
    low, signs = qs.unflatten(-1, (2, 32)).unbind(-2)
    index = low.int() | bit_fields(qh, 2).flatten(-2).int() << 8
    weights = signed(table.view(-1, 8)[index].float().flatten(-2), signs)
    scale = d * (0.5 + bit_fields(scales, 4).flatten(-2)) * 0.25
    return (scale[..., None] * weights.unflatten(-1, (16, 16))).flatten(-2)


@jit
def decode_tile(row_ptr, block, i: tl.constexpr, table_ptr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Decode sub-blocks 2*i and 2*i+1 (32 weights) of superblock `block`."""
    d = load_half(row_ptr, block, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)
    low = load_word(row_ptr, block, QS, 64, i, TYPE_SIZE, NUM_BLOCKS, PLANES)
    signs = load_word(row_ptr, block, QS, 64, 8 + i, TYPE_SIZE, NUM_BLOCKS, PLANES)
    high = load_word(row_ptr, block, QH, 8, i // 4, TYPE_SIZE, NUM_BLOCKS, PLANES) >> (8 * (i % 4))
    sc = load_word(row_ptr, block, SCALES, 8, i // 4, TYPE_SIZE, NUM_BLOCKS, PLANES) >> (8 * (i % 4))
    index = (spread_fields(low, 8, 8) & 0xFF) | ((spread_fields(high, 8, 2) & 3) << 8)
    magnitudes = gather_grid(table_ptr, index, 8)
    scale = halves_of_16(d * (0.5 + (sc & 0xF).to(tl.float32)) * 0.25, d * (0.5 + ((sc >> 4) & 0xF).to(tl.float32)) * 0.25)
    return scale * tl.where(unpack_bits(signs) != 0, -magnitudes, magnitudes)


FORMAT = BlockFormat(
    name="IQ2_S",
    ggml_type=22,
    file_type=28,
    block_size=256,
    sub_block=16,
    layout=LAYOUT,
    decode=decode,
    decode_tile=decode_tile,
    table=IQ2_S_GRID.table,
    gathers=True,
    planes=True,
    relative_rms=0.29,
    source="ggml-common.h block_iq2_s, iq2s_grid; ggml-quants.c dequantize_row_iq2_s",
    about=__doc__,
)
