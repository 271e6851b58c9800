"""Q5_1: x = d * q + m, 5-bit codes, fp16 d and m per 32 weights.

24 bytes per 32 weights, 6 bits/weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._triton import jit, tl
from ._bits import bit_fields, bit_planes
from ._format import BlockFormat, Field, Layout
from ._libggml_fits import WEIGHTED_GRIDS, affine_fit, damped, row_mean_square
from ._pack import bytes_of, join_fields, join_planes, pack_rows
from ._search import Blocks
from ._search_affine import HalfAffineSearch
from ._tiles import load_half_pair, load_nibbles, load_word, unpack_bits

LAYOUT = Layout(Field("dm", "f16", 2), Field("qh", "u8", 4), Field("qs", "u8", 16))
TYPE_SIZE = tl.constexpr(LAYOUT.type_size)
QH = tl.constexpr(LAYOUT.offsets["qh"])
QS = tl.constexpr(LAYOUT.offsets["qs"])


def decode(dm: Tensor, qh: Tensor, qs: Tensor) -> Tensor:
    """Decode blocks: dm [..., 2], qh [..., 4], qs [..., 16] -> float32 [..., 32].

    dm is (d, m). The low nibbles of qs are weights 0-15, the high nibbles 16-31; bit j of the 32-bit qh is the fifth bit of
    weight j. The product is exact (11 + 5 bits); the addition rounds once.
    """
    codes = bit_planes(qs, 4).flatten(-2) | bit_fields(qh, 1).flatten(-2) << 4
    return codes * dm[..., :1] + dm[..., 1:]


@jit
def decode_tile(row_ptr, block, i: tl.constexpr, table_ptr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Decode weights 32*i to 32*i+31 past `block` (each slice is one block)."""
    d, m = load_half_pair(row_ptr, block + i, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)
    qh = load_word(row_ptr, block + i, QH, 4, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)
    qs = load_nibbles(row_ptr, block + i, QS, 16, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)
    q = qs.to(tl.uint32) | (unpack_bits(qh) << 4)
    return q.to(tl.float32) * d[:, None] + m[:, None]


SEARCH = HalfAffineSearch(
    top=31,
    shrinks=((0, 0), (0.015, 0.015), (0.03, 0.03), (0.03, 0), (0, 0.03), (0.05, 0.05)),
    weighted_shrinks=[(low, high) for low in (-0.02, 0.01, 0.05, 0.1) for high in (-0.02, 0.01, 0.05, 0.1)],
)


def quantize(rows: Tensor, importance: Tensor | None) -> Tensor:
    """Quantize float32 rows [rows, K] to uint8 [rows, row bytes]."""
    b = Blocks.of_rows(rows, importance, 1, 32)
    others = []
    if b.w is not None:
        others.append(affine_fit(b.x, damped(b.x, b.w, row_mean_square(rows, 32)), 31, WEIGHTED_GRIDS))
    d, m, q = SEARCH(b, *others)
    codes = bytes_of(q)
    return pack_rows(rows, LAYOUT, dm=torch.cat([d, m]), qh=join_fields(codes >> 4, 1), qs=join_planes(codes & 0xF, 4))


FORMAT = BlockFormat(
    name="Q5_1",
    ggml_type=7,
    file_type=9,
    block_size=32,
    sub_block=32,
    layout=LAYOUT,
    decode=decode,
    decode_tile=decode_tile,
    quantize=quantize,
    relative_rms=0.04,
    source="ggml-common.h block_q5_1",
    about=__doc__,
)
