"""Q6_K: x = d * sc * (q - 32), 6-bit codes, 8-bit sc per 16 weights.

210 bytes per 256 weights, 6.5625 bits/weight.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from .._triton import jit, tl
from ._bits import bit_planes
from ._code_tiles import join_codes, load_codes, pick_signed_byte, shift_codes
from ._format import BlockFormat, CodeTile, Field, Layout
from ._libggml_fits import peaks, super_scale
from ._pack import bytes_of, join_planes, pack_rows
from ._q6_k_words import Unpacker
from ._search import Blocks
from ._search_scale import SuperScaleSearch, integers
from ._tiles import halves_of_16, load_bytes, load_half, load_word, unpack_int8

LAYOUT = Layout(Field("ql", "u8", 128), Field("qh", "u8", 64), Field("scales", "i8", 16), Field("d", "f16"))
TYPE_SIZE = tl.constexpr(LAYOUT.type_size)
QH = tl.constexpr(LAYOUT.offsets["qh"])
SCALES = tl.constexpr(LAYOUT.offsets["scales"])
D = tl.constexpr(LAYOUT.offsets["d"])


def decode(ql: Tensor, qh: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    """Decode blocks: ql [..., 128], qh [..., 64], scales int8 [..., 16], d [..., 1] -> float32 [..., 256].

    Each half of the block (128 weights) has 64 bytes of ql, low nibbles first, and 32 bytes of qh, lowest two bits first.
    d*sc*(q-32) is a product of 11, 8 and 6 bits: d*sc is exact, the second product may round.
    """
    low = bit_planes(ql.unflatten(-1, (2, 64)), 4).flatten(-3)
    high = bit_planes(qh.unflatten(-1, (2, 32)), 2).flatten(-3)
    codes = (low | high << 4).float() - 32
    return ((d * scales)[..., None] * codes.unflatten(-1, (16, 16))).flatten(-2)


@jit
def decode_tile(row_ptr, block, i: tl.constexpr, table_ptr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Decode sub-blocks 2*i and 2*i+1 (32 weights) of superblock `block`."""
    d = load_half(row_ptr, block, D, TYPE_SIZE, NUM_BLOCKS, PLANES)
    sc = load_word(row_ptr, block, SCALES, 16, i // 2, TYPE_SIZE, NUM_BLOCKS, PLANES) >> (16 * (i % 2))
    ql = load_bytes(row_ptr, block, 0, 128, 64 * (i // 4) + 32 * (i % 2), 32, TYPE_SIZE, NUM_BLOCKS, PLANES)
    qh = load_bytes(row_ptr, block, QH, 64, 32 * (i // 4), 32, TYPE_SIZE, NUM_BLOCKS, PLANES)
    q = ((ql >> (4 * ((i // 2) % 2))) & 0xF) | (((qh >> (2 * (i % 4))) & 3) << 4)
    return halves_of_16(d * unpack_int8(sc), d * unpack_int8(sc >> 8)) * (q.to(tl.float32) - 32)


@jit
def code_tile(row_ptr, block, i: tl.constexpr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr, PACKED: tl.constexpr):
    """Load the codes of sub-blocks 2*i and 2*i+1, two bytes a value."""
    ql = load_codes(row_ptr, block, 0, 128, 64 * (i // 4) + 32 * (i % 2), TYPE_SIZE, NUM_BLOCKS, PLANES)
    qh = load_codes(row_ptr, block, QH, 64, 32 * (i // 4), TYPE_SIZE, NUM_BLOCKS, PLANES)
    low, high = shift_codes(ql, 4 * ((i // 2) % 2), PACKED), shift_codes(qh, 2 * (i % 4) - 4, PACKED)
    return join_codes(low, high, 0x0F, PACKED)


@jit
def code_scales(row_ptr, block, j: tl.constexpr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Load sc of sub-block j."""
    sc = pick_signed_byte(load_word(row_ptr, block, SCALES, 16, j // 4, TYPE_SIZE, NUM_BLOCKS, PLANES), j % 4)
    return sc, sc


@jit
def code_units(row_ptr, block, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Load d."""
    d = load_half(row_ptr, block, D, TYPE_SIZE, NUM_BLOCKS, PLANES)
    return d, d


SEARCH = SuperScaleSearch(
    integers(-32, 31),
    starts=(-32, -33, -32.5, -31.5, -31, -30.5, -30, -29.5, -29),
    weighted_starts=[-25 - 0.4 * i for i in range(10)],
    thorough_starts=[-33.5 + 0.15 * i for i in range(36)],
    hard=1.1,
    reach=128,
    supers=((1, 128), (32 / 31, 128), (1, 127), (1, 126), (1, 125)),
    moves=(-2, -1, 1, 2),
    turns=2,
    other=partial(super_scale, snap=integers(-32, 31), peak_levels=peaks(32), reach=128, spread=None),
)


def quantize(rows: Tensor, importance: Tensor | None) -> Tensor:
    """Quantize float32 rows [rows, K] to uint8 [rows, row bytes]."""
    d, sc, q = SEARCH(Blocks.of_rows(rows, importance, 16, 16))
    codes = bytes_of(q + 32).unflatten(-1, (2, 128))
    ql, qh = join_planes(codes & 0xF, 4).flatten(-2), join_planes(codes >> 4, 2).flatten(-2)
    return pack_rows(rows, LAYOUT, ql=ql, qh=qh, scales=bytes_of(sc + 256 * (sc < 0)), d=d)


FORMAT = BlockFormat(
    name="Q6_K",
    ggml_type=14,
    file_type=18,
    block_size=256,
    sub_block=16,
    layout=LAYOUT,
    decode=decode,
    decode_tile=decode_tile,
    code_tile=CodeTile(code_tile, code_scales, code_units, bits=6, zero=32),
    quantize=quantize,
    planes=True,
    unpacker=Unpacker,
    relative_rms=0.02,
    source="ggml-common.h block_q6_K",
    about=__doc__,
)
