"""IQ2_XXS: x = d*(sc+1/2)/4 * +-grid, 8-bit codes per 8, 4-bit sc per 32.

66 bytes per 256 weights, 2.0625 bits/weight.
"""

from __future__ import annotations

from torch import Tensor

from .._triton import jit, tl
from ._bits import even_signs, signed, word_fields, word_of_bytes
from ._codebooks import IQ2_XXS_GRID
from ._format import BlockFormat, Field, Layout
from ._tiles import gather_grid, load_half, load_word, spread_fields, unpack_even_signs

LAYOUT = Layout(Field("d", "f16"), Field("qs", "u8", 64))
TYPE_SIZE = tl.constexpr(LAYOUT.type_size)
QS = tl.constexpr(LAYOUT.offsets["qs"])


def decode(d: Tensor, qs: Tensor, table: Tensor) -> Tensor:
    """Decode superblocks: d [..., 1], qs [..., 64] -> float32 [..., 256]; exact (11 + 5 + 6 bits).

    The table is the grid, uint8 [256 * 8]. The eight bytes of a sub-block are four grid indices, then a word of four 7-bit
    sign indices and the scale on top.
    """
    index, word = qs.unflatten(-1, (8, 2, 4)).unbind(-2)
    word = word_of_bytes(word)
    magnitudes = table.view(-1, 8)[index.int()].float().flatten(-2)
    weights = signed(magnitudes, even_signs(word_fields(word, 4, 7)))
    scale = d * (0.5 + (word >> 28 & 0xF)) * 0.25
    return (scale[..., None] * weights).flatten(-2)


@jit
def decode_tile(row_ptr, block, i: tl.constexpr, table_ptr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Decode sub-block i (32 weights) of superblock `block`."""
    d = load_half(row_ptr, block, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)
    index = load_word(row_ptr, block, QS, 64, 2 * i, TYPE_SIZE, NUM_BLOCKS, PLANES)
    word = load_word(row_ptr, block, QS, 64, 2 * i + 1, TYPE_SIZE, NUM_BLOCKS, PLANES)
    magnitudes = gather_grid(table_ptr, spread_fields(index, 8, 8) & 0xFF, 8)
    minus = unpack_even_signs(spread_fields(word, 8, 7) & 0x7F)
    scale = d * (0.5 + (word >> 28).to(tl.float32)) * 0.25
    return scale[:, None] * tl.where(minus != 0, -magnitudes, magnitudes)


FORMAT = BlockFormat(
    name="IQ2_XXS",
    ggml_type=16,
    file_type=19,
    block_size=256,
    sub_block=32,
    layout=LAYOUT,
    decode=decode,
    decode_tile=decode_tile,
    table=IQ2_XXS_GRID.table,
    gathers=True,
    planes=True,
    relative_rms=0.37,
    source="ggml-common.h block_iq2_xxs, iq2xxs_grid; ggml-quants.c dequantize_row_iq2_xxs",
    about=__doc__,
)
