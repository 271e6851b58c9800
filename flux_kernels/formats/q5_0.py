"""Q5_0: x = d * (q - 16), 5-bit codes, one fp16 scale per 32 weights.

22 bytes per 32 weights, 5.5 bits/weight.
"""

from __future__ import annotations

from torch import Tensor

from .._triton import jit, tl
from ._bits import bit_fields, bit_planes
from ._format import BlockFormat, Field, Layout
from ._libggml_fits import damped, peaks, row_mean_square, scale_fit
from ._pack import bytes_of, join_fields, join_planes, pack_rows
from ._search import Blocks
from ._search_scale import HalfScaleSearch, integers
from ._tiles import load_half, load_nibbles, load_word, unpack_bits

LAYOUT = Layout(Field("d", "f16"), Field("qh", "u8", 4), Field("qs", "u8", 16))
TYPE_SIZE = tl.constexpr(LAYOUT.type_size)
QH = tl.constexpr(LAYOUT.offsets["qh"])
QS = tl.constexpr(LAYOUT.offsets["qs"])


def decode(d: Tensor, qh: Tensor, qs: Tensor) -> Tensor:
    """Decode blocks: d [..., 1], qh [..., 4], qs [..., 16] -> float32 [..., 32]; exact (11 + 5 bits).

    The low nibbles of qs are weights 0-15, the high nibbles 16-31; bit j of the 32-bit qh is the fifth bit of weight j.
    """
    codes = bit_planes(qs, 4).flatten(-2) | bit_fields(qh, 1).flatten(-2) << 4
    return (codes.float() - 16) * d


@jit
def decode_tile(row_ptr, block, i: tl.constexpr, table_ptr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Decode weights 32*i to 32*i+31 past `block` (each slice is one block)."""
    d = load_half(row_ptr, block + i, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)
    qh = load_word(row_ptr, block + i, QH, 4, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)
    qs = load_nibbles(row_ptr, block + i, QS, 16, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)
    q = qs.to(tl.uint32) | (unpack_bits(qh) << 4)
    return (q.to(tl.float32) - 16) * d[:, None]


SEARCH = HalfScaleSearch(
    integers(-16, 15),
    starts=(-16, -17, -16.5, -15.75, -15.5, -15.25, -15, -14.75, -14.5, 14, 14.5, 15, 15.5),
    weighted_starts=[-11 - 0.3 * i for i in range(22)],
)


def quantize(rows: Tensor, importance: Tensor | None) -> Tensor:
    """Quantize float32 rows [rows, K] to uint8 [rows, row bytes]."""
    b = Blocks.of_rows(rows, importance, 1, 32)
    others = []
    if b.w is not None:
        others.append(scale_fit(b.x, damped(b.x, b.w, row_mean_square(rows, 32)), SEARCH.snap, peaks(16))[0])
    d, q = SEARCH(b, *others)
    codes = bytes_of(q + 16)
    return pack_rows(rows, LAYOUT, d=d, qh=join_fields(codes >> 4, 1), qs=join_planes(codes & 0xF, 4))


FORMAT = BlockFormat(
    name="Q5_0",
    ggml_type=6,
    file_type=8,
    block_size=32,
    sub_block=32,
    layout=LAYOUT,
    decode=decode,
    decode_tile=decode_tile,
    quantize=quantize,
    planes=True,
    relative_rms=0.045,
    source="ggml-common.h block_q5_0",
    about=__doc__,
)
