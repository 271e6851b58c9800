"""Q4_1: x = d * q + m, 4-bit codes, fp16 d and m per 32 weights.

20 bytes per 32 weights, 5 bits/weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._triton import jit, tl
from ._bits import bit_planes
from ._format import BlockFormat, Field, Layout
from ._libggml_fits import WEIGHTED_GRIDS, affine_fit, damped, row_mean_square
from ._pack import bytes_of, join_planes, pack_rows
from ._search import Blocks
from ._search_affine import HalfAffineSearch
from ._tiles import load_half_pair, load_nibbles

LAYOUT = Layout(Field("dm", "f16", 2), Field("qs", "u8", 16))
TYPE_SIZE = tl.constexpr(LAYOUT.type_size)
QS = tl.constexpr(LAYOUT.offsets["qs"])


def decode(dm: Tensor, qs: Tensor) -> Tensor:
    """Decode blocks: dm [..., 2], qs [..., 16] -> float32 [..., 32].

    dm is (d, m); low nibbles are weights 0-15, high nibbles 16-31. The product is exact (11 + 4 bits), the sum rounds once.
    """
    return bit_planes(qs, 4).flatten(-2) * dm[..., :1] + dm[..., 1:]


@jit
def decode_tile(row_ptr, block, i: tl.constexpr, table_ptr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Decode weights 32*i to 32*i+31 past `block` (each slice is one block)."""
    d, m = load_half_pair(row_ptr, block + i, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)
    q = load_nibbles(row_ptr, block + i, QS, 16, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)
    return q.to(tl.float32) * d[:, None] + m[:, None]


SEARCH = HalfAffineSearch(
    top=15,
    shrinks=((0, 0), (0.015, 0.015), (0.03, 0.03), (0.03, 0), (0, 0.03), (0.05, 0.05)),
    weighted_shrinks=[(low, high) for low in (-0.04, 0.01, 0.06, 0.12) for high in (-0.04, 0.01, 0.06, 0.12)],
)


def quantize(rows: Tensor, importance: Tensor | None) -> Tensor:
    """Quantize float32 rows [rows, K] to uint8 [rows, row bytes]."""
    b = Blocks.of_rows(rows, importance, 1, 32)
    others = []
    if b.w is not None:
        others.append(affine_fit(b.x, damped(b.x, b.w, row_mean_square(rows, 32)), 15, WEIGHTED_GRIDS))
    d, m, q = SEARCH(b, *others)
    return pack_rows(rows, LAYOUT, dm=torch.cat([d, m]), qs=join_planes(bytes_of(q), 4))


FORMAT = BlockFormat(
    name="Q4_1",
    ggml_type=3,
    file_type=3,
    block_size=32,
    sub_block=32,
    layout=LAYOUT,
    decode=decode,
    decode_tile=decode_tile,
    quantize=quantize,
    relative_rms=0.08,
    source="ggml-common.h block_q4_1",
    about=__doc__,
)
