"""Help code tiles in Triton: integer codes for the tensor core, two bytes a value.

No scale is applied yet. Byte tensors cost an instruction a byte. Here a value is two codes, so that one shift, mask or byte
permutation on a 32-bit register serves four weights. LLVM does not find that form, so it is spelt out where PACKED (NVIDIA);
the same is said in Triton's own operations for its interpreter. Shapes: `row_ptr` is uint8 pointers [1, BLOCK_N], `block`
int32 [SPLITS, 1].
"""

from __future__ import annotations

from .._triton import jit, tl
from ._tiles import field_ptr, load_word

_SHIFT_RIGHT = tl.constexpr([f"shr.u32 $0, $1, {by};" for by in range(16)])
_SHIFT_LEFT = tl.constexpr([f"shl.b32 $0, $1, {by};" for by in range(16)])
_TAKE_AND_PUT = tl.constexpr("lop3.b32 $0, $1, $2, $3, 0xEA;")  # $1 & $2 | $3
_SELECT = tl.constexpr("lop3.b32 $0, $1, $2, $3, 0xE2;")  # $1 where a bit of $2 is 1, else $3


@jit
def load_codes(
    row_ptr,
    block,
    OFFSET: tl.constexpr,
    SIZE: tl.constexpr,
    START: tl.constexpr,
    TYPE_SIZE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    PLANES: tl.constexpr,
):
    """Load bytes START to START+31 of a field, two a value: uint16 [SPLITS, BLOCK_N, 16]."""
    ptr = field_ptr(row_ptr, block, OFFSET, SIZE, TYPE_SIZE, NUM_BLOCKS, PLANES) + START
    return tl.load(ptr.to(tl.pointer_type(tl.uint16))[:, :, None] + tl.arange(0, 16)[None, None, :])


@jit
def shift_codes(codes, SHIFT: tl.constexpr, PACKED: tl.constexpr):
    """Shift every value right by SHIFT, left by a negative SHIFT; what comes in at the ends is undefined."""
    if SHIFT == 0:
        return codes
    elif PACKED:
        if SHIFT > 0:
            return tl.inline_asm_elementwise(_SHIFT_RIGHT[SHIFT], "=r,r", [codes], tl.uint16, is_pure=True, pack=2)
        else:
            return tl.inline_asm_elementwise(_SHIFT_LEFT[-SHIFT], "=r,r", [codes], tl.uint16, is_pure=True, pack=2)
    elif SHIFT > 0:
        return codes >> SHIFT
    else:
        return codes << -SHIFT


@jit
def join_codes(low, high, LOW_MASK: tl.constexpr, PACKED: tl.constexpr):
    """Take the bits under LOW_MASK of every byte from `low`, the others from `high`."""
    if PACKED:
        mask = tl.full((1, 1, 1), LOW_MASK * 257, tl.uint16)
        return tl.inline_asm_elementwise(_SELECT, "=r,r,r,r", [low, mask, high], tl.uint16, is_pure=True, pack=2)
    else:
        return (low & (LOW_MASK * 257)) | (high & (0xFFFF - LOW_MASK * 257))


@jit
def widen_codes(codes, ODD: tl.constexpr, MASK: tl.constexpr, SIGN: tl.constexpr, DTYPE: tl.constexpr, PACKED: tl.constexpr):
    """Turn the bits under MASK of every value's even or odd byte into a 16-bit float, exactly.

    SIGN (0x8000) makes it negative. bfloat16: 128 + code, the code (or 128) in the bits after the exponent of 128. float16:
    2^-24 * code, as a subnormal number, which tensor cores multiply exactly.
    """
    ABOVE: tl.constexpr = SIGN + (0x4300 if DTYPE == tl.bfloat16 else 0)
    codes = shift_codes(codes, 8 if ODD else 0, PACKED)
    if PACKED:
        mask, above = tl.full((1, 1, 1), MASK, tl.uint16), tl.full((1, 1, 1), ABOVE, tl.uint16)
        bits = tl.inline_asm_elementwise(_TAKE_AND_PUT, "=r,r,r,r", [codes, mask, above], tl.uint16, is_pure=True, pack=2)
    else:
        bits = (codes & MASK) | ABOVE
    return bits.to(tl.uint16).to(DTYPE, bitcast=True)


@jit
def pick_byte(word, J: tl.constexpr):
    """Return byte J of each uint32 as float32."""
    return ((word >> (8 * J)) & 0xFF).to(tl.float32)


@jit
def pick_signed_byte(word, J: tl.constexpr):
    """Return byte J of each uint32, signed, as float32."""
    return ((word << (24 - 8 * J)).to(tl.int32, bitcast=True) >> 24).to(tl.float32)


@jit
def load_k_scale_words(
    row_ptr,
    block,
    UPPER: tl.constexpr,
    OFFSET: tl.constexpr,
    TYPE_SIZE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    PLANES: tl.constexpr,
):
    """Load sc and m of sub-blocks 0-3 (UPPER: 4-7) from the 12 scale bytes of Q4_K and Q5_K.

    Each is a uint32 of four bytes.
    """
    a = load_word(row_ptr, block, OFFSET, 12, 0, TYPE_SIZE, NUM_BLOCKS, PLANES)
    b = load_word(row_ptr, block, OFFSET, 12, 1, TYPE_SIZE, NUM_BLOCKS, PLANES)
    if UPPER:
        c = load_word(row_ptr, block, OFFSET, 12, 2, TYPE_SIZE, NUM_BLOCKS, PLANES)
        return (c & 0x0F0F0F0F) | ((a >> 2) & 0x30303030), ((c >> 4) & 0x0F0F0F0F) | ((b >> 2) & 0x30303030)
    else:
        return a & 0x3F3F3F3F, b & 0x3F3F3F3F
