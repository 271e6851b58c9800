"""IQ2_XS: x = d*(sc+1/2)/4 * +-grid, 9-bit codes per 8, 4-bit sc per 16.

74 bytes per 256 weights, 2.3125 bits/weight.
"""

from __future__ import annotations

from torch import Tensor

from .._triton import jit, tl
from ._bits import bit_fields, even_signs, signed
from ._codebooks import IQ2_XS_GRID
from ._format import BlockFormat, Field, Layout
from ._tiles import gather_grid, halves_of_16, load_half, load_word, spread_fields_of_two, unpack_even_signs

LAYOUT = Layout(Field("d", "f16"), Field("qs", "u16", 32), Field("scales", "u8", 8))
TYPE_SIZE = tl.constexpr(LAYOUT.type_size)
QS = tl.constexpr(LAYOUT.offsets["qs"])
SCALES = tl.constexpr(LAYOUT.offsets["scales"])


def decode(d: Tensor, qs: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    """Decode superblocks: d [..., 1], qs int32 [..., 32], scales [..., 8] -> float32 [..., 256].

    The table is the grid, uint8 [512 * 8]. Each code is a 9-bit grid index below a 7-bit sign index; the nibbles of scales
    are sc in order. Exact (11 + 5 + 6 bits).
    """
    magnitudes = table.view(-1, 8)[qs & 511].float().flatten(-2)
    weights = signed(magnitudes, even_signs(qs >> 9))
    scale = d * (0.5 + bit_fields(scales, 4).flatten(-2)) * 0.25
    return (scale[..., None] * weights.unflatten(-1, (16, 16))).flatten(-2)


@jit
def decode_tile(row_ptr, block, i: tl.constexpr, table_ptr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Decode sub-blocks 2*i and 2*i+1 (32 weights) of superblock `block`."""
    d = load_half(row_ptr, block, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)
    first = load_word(row_ptr, block, QS, 64, 2 * i, TYPE_SIZE, NUM_BLOCKS, PLANES)
    second = load_word(row_ptr, block, QS, 64, 2 * i + 1, TYPE_SIZE, NUM_BLOCKS, PLANES)
    sc = load_word(row_ptr, block, SCALES, 8, i // 4, TYPE_SIZE, NUM_BLOCKS, PLANES) >> (8 * (i % 4))
    code = spread_fields_of_two(first, second, 8, 16)
    magnitudes = gather_grid(table_ptr, code & 511, 8)
    minus = unpack_even_signs((code >> 9) & 0x7F)
    scale = halves_of_16(d * (0.5 + (sc & 0xF).to(tl.float32)) * 0.25, d * (0.5 + ((sc >> 4) & 0xF).to(tl.float32)) * 0.25)
    return scale * tl.where(minus != 0, -magnitudes, magnitudes)


FORMAT = BlockFormat(
    name="IQ2_XS",
    ggml_type=17,
    file_type=20,
    block_size=256,
    sub_block=16,
    layout=LAYOUT,
    decode=decode,
    decode_tile=decode_tile,
    table=IQ2_XS_GRID.table,
    gathers=True,
    planes=True,
    relative_rms=0.33,
    source="ggml-common.h block_iq2_xs, iq2xs_grid; ggml-quants.c dequantize_row_iq2_xs",
    about=__doc__,
)
