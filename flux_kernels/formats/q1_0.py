"""Q1_0: x = d * (2*q - 1), 1-bit codes, one fp16 scale per 128 weights.

18 bytes per 128 weights, 1.125 bits/weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._triton import jit, tl
from ._bits import bit_fields
from ._format import BlockFormat, Field, Layout
from ._tiles import load_half, load_word, unpack_bits

LAYOUT = Layout(Field("d", "f16"), Field("qs", "u8", 16))
TYPE_SIZE = tl.constexpr(LAYOUT.type_size)
QS = tl.constexpr(LAYOUT.offsets["qs"])


def decode(d: Tensor, qs: Tensor) -> Tensor:
    """Decode blocks: d [..., 1], qs [..., 16] -> float32 [..., 128]; bit j % 8 of byte j // 8 is weight j."""
    return torch.where(bit_fields(qs, 1).flatten(-2).bool(), d, -d)


@jit
def decode_tile(row_ptr, block, i: tl.constexpr, table_ptr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Decode weights 32*i to 32*i+31 past `block` (four slices a block)."""
    d = load_half(row_ptr, block + i // 4, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)
    qs = load_word(row_ptr, block + i // 4, QS, 16, i % 4, TYPE_SIZE, NUM_BLOCKS, PLANES)
    # Triton's -d is 0 - d, which loses the sign of -0.0.
    return tl.where(unpack_bits(qs) != 0, 1.0, -1.0) * d[:, None]


FORMAT = BlockFormat(
    name="Q1_0",
    ggml_type=41,
    file_type=40,
    block_size=128,
    sub_block=128,
    layout=LAYOUT,
    decode=decode,
    decode_tile=decode_tile,
    planes=True,
    relative_rms=0.65,
    source="ggml-common.h block_q1_0; ggml-quants.c dequantize_row_q1_0",
    about=__doc__,
)
