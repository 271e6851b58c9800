"""Q8_0: x = d * q, 8-bit signed codes, one fp16 scale per 32 weights.

34 bytes per 32 weights, 8.5 bits/weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._triton import jit, tl
from ._code_tiles import load_codes
from ._format import BlockFormat, CodeTile, Field, Layout
from ._pack import pack_rows
from ._search import Blocks
from ._search_scale import HalfScaleSearch, integers
from ._tiles import load_bytes, load_half

LAYOUT = Layout(Field("d", "f16"), Field("qs", "i8", 32))
TYPE_SIZE = tl.constexpr(LAYOUT.type_size)
QS = tl.constexpr(LAYOUT.offsets["qs"])


def decode(d: Tensor, qs: Tensor) -> Tensor:
    """Decode blocks: d [..., 1], qs [..., 32] -> float32 [..., 32].

    The product of an 11-bit and an 8-bit number is exact.
    """
    return qs * d


@jit
def decode_tile(row_ptr, block, i: tl.constexpr, table_ptr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Decode weights 32*i to 32*i+31 past `block` (each slice is one block)."""
    d = load_half(row_ptr, block + i, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)
    q = load_bytes(row_ptr, block + i, QS, 32, 0, 32, TYPE_SIZE, NUM_BLOCKS, PLANES).to(tl.int8, bitcast=True)
    return d[:, None] * q.to(tl.float32)


@jit
def code_tile(row_ptr, block, i: tl.constexpr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr, PACKED: tl.constexpr):
    """Load the codes of block i past `block`, two bytes a value."""
    return load_codes(row_ptr, block + i, QS, 32, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)


@jit
def code_scales(row_ptr, block, j: tl.constexpr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Load d of block j past `block`."""
    d = load_half(row_ptr, block + j, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)
    return d, d


SEARCH = HalfScaleSearch(integers(-127, 127), starts=(127, 126.5, 126.75, 127.25, 127.45))


def quantize(rows: Tensor, importance: Tensor | None) -> Tensor:
    """Quantize float32 rows [rows, K] to uint8 [rows, row bytes]."""
    d, q = SEARCH(Blocks.of_rows(rows, importance, 1, 32))
    return pack_rows(rows, LAYOUT, d=d, qs=q[0].to(torch.int8).t().contiguous().view(torch.uint8))


FORMAT = BlockFormat(
    name="Q8_0",
    ggml_type=8,
    file_type=7,
    block_size=32,
    sub_block=32,
    layout=LAYOUT,
    decode=decode,
    decode_tile=decode_tile,
    code_tile=CodeTile(code_tile, code_scales, bits=8),
    quantize=quantize,
    planes=True,
    relative_rms=0.006,
    source="ggml-common.h block_q8_0",
    about=__doc__,
)
