"""Q3_K: x = d * (sc - 32) * (q - 4), 3-bit codes, 6-bit sc per 16 weights.

110 bytes per 256 weights, 3.4375 bits/weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._triton import jit, tl
from ._bits import bit_planes
from ._code_tiles import join_codes, load_codes, shift_codes
from ._format import BlockFormat, CodeTile, Field, Layout
from ._libggml_fits import super_scale_q3
from ._pack import bytes_of, join_planes, pack_rows
from ._search import Blocks
from ._search_scale import SuperScaleSearch, integers
from ._tiles import halves_of_16, load_bytes, load_half, load_word

LAYOUT = Layout(Field("hmask", "u8", 32), Field("qs", "u8", 64), Field("scales", "u8", 12), Field("d", "f16"))
TYPE_SIZE = tl.constexpr(LAYOUT.type_size)
QS = tl.constexpr(LAYOUT.offsets["qs"])
SCALES = tl.constexpr(LAYOUT.offsets["scales"])
D = tl.constexpr(LAYOUT.offsets["d"])


def unpack_scales(scales: Tensor) -> Tensor:
    """Unpack uint8 [..., 12] to sc, uint8 [..., 16] with values 0 to 63.

    Bytes 0-7 hold the low nibbles of sc 0-7 (low) and sc 8-15 (high); bits 2j and 2j+1 of bytes 8-11 are the top two bits
    of sc 4j to 4j+3.
    """
    return bit_planes(scales[..., :8], 4).flatten(-2) | bit_planes(scales[..., 8:], 2).flatten(-2) << 4


def decode(hmask: Tensor, qs: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    """Decode blocks: hmask [..., 32], qs [..., 64], scales [..., 12], d [..., 1] -> float32 [..., 256].

    Each half of qs holds 128 weights, the lowest two bits of its 32 bytes the first 32 of them; bit i of the 32 bytes of
    hmask is the third bit of weights 32i to 32i+31. Exact (11 + 6 + 3 bits).
    """
    low = bit_planes(qs.unflatten(-1, (2, 32)), 2).flatten(-3)
    codes = (low | bit_planes(hmask, 1).flatten(-2) << 2).float() - 4
    scale = d * (unpack_scales(scales).float() - 32)
    return (scale[..., None] * codes.unflatten(-1, (16, 16))).flatten(-2)


@jit
def load_scale_pair(row_ptr, block, i: tl.constexpr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Load sc of sub-blocks 2*i and 2*i+1, less 32, as two float32 [BLOCK_N]."""
    low = load_word(row_ptr, block, SCALES, 12, (i // 2) % 2, TYPE_SIZE, NUM_BLOCKS, PLANES)
    low = low >> (16 * (i % 2) + 4 * (i // 4))
    high = load_word(row_ptr, block, SCALES, 12, 2, TYPE_SIZE, NUM_BLOCKS, PLANES)
    high = high >> (16 * (i % 2) + 2 * (i // 2))
    first = (low & 0xF) | ((high & 3) << 4)
    second = ((low >> 8) & 0xF) | (((high >> 8) & 3) << 4)
    return first.to(tl.float32) - 32, second.to(tl.float32) - 32


@jit
def decode_tile(row_ptr, block, i: tl.constexpr, table_ptr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Decode sub-blocks 2*i and 2*i+1 (32 weights) of superblock `block`."""
    d = load_half(row_ptr, block, D, TYPE_SIZE, NUM_BLOCKS, PLANES)
    first, second = load_scale_pair(row_ptr, block, i, NUM_BLOCKS, PLANES)
    qs = load_bytes(row_ptr, block, QS, 64, 32 * (i // 4), 32, TYPE_SIZE, NUM_BLOCKS, PLANES)
    hmask = load_bytes(row_ptr, block, 0, 32, 0, 32, TYPE_SIZE, NUM_BLOCKS, PLANES)
    q = ((qs >> (2 * (i % 4))) & 3) | (((hmask >> i) & 1) << 2)
    return halves_of_16(d * first, d * second) * (q.to(tl.float32) - 4)


@jit
def code_tile(row_ptr, block, i: tl.constexpr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr, PACKED: tl.constexpr):
    """Load the codes of sub-blocks 2*i and 2*i+1, two bytes a value."""
    qs = load_codes(row_ptr, block, QS, 64, 32 * (i // 4), TYPE_SIZE, NUM_BLOCKS, PLANES)
    hmask = load_codes(row_ptr, block, 0, 32, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)
    return join_codes(shift_codes(qs, 2 * (i % 4), PACKED), shift_codes(hmask, i - 2, PACKED), 3, PACKED)


@jit
def code_scales(row_ptr, block, j: tl.constexpr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Load sc of sub-block j, less 32."""
    first, second = load_scale_pair(row_ptr, block, j // 2, NUM_BLOCKS, PLANES)
    if j % 2 == 0:
        return first, first
    else:
        return second, second


@jit
def code_units(row_ptr, block, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Load d."""
    d = load_half(row_ptr, block, D, TYPE_SIZE, NUM_BLOCKS, PLANES)
    return d, d


SEARCH = SuperScaleSearch(
    integers(-4, 3),
    starts=(-4, -4.5, -3.75, -3.5, -3.25, -3, 2.75, 3, 3.4),
    weighted_starts=[-1.2 - 0.15 * i for i in range(27)] + [1.5 + 0.3 * i for i in range(9)],
    thorough_starts=[-4.8 + 0.15 * i for i in range(25)] + [1.5 + 0.15 * i for i in range(15)],
    reach=32,
    supers=((1, 32), (4 / 3, 32), (1, 31), (1, 30)),
    turns=2,
    other=super_scale_q3,
)


def pack_scales(sc: Tensor) -> Tensor:
    """Pack sc, uint8 [..., 16] with values 0 to 63, to uint8 [..., 12]; undoes `unpack_scales`."""
    return torch.cat([join_planes(sc & 0xF, 4), join_planes(sc >> 4, 2)], dim=-1)


def quantize(rows: Tensor, importance: Tensor | None) -> Tensor:
    """Quantize float32 rows [rows, K] to uint8 [rows, row bytes]."""
    d, sc, q = SEARCH(Blocks.of_rows(rows, importance, 16, 16))
    codes = bytes_of(q + 4)
    qs = join_planes((codes & 3).unflatten(-1, (2, 128)), 2).flatten(-2)
    return pack_rows(rows, LAYOUT, hmask=join_planes(codes >> 2, 1), qs=qs, scales=pack_scales(bytes_of(sc + 32)), d=d)


FORMAT = BlockFormat(
    name="Q3_K",
    ggml_type=11,
    file_type=11,
    block_size=256,
    sub_block=16,
    layout=LAYOUT,
    decode=decode,
    decode_tile=decode_tile,
    code_tile=CodeTile(code_tile, code_scales, code_units, bits=3, zero=4),
    quantize=quantize,
    planes=True,
    relative_rms=0.16,
    source="ggml-common.h block_q3_K",
    about=__doc__,
)
