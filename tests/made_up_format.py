"""A block type that ggml does not have, written as a stranger would.

Layout, torch decode, Triton decode, row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flux_kernels._triton import jit, tl
from flux_kernels.formats import BlockFormat, Field, Layout
from flux_kernels.formats._tiles import load_bytes, load_half

LAYOUT = Layout(Field("d", "f16"), Field("qs", "u8", 64))
TYPE_SIZE = tl.constexpr(LAYOUT.type_size)
QS = tl.constexpr(LAYOUT.offsets["qs"])


def decode(d: Tensor, qs: Tensor) -> Tensor:
    """Decode blocks: x = d * (q - 100), d [..., 1], qs [..., 64] -> float32 [..., 64]."""
    return d * (qs.float() - 100.0)


@jit
def decode_tile(row_ptr, block, i: tl.constexpr, table_ptr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Decode slice i, counted from `block`: two slices a block."""
    at = block + i // 2
    d = load_half(row_ptr, at, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)
    q = load_bytes(row_ptr, at, QS, 64, 32 * (i % 2), 32, TYPE_SIZE, NUM_BLOCKS, PLANES)
    return d[:, None] * (q.to(tl.float32) - 100.0)


FORMAT = BlockFormat(
    name="MADE_UP",
    ggml_type=1000,
    block_size=64,
    sub_block=64,
    layout=LAYOUT,
    decode=decode,
    decode_tile=decode_tile,
    planes=True,
    relative_rms=1.0,
    source="this test",
)


def pack(codes: Tensor, d: Tensor) -> Tensor:
    """Pack codes uint8 [N, K] and scales float16 [N, K // 64] without the library's layout."""
    blocks = [d.view(torch.uint8).unflatten(-1, (-1, 2)), codes.unflatten(-1, (-1, 64))]
    return torch.cat(blocks, dim=-1).flatten(-2)
