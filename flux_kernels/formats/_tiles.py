"""Help formats decode in Triton: `load_*` touch memory, `unpack_*` do not.

All take `row_ptr`, a [BLOCK_N] tensor of uint8 pointers to row starts, and the index of a block in the row. A field of
`SIZE` bytes at `OFFSET` in the block stands at block * TYPE_SIZE + OFFSET in file order, and at
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
    START: tl.constexpr = NUM_BLOCKS * OFFSET if PLANES else OFFSET
    STRIDE: tl.constexpr = SIZE if PLANES else TYPE_SIZE
    ROW: tl.constexpr = NUM_BLOCKS * TYPE_SIZE
    # Only % and + work on every mix of int and constexpr, compiled and interpreted.
    if START % 4 + STRIDE % 4 + ROW % 4 == 0:
        return tl.load(ptr.to(tl.pointer_type(tl.uint32)))
    elif START % 2 + STRIDE % 2 + ROW % 2 == 0:
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
    """Load 32 4-bit codes, bytes START to START+15 of a field, as uint8 [BLOCK_N, 32].

    Low nibbles come first.
    """
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
    """Spread the 32 bits of each uint32 [BLOCK_N] over a slice: uint32 [BLOCK_N, 32] of 0 and 1.

    The lowest bit comes first.
    """
    return (word[:, None] >> tl.arange(0, 32).to(tl.uint32)[None, :]) & 1


@jit
def spread_fields(word, EACH: tl.constexpr, WIDTH: tl.constexpr):
    """Give weight j of a slice bits WIDTH * (j // EACH) and up of a uint32 [BLOCK_N].

    Returns uint32 [BLOCK_N, 32], not masked.
    """
    return word[:, None] >> (tl.arange(0, 32) // EACH * WIDTH).to(tl.uint32)[None, :]


@jit
def spread_fields_of_two(first, second, EACH: tl.constexpr, WIDTH: tl.constexpr):
    """Spread `first` over weights 0-15 and `second` over 16-31 like `spread_fields`.

    Returns uint32 [BLOCK_N, 32]. One 64-bit shift, not a select: through it the compiler still sees that EACH neighbours are
    equal, and so loads grid entries whole: a third to a half of the main loop's instructions, 32- and 64-bit loads instead of
    bytes.
    """
    both = first.to(tl.uint64) | (second.to(tl.uint64) << 32)
    return (both[:, None] >> (tl.arange(0, 32) // EACH * WIDTH).to(tl.uint64)[None, :]).to(tl.uint32)


@jit
def unpack_even_signs(index):
    """Pick weight j % 8's sign bit of the 7-bit sign index of its eight: uint32 [BLOCK_N, 32] of 0 and 1.

    The eighth sign makes the number of minus signs even, so it is the parity of the seven bits, computed by two folds and a
    table of the parities of 0 to 15 in the bits of 0x6996.
    """
    folded = (index ^ (index >> 4)) & 0xF
    parity = (tl.full(index.shape, 0x6996, tl.uint32) >> folded) & 1
    return ((index | (parity << 7)) >> (tl.arange(0, 32) % 8).to(tl.uint32)[None, :]) & 1


@jit
def gather_grid(table_ptr, index, LENGTH: tl.constexpr):
    """Look up weight j % LENGTH of grid entry `index` [BLOCK_N, 32]: signed byte as float32 [BLOCK_N, 32]."""
    at = index.to(tl.int32) * LENGTH + (tl.arange(0, 32) % LENGTH)[None, :]
    return tl.load(table_ptr + at).to(tl.int8, bitcast=True).to(tl.float32)


@jit
def lookup16(code, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, W3: tl.constexpr):
    """Look up 4-bit codes in 16 signed bytes held in four int32 words: float32 of code's shape.

    Selects and a shift of immediates: no memory access that a software pipeline would have to carry.
    """
    code = code.to(tl.int32)
    upper = (code & 4) != 0
    word = tl.where((code & 8) != 0, tl.where(upper, W3, W2), tl.where(upper, W1, W0))
    return (word >> ((code & 3) * 8)).to(tl.int8).to(tl.float32)


@jit
def unpack_e2m1(code):
    """Turn 4-bit FP4 (E2M1) codes into twice their value as float32.

    Exponent and mantissa are put where a half has them, which scales by 2^-14; adding 0.0 makes -0.0 ggml's 0.
    """
    code = code.to(tl.uint16)
    half = ((code & 7) << 9) | ((code & 8) << 12)
    return half.to(tl.float16, bitcast=True).to(tl.float32) * 32768.0 + 0.0


@jit
def unpack_int8(bits):
    """Turn the low 8 bits of each uint32, a signed byte, into float32."""
    return (bits & 0xFF).to(tl.uint8).to(tl.int8, bitcast=True).to(tl.float32)


@jit
def unpack_half(bits):
    """Turn the low 16 bits of each uint32 into the float32 value of that IEEE half."""
    return (bits & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@jit
def load_narrow(
    row_ptr,
    block,
    OFFSET: tl.constexpr,
    SIZE: tl.constexpr,
    TYPE_SIZE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    PLANES: tl.constexpr,
):
    """Load a field of SIZE 1 or 2 bytes to the low bits of uint32 [BLOCK_N].

    The bits above it are undefined. From planes of whole, aligned words the word around it is loaded, because a load of fewer
    than 4 bytes can be no asynchronous copy.
    """
    PER_WORD: tl.constexpr = 4 // SIZE
    if PLANES and (NUM_BLOCKS * OFFSET) % 4 == 0 and (NUM_BLOCKS * TYPE_SIZE) % 4 == 0 and NUM_BLOCKS % PER_WORD == 0:
        at = block // PER_WORD
        word = tl.load((row_ptr + (NUM_BLOCKS * OFFSET + at * 4)).to(tl.pointer_type(tl.uint32)))
        return word >> tl.cast(block % PER_WORD * (8 * SIZE), tl.uint32)
    else:
        ptr = field_ptr(row_ptr, block, OFFSET, SIZE, TYPE_SIZE, NUM_BLOCKS, PLANES)
        START: tl.constexpr = NUM_BLOCKS * OFFSET if PLANES else OFFSET
        STRIDE: tl.constexpr = SIZE if PLANES else TYPE_SIZE
        if SIZE == 1:
            return tl.load(ptr).to(tl.uint32)
        elif START % 2 + STRIDE % 2 + NUM_BLOCKS * TYPE_SIZE % 2 == 0:
            return tl.load(ptr.to(tl.pointer_type(tl.uint16))).to(tl.uint32)
        else:
            return tl.load(ptr).to(tl.uint32) | (tl.load(ptr + 1).to(tl.uint32) << 8)


@jit
def load_half(row_ptr, block, OFFSET: tl.constexpr, TYPE_SIZE: tl.constexpr, NUM_BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Load a one-half field as float32 [BLOCK_N]."""
    return unpack_half(load_narrow(row_ptr, block, OFFSET, 2, TYPE_SIZE, NUM_BLOCKS, PLANES))


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
    """Load 6-bit sc and m of sub-block i of Q4_K and Q5_K as float32 [BLOCK_N] each.

    They lie in 12 scale bytes. The bytes are read as three aligned words: byte loads of 12 addresses would each be a
    separate, narrow transaction.
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
