"""Triton helpers that formats share: `load_*` touch memory, `unpack_*` do not.

All take `row_ptr`, a [BLOCK_N] tensor of uint8 pointers to row starts, and the index of a block in the row. A field of
`SIZE` bytes at `OFFSET` in the block is found at block * TYPE_SIZE + OFFSET in file order, and at
NUM_BLOCKS * OFFSET + block * SIZE when the row was rearranged into field planes (Layout.to_planes).
"""

from __future__ import annotations

from .._triton import jit, tl


@jit
def field_ptr(
    row_ptr,
    block,
    OFFSET: tl.constexpr,
    SIZE: tl.constexpr,
    TYPE_SIZE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    PLANES: tl.constexpr,
):
    """Point at a field of one block in each row: [BLOCK_N] uint8 pointers."""
    if PLANES:
        return row_ptr + (NUM_BLOCKS * OFFSET + block * SIZE)
    else:
        return row_ptr + (block * TYPE_SIZE + OFFSET)


@jit
def load_bytes(
    row_ptr,
    block,
    OFFSET: tl.constexpr,
    SIZE: tl.constexpr,
    START: tl.constexpr,
    COUNT: tl.constexpr,
    TYPE_SIZE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    PLANES: tl.constexpr,
):
    """Load bytes START to START+COUNT-1 (a power of two) of a field as uint8 [BLOCK_N, COUNT]."""
    ptr = field_ptr(row_ptr, block, OFFSET, SIZE, TYPE_SIZE, NUM_BLOCKS, PLANES)
    return tl.load(ptr[:, None] + (START + tl.arange(0, COUNT))[None, :])


@jit
def load_word(
    row_ptr,
    block,
    OFFSET: tl.constexpr,
    SIZE: tl.constexpr,
    INDEX: tl.constexpr,
    TYPE_SIZE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    PLANES: tl.constexpr,
):
    """Load 32-bit word INDEX of a field as uint32 [BLOCK_N].

    One load where the word is 4-byte aligned in every block and row, else two of 2 bytes or four of 1: GPUs fault on
    misaligned loads.
    """
    ptr = field_ptr(row_ptr, block, OFFSET, SIZE, TYPE_SIZE, NUM_BLOCKS, PLANES) + 4 * INDEX
    # Rows, blocks and the field all start at multiples of these; only % and + work on every mix of int and constexpr.
    if PLANES:
        by_4: tl.constexpr = (NUM_BLOCKS * OFFSET) % 4 + SIZE % 4 + (NUM_BLOCKS * TYPE_SIZE) % 4 == 0
        by_2: tl.constexpr = (NUM_BLOCKS * OFFSET) % 2 + SIZE % 2 + (NUM_BLOCKS * TYPE_SIZE) % 2 == 0
    else:
        by_4: tl.constexpr = OFFSET % 4 + TYPE_SIZE % 4 == 0
        by_2: tl.constexpr = OFFSET % 2 + TYPE_SIZE % 2 == 0
    if by_4:
        return tl.load(ptr.to(tl.pointer_type(tl.uint32)))
    elif by_2:
        pairs = ptr.to(tl.pointer_type(tl.uint16))
        return tl.load(pairs).to(tl.uint32) | (tl.load(pairs + 1).to(tl.uint32) << 16)
    else:
        low = tl.load(ptr).to(tl.uint32) | (tl.load(ptr + 1).to(tl.uint32) << 8)
        return low | (tl.load(ptr + 2).to(tl.uint32) << 16) | (tl.load(ptr + 3).to(tl.uint32) << 24)


