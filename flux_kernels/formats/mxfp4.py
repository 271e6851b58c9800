"""MXFP4: x = 2^(e-128) * values[q], 4-bit FP4 codes, one 8-bit exponent.

17 bytes per 32 weights, 4.25 bits/weight.
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
from ._tiles import load_narrow, load_nibbles, unpack_e2m1

# Plausible exponents are those of 2^-8 and 2^-7: the FP4 values have an RMS of 5.9.
LAYOUT = Layout(Field("e", "u8", scale_bits=((0x01, 0x78),)), Field("qs", "u8", 16))
TYPE_SIZE = tl.constexpr(LAYOUT.type_size)
QS = tl.constexpr(LAYOUT.offsets["qs"])


def decode(e: Tensor, qs: Tensor, table: Tensor) -> Tensor:
    """Decode blocks: e [..., 1], qs [..., 16], table uint8 [16] -> float32 [..., 32]; exact.

    Low nibbles are weights 0-15. The table holds twice the FP4 values, hence half the OCP scale 2^(e-127); for e of 0 and 1
    that is a subnormal float32, whose one bit is shifted in place.
    """
    e = e.to(torch.int32)
    scale = torch.where(e < 2, (e + 1) << 21, (e - 1) << 23).view(torch.float32)
    return table.view(torch.int8)[bit_planes(qs, 4).flatten(-2).int()] * scale


@jit
def decode_tile(row_ptr, block, i: tl.constexpr, table_ptr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Decode weights 32*i to 32*i+31 past `block` (each slice is one block)."""
    e = load_narrow(row_ptr, block + i, 0, 1, TYPE_SIZE, NUM_BLOCKS, PLANES) & 0xFF
    q = load_nibbles(row_ptr, block + i, QS, 16, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)
    bits = tl.where(e < 2, (e + 1) << 21, (e - 1) << 23)
    return unpack_e2m1(q) * bits.to(tl.float32, bitcast=True)[:, None]


SNAP = codebook(E2M1_VALUES)


def quantize(rows: Tensor, importance: Tensor | None) -> Tensor:
    """Quantize float32 rows [rows, K] to uint8 [rows, row bytes].

    Each block is first brought to a largest magnitude of 0.5 to 1 (exact): e covers more than squares in float32 do.
    """
    x = rows.reshape(-1, 32)
    exponent = torch.frexp(x.abs().amax(1))[1].clamp(min=-124)
    down = -exponent // 2
    x = x * _power(down)[:, None] * _power(-exponent - down)[:, None]
    b = Blocks.of_rows(x, importance, 1, 32)
    # Scales of a level of 1: the largest level, 12, reaches 1.5, 0.75 and 3.
    scales = (0.125, 0.0625, 0.25)
    _, scale = best_scale(b, SNAP, (torch.full_like(b.sum_x, scale) for scale in scales))
    y = snapped(b, scale, SNAP)
    e = (torch.frexp(scale)[1] - 1 + exponent + 128).clamp(0, 254)
    return pack_rows(rows, LAYOUT, e=bytes_of(e), qs=join_planes(codes_of(y, E2M1_VALUES), 4))


def _power(exponent: Tensor) -> Tensor:
    """Return 2^exponent as float32, for exponents -126 to 127."""
    return ((exponent + 127) << 23).view(torch.float32)


FORMAT = BlockFormat(
    name="MXFP4",
    ggml_type=39,
    file_type=38,
    block_size=32,
    sub_block=32,
    layout=LAYOUT,
    decode=decode,
    decode_tile=decode_tile,
    quantize=quantize,
    table=partial(value_table, E2M1_VALUES),
    planes=True,
    relative_rms=0.13,
    source="ggml-common.h block_mxfp4, kvalues_mxfp4; ggml-impl.h ggml_e8m0_to_fp32_half",
    about=__doc__,
)
