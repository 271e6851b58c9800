"""IQ4_NL: x = d * values[q], 4-bit codes into 16 fixed values, one fp16 scale.

18 bytes per 32 weights, 4.5 bits/weight.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .._triton import jit, tl
from ._bits import bit_planes
from ._codebooks import IQ4_VALUES, packed_words, value_table
from ._format import BlockFormat, Field, Layout
from ._libggml_fits import IQ4_PEAKS, damped, mean_square, scale_fit
from ._pack import join_planes, pack_rows
from ._search import Blocks
from ._search_scale import HalfScaleSearch, codebook, codes_of
from ._tiles import load_half, load_nibbles, lookup16

LAYOUT = Layout(Field("d", "f16"), Field("qs", "u8", 16))
TYPE_SIZE = tl.constexpr(LAYOUT.type_size)
QS = tl.constexpr(LAYOUT.offsets["qs"])
W0, W1, W2, W3 = map(tl.constexpr, packed_words(IQ4_VALUES))


def decode(d: Tensor, qs: Tensor, table: Tensor) -> Tensor:
    """Decode blocks: d [..., 1], qs [..., 16], table uint8 [16] -> float32 [..., 32]; exact (11 + 8 bits).

    Low nibbles are weights 0-15.
    """
    return table.view(torch.int8)[bit_planes(qs, 4).flatten(-2).int()] * d


@jit
def decode_tile(row_ptr, block, i: tl.constexpr, table_ptr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Decode weights 32*i to 32*i+31 past `block` (each slice is one block)."""
    d = load_half(row_ptr, block + i, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)
    q = load_nibbles(row_ptr, block + i, QS, 16, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)
    return lookup16(q, W0, W1, W2, W3) * d[:, None]


SEARCH = HalfScaleSearch(
    codebook(IQ4_VALUES),
    starts=(-140, -135, -130, -127, -124, -120, -116, -113, -110, -106, -102, 95, 100, 105, 109, 113, 117, 121, 125),
    weighted_starts=[-148 + 8 * i for i in range(10)],
)


def quantize(rows: Tensor, importance: Tensor | None) -> Tensor:
    """Quantize float32 rows [rows, K] to uint8 [rows, row bytes]."""
    b = Blocks.of_rows(rows, importance, 1, 32)
    w = None if b.w is None else damped(b.x, b.w, 2 * mean_square(b.x))
    d, y = SEARCH(b, scale_fit(b.x, w, SEARCH.snap, IQ4_PEAKS)[0])
    return pack_rows(rows, LAYOUT, d=d, qs=join_planes(codes_of(y, IQ4_VALUES), 4))


FORMAT = BlockFormat(
    name="IQ4_NL",
    ggml_type=20,
    file_type=25,
    block_size=32,
    sub_block=32,
    layout=LAYOUT,
    decode=decode,
    decode_tile=decode_tile,
    quantize=quantize,
    table=partial(value_table, IQ4_VALUES),
    planes=True,
    relative_rms=0.08,
    source="ggml-common.h block_iq4_nl, kvalues_iq4nl",
    about=__doc__,
)
