"""IQ3_S: x = d*(2*sc+1) * +-grid, 9-bit codes per 4 weights, 4-bit sc per 32.

110 bytes per 256 weights, 3.4375 bits/weight.
"""

from __future__ import annotations

from torch import Tensor

from .._triton import jit, tl
from ._bits import bit_fields, signed
from ._codebooks import IQ3_S_GRID
from ._format import BlockFormat, Field, Layout
from ._tiles import gather_grid, load_half, load_word, spread_fields, spread_fields_of_two, unpack_bits

LAYOUT = Layout(
    Field("d", "f16"), Field("qs", "u8", 64), Field("qh", "u8", 8), Field("signs", "u8", 32), Field("scales", "u8", 4)
)
TYPE_SIZE = tl.constexpr(LAYOUT.type_size)
QS = tl.constexpr(LAYOUT.offsets["qs"])
QH = tl.constexpr(LAYOUT.offsets["qh"])
SIGNS = tl.constexpr(LAYOUT.offsets["signs"])
SCALES = tl.constexpr(LAYOUT.offsets["scales"])


def decode(d: Tensor, qs: Tensor, qh: Tensor, signs: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    """Decode superblocks -> float32 [..., 256]; exact (11 + 5 + 4 bits).

    d [..., 1]; qs [..., 64] the low bits of the grid indices; qh [..., 8] their ninth bits in order; signs [..., 32] one bit
    a weight; scales [..., 4] sc in the order of the nibbles; table uint8 [512 * 4].
    """
    index = qs.int() | bit_fields(qh, 1).flatten(-2).int() << 8
    weights = signed(table.view(-1, 4)[index].float().flatten(-2), signs)
    scale = d * (1 + 2 * bit_fields(scales, 4).flatten(-2))
    return (scale[..., None] * weights.unflatten(-1, (8, 32))).flatten(-2)


@jit
def decode_tile(row_ptr, block, i: tl.constexpr, table_ptr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Decode sub-block i (32 weights) of superblock `block`."""
    d = load_half(row_ptr, block, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)
    first = load_word(row_ptr, block, QS, 64, 2 * i, TYPE_SIZE, NUM_BLOCKS, PLANES)
    second = load_word(row_ptr, block, QS, 64, 2 * i + 1, TYPE_SIZE, NUM_BLOCKS, PLANES)
    high = load_word(row_ptr, block, QH, 8, i // 4, TYPE_SIZE, NUM_BLOCKS, PLANES) >> (8 * (i % 4))
    signs = load_word(row_ptr, block, SIGNS, 32, i, TYPE_SIZE, NUM_BLOCKS, PLANES)
    sc = load_word(row_ptr, block, SCALES, 4, 0, TYPE_SIZE, NUM_BLOCKS, PLANES) >> (4 * i)
    index = (spread_fields_of_two(first, second, 4, 8) & 0xFF) | ((spread_fields(high, 4, 1) & 1) << 8)
    magnitudes = gather_grid(table_ptr, index, 4)
    scale = d * (1 + 2 * (sc & 0xF)).to(tl.float32)
    return scale[:, None] * tl.where(unpack_bits(signs) != 0, -magnitudes, magnitudes)


FORMAT = BlockFormat(
    name="IQ3_S",
    ggml_type=21,
    file_type=26,
    block_size=256,
    sub_block=32,
    layout=LAYOUT,
    decode=decode,
    decode_tile=decode_tile,
    table=IQ3_S_GRID.table,
    gathers=True,
    planes=True,
    relative_rms=0.18,
    source="ggml-common.h block_iq3_s, iq3s_grid; ggml-quants.c dequantize_row_iq3_s",
    about=__doc__,
)
