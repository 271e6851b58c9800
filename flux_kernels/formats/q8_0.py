"""Q8_0: x = d * q, 8-bit signed codes, one fp16 scale per 32 weights; 34 bytes per 32 weights, 8.5 bits/weight."""

from __future__ import annotations

from torch import Tensor

from .._triton import jit, tl
from ._format import BlockFormat, Field, Layout
from ._tiles import load_bytes, load_half

LAYOUT = Layout(Field("d", "f16"), Field("qs", "i8", 32))
TYPE_SIZE = tl.constexpr(LAYOUT.type_size)
QS = tl.constexpr(LAYOUT.offsets["qs"])


def decode(d: Tensor, qs: Tensor) -> Tensor:
    """Decode blocks: d [..., 1], qs [..., 32] -> float32 [..., 32]; the product of an 11-bit and an 8-bit number is exact."""
    return qs * d


@jit
def decode_tile(row_ptr, block, i: tl.constexpr, table_ptr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Decode weights 32*i to 32*i+31 past `block` (each slice is one block)."""
    d = load_half(row_ptr, block + i, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)
    q = load_bytes(row_ptr, block + i, QS, 32, 0, 32, TYPE_SIZE, NUM_BLOCKS, PLANES).to(tl.int8, bitcast=True)
    return d[:, None] * q.to(tl.float32)


FORMAT = BlockFormat(
    name="Q8_0",
    ggml_type=8,
    block_size=32,
    sub_block=32,
    layout=LAYOUT,
    decode=decode,
    decode_tile=decode_tile,
    planes=True,
    relative_rms=0.006,
    source="ggml-common.h block_q8_0",
)