@jit
def load_nibbles(
    row_ptr,
    block,
    OFFSET: tl.constexpr,
    SIZE: tl.constexpr,
    START: tl.constexpr,
    TYPE_SIZE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    PLANES: tl.constexpr,
):
    """Load the 32 4-bit codes in bytes START to START+15 of a field, low nibbles first, as uint8 [BLOCK_N, 32]."""
    ptr = field_ptr(row_ptr, block, OFFSET, SIZE, TYPE_SIZE, NUM_BLOCKS, PLANES)
    lane = tl.arange(0, 32)
    packed = tl.load(ptr[:, None] + (START + lane % 16)[None, :])
    return (packed >> (lane // 16 * 4).to(tl.uint8)[None, :]) & 0xF


@jit
def halves_of_16(first, second):
    """Spread two [BLOCK_N] values over the weights 0-15 and 16-31 of a slice: [BLOCK_N, 32]."""
    return tl.where((tl.arange(0, 32) < 16)[None, :], first[:, None], second[:, None])


@jit
def unpack_bits(word):
    """Spread the 32 bits of each uint32 [BLOCK_N], lowest first, over a slice: uint32 [BLOCK_N, 32] of 0 and 1."""
    return (word[:, None] >> tl.arange(0, 32).to(tl.uint32)[None, :]) & 1


@jit
def unpack_int8(bits):
    """Turn the low 8 bits of each uint32, a signed byte, into float32."""
    return (bits & 0xFF).to(tl.uint8).to(tl.int8, bitcast=True).to(tl.float32)


@jit
def unpack_half(bits):
    """Turn the low 16 bits of each uint32 into the float32 value of that IEEE half."""
    return (bits & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@jit
def load_half(row_ptr, block, OFFSET: tl.constexpr, TYPE_SIZE: tl.constexpr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Load a one-half field as float32 [BLOCK_N].

    From planes with an even number of blocks the aligned 32-bit word around it is loaded, because a 2-byte load can be no
    asynchronous copy.
    """
    if PLANES and NUM_BLOCKS % 2 == 0 and TYPE_SIZE % 2 == 0:
        at = block >> 1
        word = tl.load((row_ptr + (NUM_BLOCKS * OFFSET + at * 4)).to(tl.pointer_type(tl.uint32)))
        return unpack_half(word >> ((block & 1) * 16))
    else:
        ptr = field_ptr(row_ptr, block, OFFSET, 2, TYPE_SIZE, NUM_BLOCKS, PLANES)
        return tl.load(ptr.to(tl.pointer_type(tl.float16))).to(tl.float32)


@jit
def load_half_pair(
    row_ptr, block, OFFSET: tl.constexpr, TYPE_SIZE: tl.constexpr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr
):
    """Load a field of two halves (d and m or dmin), 4-byte aligned, by one word: two float32 [BLOCK_N]."""
    word = load_word(row_ptr, block, OFFSET, 4, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)
    return unpack_half(word), unpack_half(word >> 16)


@jit
def load_k_scale_min(
    row_ptr,
    block,
    i: tl.constexpr,
    OFFSET: tl.constexpr,
    TYPE_SIZE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    PLANES: tl.constexpr,
):
    """Load 6-bit sc and m of sub-block i from the 12 scale bytes of Q4_K and Q5_K as float32 [BLOCK_N] each.

    The bytes are read as three aligned words: byte loads of 12 addresses would each be a separate, narrow transaction.
    """
    j: tl.constexpr = 8 * (i % 4)
    a = load_word(row_ptr, block, OFFSET, 12, 0, TYPE_SIZE, NUM_BLOCKS, PLANES) >> j
    b = load_word(row_ptr, block, OFFSET, 12, 1, TYPE_SIZE, NUM_BLOCKS, PLANES) >> j
    if i < 4:
        sc = a & 63
        m = b & 63
    else:
        c = load_word(row_ptr, block, OFFSET, 12, 2, TYPE_SIZE, NUM_BLOCKS, PLANES) >> j
        sc = (c & 0xF) | ((a >> 2) & 0x30)
        m = ((c >> 4) & 0xF) | ((b >> 2) & 0x30)
    return sc.to(tl.float32), m.to(tl.float32)
