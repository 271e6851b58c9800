"""Q2_0: x = d * (q - 1), 2-bit codes, one fp16 scale per 64 weights.

18 bytes per 64 weights, 2.25 bits/weight.
"""

from __future__ import annotations

from torch import Tensor

from .._triton import jit, tl
from ._bits import bit_fields
from ._format import BlockFormat, Field, Layout
from ._tiles import load_half, load_word, spread_fields_of_two

LAYOUT = Layout(Field("d", "f16"), Field("qs", "u8", 16))
TYPE_SIZE = tl.constexpr(LAYOUT.type_size)
QS = tl.constexpr(LAYOUT.offsets["qs"])


def decode(d: Tensor, qs: Tensor) -> Tensor:
    """Decode blocks: d [..., 1], qs [..., 16] -> float32 [..., 64]; exact.

    Each byte holds four consecutive weights.
    """
    return (bit_fields(qs, 2).flatten(-2).float() - 1) * d


@jit
def decode_tile(row_ptr, block, i: tl.constexpr, table_ptr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Decode weights 32*i to 32*i+31 past `block` (two slices a block)."""
    d = load_half(row_ptr, block + i // 2, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)
    first = load_word(row_ptr, block + i // 2, QS, 16, 2 * (i % 2), TYPE_SIZE, NUM_BLOCKS, PLANES)
    second = load_word(row_ptr, block + i // 2, QS, 16, 2 * (i % 2) + 1, TYPE_SIZE, NUM_BLOCKS, PLANES)
    q = spread_fields_of_two(first, second, 1, 2) & 3
    return (q.to(tl.float32) - 1) * d[:, None]


FORMAT = BlockFormat(
    name="Q2_0",
    ggml_type=42,
    block_size=64,
    sub_block=64,
    layout=LAYOUT,
    decode=decode,
    decode_tile=decode_tile,
    planes=True,
    relative_rms=0.75,
    source="ggml-common.h block_q2_0; ggml-quants.c dequantize_row_q2_0",
    about=__doc__,
)
