"""Q4_0: x = d * (q - 8), 4-bit codes, one fp16 scale per 32 weights.

18 bytes per 32 weights, 4.5 bits/weight.
"""

from __future__ import annotations

from torch import Tensor

from .._triton import jit, tl
from ._bits import bit_planes
from ._format import BlockFormat, Field, Layout
from ._libggml_fits import damped, peaks, row_mean_square, scale_fit
from ._pack import bytes_of, join_planes, pack_rows
from ._search import Blocks
from ._search_scale import HalfScaleSearch, integers
from ._tiles import load_half, load_nibbles

LAYOUT = Layout(Field("d", "f16"), Field("qs", "u8", 16))
TYPE_SIZE = tl.constexpr(LAYOUT.type_size)
QS = tl.constexpr(LAYOUT.offsets["qs"])


def decode(d: Tensor, qs: Tensor) -> Tensor:
    """Decode blocks: d [..., 1], qs [..., 16] -> float32 [..., 32]; exact (11 + 4 bits).

    Low nibbles are weights 0-15, high nibbles 16-31.
    """
    return (bit_planes(qs, 4).flatten(-2).float() - 8) * d


@jit
def decode_tile(row_ptr, block, i: tl.constexpr, table_ptr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Decode weights 32*i to 32*i+31 past `block` (each slice is one block)."""
    d = load_half(row_ptr, block + i, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)
    q = load_nibbles(row_ptr, block + i, QS, 16, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)
    return (q.to(tl.float32) - 8) * d[:, None]


SEARCH = HalfScaleSearch(
    integers(-8, 7),
    starts=(-8, -9, -8.5, -7.75, -7.5, -7.25, -7, -6.5, 6.5, 7, 7.5),
    weighted_starts=[-5 - 0.15 * i for i in range(27)],
)


def quantize(rows: Tensor, importance: Tensor | None) -> Tensor:
    """Quantize float32 rows [rows, K] to uint8 [rows, row bytes]."""
    b = Blocks.of_rows(rows, importance, 1, 32)
    others = []
    if b.w is not None:
        others.append(scale_fit(b.x, damped(b.x, b.w, row_mean_square(rows, 32)), SEARCH.snap, peaks(8))[0])
    d, q = SEARCH(b, *others)
    return pack_rows(rows, LAYOUT, d=d, qs=join_planes(bytes_of(q + 8), 4))


FORMAT = BlockFormat(
    name="Q4_0",
    ggml_type=2,
    file_type=2,
    block_size=32,
    sub_block=32,
    layout=LAYOUT,
    decode=decode,
    decode_tile=decode_tile,
    quantize=quantize,
    planes=True,
    relative_rms=0.09,
    source="ggml-common.h block_q4_0",
    about=__doc__,
)
