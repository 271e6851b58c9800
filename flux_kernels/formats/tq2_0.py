"""TQ2_0: x = d * (q - 1), 2-bit ternary codes, one fp16 scale.

66 bytes per 256 weights, 2.0625 bits/weight.
"""

from __future__ import annotations

from torch import Tensor

from .._triton import jit, tl
from ._bits import bit_planes
from ._format import BlockFormat, Field, Layout
from ._tiles import load_bytes, load_half

LAYOUT = Layout(Field("qs", "u8", 64), Field("d", "f16"))
TYPE_SIZE = tl.constexpr(LAYOUT.type_size)
D = tl.constexpr(LAYOUT.offsets["d"])


def decode(qs: Tensor, d: Tensor) -> Tensor:
    """Decode superblocks: qs [..., 64], d [..., 1] -> float32 [..., 256]; exact.

    Each half of qs holds 128 weights: the lowest two bits of its 32 bytes are the first 32 of them. Code 3, which no
    quantizer writes, decodes to 2 * d as in ggml.
    """
    return (bit_planes(qs.unflatten(-1, (2, 32)), 2).flatten(-3).float() - 1) * d


@jit
def decode_tile(row_ptr, block, i: tl.constexpr, table_ptr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Decode weights 32*i to 32*i+31 of superblock `block`."""
    d = load_half(row_ptr, block, D, TYPE_SIZE, NUM_BLOCKS, PLANES)
    qs = load_bytes(row_ptr, block, 0, 64, 32 * (i // 4), 32, TYPE_SIZE, NUM_BLOCKS, PLANES)
    q = (qs >> (2 * (i % 4))) & 3
    return (q.to(tl.float32) - 1) * d[:, None]


FORMAT = BlockFormat(
    name="TQ2_0",
    ggml_type=35,
    file_type=37,
    block_size=256,
    sub_block=256,
    layout=LAYOUT,
    decode=decode,
    decode_tile=decode_tile,
    planes=True,
    relative_rms=0.9,
    source="ggml-common.h block_tq2_0; ggml-quants.c dequantize_row_tq2_0",
    about=__doc__,
)
