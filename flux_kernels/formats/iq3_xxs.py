"""IQ3_XXS: x = d*(sc+1/2)/2 * +-grid, 8-bit codes per 4, 4-bit sc per 32.

98 bytes per 256 weights, 3.0625 bits/weight.
"""

from __future__ import annotations

from torch import Tensor

from .._triton import jit, tl
from ._bits import even_signs, signed, word_fields, word_of_bytes
from ._codebooks import IQ3_XXS_GRID
from ._format import BlockFormat, Field, Layout
from ._tiles import gather_grid, load_half, load_word, spread_fields, spread_fields_of_two, unpack_even_signs

LAYOUT = Layout(Field("d", "f16"), Field("qs", "u8", 96))
TYPE_SIZE = tl.constexpr(LAYOUT.type_size)
QS = tl.constexpr(LAYOUT.offsets["qs"])


def decode(d: Tensor, qs: Tensor, table: Tensor) -> Tensor:
    """Decode superblocks: d [..., 1], qs [..., 96] -> float32 [..., 256]; exact (11 + 5 + 6 bits).

    The table is the grid, uint8 [256 * 4]. The first 64 bytes of qs are the grid indices; the last 32 are a word per
    sub-block of four 7-bit sign indices and the scale on top.
    """
    index, words = qs.split([64, 32], dim=-1)
    word = word_of_bytes(words.unflatten(-1, (8, 4)))
    magnitudes = table.view(-1, 4)[index.int()].float().flatten(-2).unflatten(-1, (8, 32))
    weights = signed(magnitudes, even_signs(word_fields(word, 4, 7)))
    scale = d * (0.5 + (word >> 28 & 0xF)) * 0.5
    return (scale[..., None] * weights).flatten(-2)


@jit
def decode_tile(row_ptr, block, i: tl.constexpr, table_ptr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Decode sub-block i (32 weights) of superblock `block`."""
    d = load_half(row_ptr, block, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)
    first = load_word(row_ptr, block, QS, 96, 2 * i, TYPE_SIZE, NUM_BLOCKS, PLANES)
    second = load_word(row_ptr, block, QS, 96, 2 * i + 1, TYPE_SIZE, NUM_BLOCKS, PLANES)
    word = load_word(row_ptr, block, QS, 96, 16 + i, TYPE_SIZE, NUM_BLOCKS, PLANES)
    magnitudes = gather_grid(table_ptr, spread_fields_of_two(first, second, 4, 8) & 0xFF, 4)
    minus = unpack_even_signs(spread_fields(word, 8, 7) & 0x7F)
    scale = d * (0.5 + (word >> 28).to(tl.float32)) * 0.5
    return scale[:, None] * tl.where(minus != 0, -magnitudes, magnitudes)


FORMAT = BlockFormat(
    name="IQ3_XXS",
    ggml_type=18,
    file_type=23,
    block_size=256,
    sub_block=32,
    layout=LAYOUT,
    decode=decode,
    decode_tile=decode_tile,
    table=IQ3_XXS_GRID.table,
    gathers=True,
    planes=True,
    relative_rms=0.23,
    source="ggml-common.h block_iq3_xxs, iq3xxs_grid; ggml-quants.c dequantize_row_iq3_xxs",
    about=__doc__,
)
