"""NVFP4: x = d / 2 * values[q], 4-bit FP4 codes, 8-bit float d per 16 weights.

36 bytes per 64 weights, 4.5 bits/weight.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .._triton import jit, tl
from ._bits import bit_planes
from ._codebooks import E2M1_VALUES, value_table
from ._format import BlockFormat, Field, Layout
from ._pack import bytes_of, join_planes, pack_rows
from ._search import Blocks
from ._search_scale import best_scale, codebook, codes_of, snapped
from ._tiles import field_ptr, halves_of_16, load_word, unpack_e2m1, unpack_half

# Plausible scales are E4M3 floats from 2^-6 to 2^-5.
LAYOUT = Layout(Field("d", "u8", 4, scale_bits=((0x07, 0x08),)), Field("qs", "u8", 32))
TYPE_SIZE = tl.constexpr(LAYOUT.type_size)
QS = tl.constexpr(LAYOUT.offsets["qs"])


def decode(d: Tensor, qs: Tensor, table: Tensor) -> Tensor:
    """Decode blocks: d [..., 4], qs [..., 32], table uint8 [16] -> float32 [..., 64]; exact (4 + 4 bits).

    d is an unsigned E4M3 float whose NaN code 0x7F means 0; shifted left by 7 its bits are a half 2^8 too small. The
    table holds twice the FP4 values. Each sub-block has 8 bytes of qs, low nibbles first.
    """
    bits = torch.where(d == 0x7F, 0, d & 0x7F)
    scale = (bits.to(torch.int16) << 7).view(torch.float16).float() * 128
    codes = bit_planes(qs.unflatten(-1, (4, 8)), 4).flatten(-2)
    return (table.view(torch.int8)[codes.int()] * scale[..., None]).flatten(-2)


@jit
def unpack_half_scale(bits):
    """Turn the low 8 bits of each uint32, an unsigned E4M3 float, into half its value as float32.

    NaN's code means 0.
    """
    bits = bits & 0xFF
    return unpack_half(tl.where(bits == 0x7F, 0, (bits & 0x7F) << 7)) * 128


@jit
def decode_tile(row_ptr, block, i: tl.constexpr, table_ptr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Decode weights 32*i to 32*i+31 past `block` (two slices a block, two sub-blocks a slice)."""
    d = load_word(row_ptr, block + i // 2, 0, 4, 0, TYPE_SIZE, NUM_BLOCKS, PLANES) >> (16 * (i % 2))
    lane = tl.arange(0, 32)
    qs = field_ptr(row_ptr, block + i // 2, QS, 32, TYPE_SIZE, NUM_BLOCKS, PLANES)
    packed = tl.load(qs[:, None] + (16 * (i % 2) + lane // 16 * 8 + lane % 8)[None, :])
    q = packed >> (lane // 8 % 2 * 4).to(tl.uint8)[None, :]
    return unpack_e2m1(q) * halves_of_16(unpack_half_scale(d), unpack_half_scale(d >> 8))


SNAP = codebook(E2M1_VALUES)
# Steps of d's code, from where 6, the largest FP4 value, reaches the largest weight.
STEPS = (0, -1, 1, 2, 3, -2)


def quantize(rows: Tensor, importance: Tensor | None) -> Tensor:
    """Quantize float32 rows [rows, K] to uint8 [rows, row bytes]."""
    b = Blocks.of_rows(rows, importance, 4, 16)
    widest = (b.x.abs().amax(1, keepdim=True) / 6).clamp(max=448)
    start = widest.to(torch.float8_e4m3fn).view(torch.uint8).to(torch.int16)
    _, scale = best_scale(b, SNAP, (_half_scale((start + step).clamp(1, 126)) for step in STEPS))
    y = snapped(b, scale, SNAP)
    d = (scale / 128).half().view(torch.int16) >> 7
    return pack_rows(rows, LAYOUT, d=bytes_of(d * y.any(1, keepdim=True)), qs=_pack_codes(codes_of(y, E2M1_VALUES)))


def _half_scale(code: Tensor) -> Tensor:
    """Turn int16 codes of 1 to 126, unsigned E4M3 floats, into half their values as float32."""
    return (code << 7).view(torch.float16).float() * 128


def _pack_codes(codes: Tensor) -> Tensor:
    """Pack uint8 [n, 64] codes to [n, 32]: 8 bytes a sub-block, low nibbles first."""
    return join_planes(codes.unflatten(-1, (4, 16)), 4).flatten(-2)


FORMAT = BlockFormat(
    name="NVFP4",
    ggml_type=40,
    file_type=39,
    block_size=64,
    sub_block=16,
    layout=LAYOUT,
    decode=decode,
    decode_tile=decode_tile,
    quantize=quantize,
    table=partial(value_table, E2M1_VALUES),
    relative_rms=0.105,
    source="ggml-common.h block_nvfp4, kvalues_mxfp4; ggml-impl.h ggml_ue4m3_to_fp32",
    about=__doc__,
)
