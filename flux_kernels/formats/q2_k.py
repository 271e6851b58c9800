"""Q2_K: x = d*sc*q - dmin*m, 2-bit codes, 4-bit sc and m per 16 weights.

84 bytes per 256 weights, 2.625 bits/weight.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .._triton import jit, tl
from ._bits import bit_planes
from ._code_tiles import load_codes, shift_codes
from ._format import BlockFormat, CodeTile, Field, Layout
from ._libggml_fits import WEIGHTED_GRIDS, super_affine
from ._pack import bytes_of, join_planes, pack_rows
from ._search import Blocks
from ._search_affine import SuperAffineSearch
from ._tiles import halves_of_16, load_bytes, load_half_pair, load_word

LAYOUT = Layout(Field("scales", "u8", 16), Field("qs", "u8", 64), Field("dm", "f16", 2))
TYPE_SIZE = tl.constexpr(LAYOUT.type_size)
QS = tl.constexpr(LAYOUT.offsets["qs"])
DM = tl.constexpr(LAYOUT.offsets["dm"])


def decode(scales: Tensor, qs: Tensor, dm: Tensor) -> Tensor:
    """Decode superblocks: scales [..., 16], qs [..., 64], dm [..., 2] -> float32 [..., 256].

    dm is (d, dmin). A scale byte holds sc in its low nibble and m in its high nibble. Each half of qs holds 128 weights: the
    lowest two bits of its 32 bytes are the first 32 of them. d*sc*q (11 + 4 + 2 bits) is exact; the subtraction rounds once.
    """
    codes = bit_planes(qs.unflatten(-1, (2, 32)), 2).flatten(-3).unflatten(-1, (16, 16))
    scale = dm[..., :1] * (scales & 0xF)
    offset = dm[..., 1:] * (scales >> 4)
    return (scale[..., None] * codes - offset[..., None]).flatten(-2)


@jit
def decode_tile(row_ptr, block, i: tl.constexpr, table_ptr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Decode sub-blocks 2*i and 2*i+1 (32 weights) of superblock `block`."""
    d, dmin = load_half_pair(row_ptr, block, DM, TYPE_SIZE, NUM_BLOCKS, PLANES)
    word = load_word(row_ptr, block, 0, 16, i // 2, TYPE_SIZE, NUM_BLOCKS, PLANES) >> (16 * (i % 2))
    scale = halves_of_16(d * (word & 0xF).to(tl.float32), d * ((word >> 8) & 0xF).to(tl.float32))
    offset = halves_of_16(dmin * ((word >> 4) & 0xF).to(tl.float32), dmin * ((word >> 12) & 0xF).to(tl.float32))
    qs = load_bytes(row_ptr, block, QS, 64, 32 * (i // 4), 32, TYPE_SIZE, NUM_BLOCKS, PLANES)
    q = (qs >> (2 * (i % 4))) & 3
    return scale * q.to(tl.float32) - offset


@jit
def code_tile(row_ptr, block, i: tl.constexpr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr, PACKED: tl.constexpr):
    """Load the codes of sub-blocks 2*i and 2*i+1, two bytes a value."""
    return shift_codes(load_codes(row_ptr, block, QS, 64, 32 * (i // 4), TYPE_SIZE, NUM_BLOCKS, PLANES), 2 * (i % 4), PACKED)


@jit
def code_scales(row_ptr, block, j: tl.constexpr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Load sc and m of sub-block j."""
    word = load_word(row_ptr, block, 0, 16, j // 4, TYPE_SIZE, NUM_BLOCKS, PLANES) >> (8 * (j % 4))
    return (word & 0xF).to(tl.float32), ((word >> 4) & 0xF).to(tl.float32)


@jit
def code_units(row_ptr, block, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Load (d, -dmin)."""
    d, dmin = load_half_pair(row_ptr, block, DM, TYPE_SIZE, NUM_BLOCKS, PLANES)
    return d, -dmin


SEARCH = SuperAffineSearch(
    top=3,
    levels=15,
    shrinks=[(low, high) for low in (0, 0.06, 0.12) for high in (0, 0.06, 0.12)],
    weighted_shrinks=[(low, high) for low in (-0.05, 0.18, 0.27) for high in (-0.05, 0.18, 0.27)],
    supers=((1, 15), (3 / 2, 15), (1, 14), (1, 13)),
    phase=0.05,
    other_always=False,
    other=partial(super_affine, top=3, levels=15, plain=[-0.5 + 0.1 * i for i in range(16)], weighted=WEIGHTED_GRIDS),
)


def quantize(rows: Tensor, importance: Tensor | None) -> Tensor:
    """Quantize float32 rows [rows, K] to uint8 [rows, row bytes]."""
    d, dmin, sc, m, q = SEARCH(Blocks.of_rows(rows, importance, 16, 16))
    qs = join_planes(bytes_of(q).unflatten(-1, (2, 128)), 2).flatten(-2)
    return pack_rows(rows, LAYOUT, scales=bytes_of(sc + 16 * m), qs=qs, dm=torch.cat([d, dmin]))


FORMAT = BlockFormat(
    name="Q2_K",
    ggml_type=10,
    file_type=10,
    block_size=256,
    sub_block=16,
    layout=LAYOUT,
    decode=decode,
    decode_tile=decode_tile,
    code_tile=CodeTile(code_tile, code_scales, code_units, bits=2, offsets=True),
    quantize=quantize,
    relative_rms=0.32,
    source="ggml-common.h block_q2_K",
    about=__doc__,
)
