"""IQ4_XS: x = d * (sc-32) * values[q], 4-bit codes, 6-bit sc per 32 weights.

136 bytes per 256 weights, 4.25 bits/weight.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .._triton import jit, tl
from ._bits import bit_fields, bit_planes, word_fields
from ._codebooks import IQ4_VALUES, packed_words, value_table
from ._format import BlockFormat, Field, Layout
from ._libggml_fits import IQ4_PEAKS, super_scale
from ._pack import bytes_of, join_fields, join_planes, pack_rows
from ._search import Blocks
from ._search_scale import SuperScaleSearch, codebook, codes_of
from ._tiles import load_half, load_narrow, load_nibbles, load_word, lookup16, unpack_half

LAYOUT = Layout(Field("d", "f16"), Field("scales_h", "u16"), Field("scales_l", "u8", 4), Field("qs", "u8", 128))
TYPE_SIZE = tl.constexpr(LAYOUT.type_size)
SCALES_H = tl.constexpr(LAYOUT.offsets["scales_h"])
SCALES_L = tl.constexpr(LAYOUT.offsets["scales_l"])
QS = tl.constexpr(LAYOUT.offsets["qs"])
W0, W1, W2, W3 = map(tl.constexpr, packed_words(IQ4_VALUES))


def decode(d: Tensor, scales_h: Tensor, scales_l: Tensor, qs: Tensor, table: Tensor) -> Tensor:
    """Decode superblocks: d, scales_h [..., 1], scales_l [..., 4], qs [..., 128] -> float32 [..., 256].

    The table holds the values, uint8 [16]. Nibble i of scales_l and bits 2i and 2i+1 of scales_h are the scale of sub-block
    i, whose 16 bytes of qs hold weights 0-15 in the low nibbles. d*(sc-32) is exact (11 + 6 bits); the second product (8
    bits) may round.
    """
    sc = bit_fields(scales_l, 4).flatten(-2) | word_fields(scales_h[..., 0], 8, 2) << 4
    codes = bit_planes(qs.unflatten(-1, (8, 16)), 4).flatten(-2)
    scale = d * (sc - 32)
    return (scale[..., None] * table.view(torch.int8)[codes.int()]).flatten(-2)


@jit
def load_d_and_scales_h(row_ptr, block, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Load d as float32 and scales_h as uint32 (low 16 bits), [BLOCK_N] each.

    They share a word in file order.
    """
    if PLANES:
        d = load_half(row_ptr, block, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)
        scales_h = load_narrow(row_ptr, block, SCALES_H, 2, TYPE_SIZE, NUM_BLOCKS, PLANES)
    else:
        word = load_word(row_ptr, block, 0, 4, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)
        d = unpack_half(word)
        scales_h = word >> 16
    return d, scales_h


@jit
def decode_tile(row_ptr, block, i: tl.constexpr, table_ptr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Decode sub-block i (32 weights) of superblock `block`."""
    d, scales_h = load_d_and_scales_h(row_ptr, block, NUM_BLOCKS, PLANES)
    scales_l = load_word(row_ptr, block, SCALES_L, 4, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)
    sc = ((scales_l >> (4 * i)) & 0xF) | (((scales_h >> (2 * i)) & 3) << 4)
    q = load_nibbles(row_ptr, block, QS, 128, 16 * i, TYPE_SIZE, NUM_BLOCKS, PLANES)
    return (d * (sc.to(tl.float32) - 32))[:, None] * lookup16(q, W0, W1, W2, W3)


SEARCH = SuperScaleSearch(
    codebook(IQ4_VALUES),
    starts=(-140, -135, -130, -127, -124, -120, -116, -113, -110, -106, -102, 95, 100, 105, 109, 113, 117, 121, 125),
    weighted_starts=[-148 + 8 * i for i in range(10)],
    thorough_starts=[sign * (150 - 3 * i) for i in range(24) for sign in (-1, 1)],
    reach=32,
    supers=((1, 32), (127 / 104, 32), (-127 / 113, 32), (1, 31), (1, 30)),
    other=partial(super_scale, snap=codebook(IQ4_VALUES), peak_levels=IQ4_PEAKS, reach=32, spread=2),
)


def quantize(rows: Tensor, importance: Tensor | None) -> Tensor:
    """Quantize float32 rows [rows, K] to uint8 [rows, row bytes]."""
    d, sc, y = SEARCH(Blocks.of_rows(rows, importance, 8, 32))
    sc, codes = bytes_of(sc + 32), codes_of(y, IQ4_VALUES).unflatten(-1, (8, 32))
    scales_h, scales_l = join_fields(sc >> 4, 2), join_fields(sc & 0xF, 4)
    return pack_rows(rows, LAYOUT, d=d, scales_h=scales_h, scales_l=scales_l, qs=join_planes(codes, 4).flatten(-2))


FORMAT = BlockFormat(
    name="IQ4_XS",
    ggml_type=23,
    file_type=30,
    block_size=256,
    sub_block=32,
    layout=LAYOUT,
    decode=decode,
    decode_tile=decode_tile,
    quantize=quantize,
    table=partial(value_table, IQ4_VALUES),
    relative_rms=0.08,
    source="ggml-common.h block_iq4_xs, kvalues_iq4nl",
    about=__doc__,
)
