"""Q4_K: x = d*sc*q - dmin*m, 4-bit codes, 6-bit sc and m per 32 weights.

144 bytes per 256 weights, 4.5 bits/weight.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .._triton import jit, tl
from ._code_tiles import load_codes, load_k_scale_words, pick_byte, shift_codes
from ._format import BlockFormat, CodeTile, Field, Layout
from ._k_scales import pack_scales_and_mins, unpack_scales_and_mins
from ._libggml_fits import WEIGHTED_GRIDS, super_affine
from ._pack import bytes_of, join_planes, pack_rows
from ._search import Blocks
from ._search_affine import SuperAffineSearch
from ._tiles import load_bytes, load_half_pair, load_k_scale_min

LAYOUT = Layout(Field("dm", "f16", 2), Field("scales", "u8", 12), Field("qs", "u8", 128))
TYPE_SIZE = tl.constexpr(LAYOUT.type_size)
SCALES = tl.constexpr(LAYOUT.offsets["scales"])
QS = tl.constexpr(LAYOUT.offsets["qs"])


def decode(dm: Tensor, scales: Tensor, qs: Tensor) -> Tensor:
    """Decode superblocks: dm [..., 2], scales [..., 12], qs [..., 128] -> float32 [..., 256].

    dm is (d, dmin). d*sc (11 + 6 bits) and d*sc*q (+ 4 bits) fit float32 exactly; the subtraction rounds once.
    """
    sc, m = unpack_scales_and_mins(scales)
    chunks = qs.unflatten(-1, (4, 1, 32))
    codes = torch.cat([chunks & 0xF, chunks >> 4], dim=-2).flatten(-3, -2)
    scale = dm[..., :1] * sc
    offset = dm[..., 1:] * m
    return (scale[..., None] * codes - offset[..., None]).flatten(-2)


@jit
def decode_tile(row_ptr, block, i: tl.constexpr, table_ptr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Decode sub-block i (32 weights) of superblock `block`."""
    d, dmin = load_half_pair(row_ptr, block, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)
    sc, m = load_k_scale_min(row_ptr, block, i, SCALES, TYPE_SIZE, NUM_BLOCKS, PLANES)
    qs = load_bytes(row_ptr, block, QS, 128, 32 * (i // 2), 32, TYPE_SIZE, NUM_BLOCKS, PLANES)
    q = (qs >> (4 * (i % 2))) & 0xF
    return (d * sc)[:, None] * q.to(tl.float32) - (dmin * m)[:, None]


@jit
def code_tile(row_ptr, block, i: tl.constexpr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr, PACKED: tl.constexpr):
    """Load the codes of sub-block i, two bytes a value."""
    qs = load_codes(row_ptr, block, QS, 128, 32 * (i // 2), TYPE_SIZE, NUM_BLOCKS, PLANES)
    return shift_codes(qs, 4 * (i % 2), PACKED)


@jit
def code_scales(row_ptr, block, j: tl.constexpr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Load sc and m of sub-block j."""
    sc, m = load_k_scale_words(row_ptr, block, j >= 4, SCALES, TYPE_SIZE, NUM_BLOCKS, PLANES)
    return pick_byte(sc, j % 4), pick_byte(m, j % 4)


@jit
def code_units(row_ptr, block, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Load (d, -dmin)."""
    d, dmin = load_half_pair(row_ptr, block, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)
    return d, -dmin


_ENDS = (0, -0.04, 0.025)
SEARCH = SuperAffineSearch(
    top=15,
    levels=63,
    shrinks=[(low, high) for low in _ENDS for high in _ENDS],
    weighted_shrinks=[(low, high) for low in (0.01, 0.09, 0.15) for high in (0.01, 0.09, 0.15)],
    supers=((1, 63), (15 / 14, 63), (1, 62), (1, 61)),
    phase=0.06,
    other=partial(super_affine, top=15, levels=63, plain=[-1 + 0.1 * i for i in range(21)], weighted=WEIGHTED_GRIDS),
)


def quantize(rows: Tensor, importance: Tensor | None) -> Tensor:
    """Quantize float32 rows [rows, K] to uint8 [rows, row bytes]."""
    d, dmin, sc, m, q = SEARCH(Blocks.of_rows(rows, importance, 8, 32))
    qs = join_planes(bytes_of(q).unflatten(-1, (4, 64)), 4).flatten(-2)
    scales = pack_scales_and_mins(bytes_of(sc), bytes_of(m))
    return pack_rows(rows, LAYOUT, dm=torch.cat([d, dmin]), scales=scales, qs=qs)


FORMAT = BlockFormat(
    name="Q4_K",
    ggml_type=12,
    file_type=14,
    block_size=256,
    sub_block=32,
    layout=LAYOUT,
    decode=decode,
    decode_tile=decode_tile,
    code_tile=CodeTile(code_tile, code_scales, code_units, bits=4, offsets=True),
    quantize=quantize,
    relative_rms=0.08,
    source="ggml-common.h block_q4_K",
    about=__doc__,
)
