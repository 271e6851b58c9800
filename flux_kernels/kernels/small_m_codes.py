"""Small-M kernel on the tensor core: y = x @ w.T for up to eight rows.

The integer codes are multiplied before any scale.

A code becomes a 16-bit float by one byte permutation for two weights, exactly; one MMA multiplies 16 x 16 of them with x, whose
rows are padded to the MMA's eight columns. Scale and offset of a sub-block then act on its float32 sums, 16 or 32 weights at
a time: y += scale * (sum(code * x) - zero * sum(x)) + offset * sum(x). sum(x) comes from an MMA with a constant, which also
takes the constant that a code's float form adds back out. Nothing is rounded to 16 bit on the way.

K is shared by SPLITS warps of a program, as the batch of a 3-D product, and their sums are added in a fixed order: with one
warp a program there would be too few warps a multiprocessor. Even and odd codes of a slice are two products, so x is loaded
in pairs: 4-byte aligned rows.
"""

from __future__ import annotations

from .._triton import jit, tl
from ..formats import SLICE, BlockFormat
from ..formats._code_tiles import widen_codes
from .branch import add_branch
from .tiles import Tile

# Rows of x a program multiplies: the narrowest side of a tensor-core product.
COLUMNS = tl.constexpr(8)


@jit
def slice_product(codes, x_even, x_odd, acc, MASK: tl.constexpr, SIGN: tl.constexpr, PACKED: tl.constexpr):
    """Return acc + code @ x over a slice, a code as `widen_codes` makes it."""
    acc = tl.dot(widen_codes(codes, False, MASK, SIGN, x_even.dtype, PACKED), x_even, acc)
    return tl.dot(widen_codes(codes, True, MASK, SIGN, x_even.dtype, PACKED), x_odd, acc)


@jit
def code_product(codes, x_even, x_odd, acc, CODE_BITS: tl.constexpr, PACKED: tl.constexpr):
    """Return acc + (code + excess) @ x over a slice.

    Eight bits are a signed byte, exact as two parts of opposite sign.
    """
    if CODE_BITS == 8:
        acc = slice_product(codes, x_even, x_odd, acc, 0x80, 0x8000, PACKED)
        return slice_product(codes, x_even, x_odd, acc, 0x7F, 0, PACKED)
    else:
        return slice_product(codes, x_even, x_odd, acc, (1 << CODE_BITS) - 1, 0, PACKED)


@jit
def sum_of_x(x_even, x_odd, TIMES: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr):
    """Return TIMES * sum(x) over a slice for every row of w.

    ROWS of them are multiplied and the others copied.
    """
    constant = tl.full((SPLITS, ROWS, 16), TIMES, tl.float32).to(x_even.dtype)
    sums = tl.dot(constant, x_odd, tl.dot(constant, x_even))
    if ROWS < BLOCK_N:
        sums = tl.broadcast_to(sums[:, None, :, :], (SPLITS, BLOCK_N // ROWS, ROWS, COLUMNS))
    return tl.reshape(sums, (SPLITS, BLOCK_N, COLUMNS))


@jit
def pairs_to_x(pairs, HALF: tl.constexpr, HALVES: tl.constexpr, DTYPE: tl.constexpr):
    """Return x of the even and of the odd weights of a slice, [SPLITS, 16, COLUMNS] each.

    They are zeros for the half with another scale.
    """
    if HALVES > 1:
        pairs = tl.where((tl.arange(0, 16) // 8 == HALF)[None, None, :], pairs, 0)
    pairs = tl.permute(pairs, (0, 2, 1))
    return (pairs & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True), (pairs >> 16).to(tl.uint16).to(DTYPE, bitcast=True)


@jit(do_not_specialize=["M", "R"])
def small_m_codes_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    hidden_ptr,
    up_ptr,
    y_ptr,
    M,
    N,
    R,
    stride_xm,
    K: tl.constexpr,
    CODES: tl.constexpr,
    SCALES: tl.constexpr,
    UNITS: tl.constexpr,
    ZERO: tl.constexpr,
    CODE_BITS: tl.constexpr,
    HALVES: tl.constexpr,
    OFFSETS: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_K: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Compute BLOCK_N columns of COLUMNS rows of y (grid axis 1).

    x has unit stride along K, y is contiguous.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    # EXCESS is what a widened code has too much, UNIT what its unit is worth (see widen_codes).
    EXCESS: tl.constexpr = ((ZERO + 128) if DTYPE == tl.bfloat16 else ZERO * 2.0**-24) if CODE_BITS < 8 else 0
    UNIT: tl.constexpr = 1.0 if DTYPE == tl.bfloat16 else 2.0**24
    TIMES: tl.constexpr = -EXCESS if EXCESS > 0 else -1.0
    TILE_BLOCKS: tl.constexpr = NUM_BLOCKS * TILE_K // K
    split = tl.arange(0, SPLITS)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rows_n, rows_m = tl.minimum(offs_n, N - 1), tl.minimum(offs_m, M - 1)
    # Rows beyond M are not asked for. Every program reads all of x, past L1, and about in step with the others: with the last row
    # in their place an H200 took 1.4 times as long for one row as for eight (docs/decisions/first-gpu.md).
    here = (offs_m < M)[None, :, None]
    row_ptr = (w_ptr + rows_n.to(tl.int64) * ROW_BYTES)[None, :]
    x_row = x_ptr + rows_m.to(tl.int64)[None, :] * stride_xm + split[:, None] * TILE_K
    x_ptrs = x_row.to(tl.pointer_type(tl.uint32))[:, :, None] + tl.arange(0, 16)[None, None, :]
    zeros = tl.zeros((SPLITS, BLOCK_N, COLUMNS), tl.float32)
    products = zeros
    offsets = zeros
    for step in tl.range(0, K // (TILE_K * SPLITS), num_stages=STAGES):
        block = (step * SPLITS + split)[:, None] * TILE_BLOCKS
        scaled = zeros
        shifted = zeros
        for i in tl.static_range(TILE_K // 32):
            codes = CODES(row_ptr, block, i, NUM_BLOCKS, PLANES, PACKED)
            pairs = tl.load(x_ptrs + (step * (TILE_K * SPLITS // 2) + 16 * i), mask=here, other=0)
            for h in tl.static_range(HALVES):
                x_even, x_odd = pairs_to_x(pairs, h, HALVES, DTYPE)
                sums = sum_of_x(x_even, x_odd, TIMES, SPLITS, BLOCK_N, BLOCK_N if OFFSETS else 16)
                acc = code_product(codes, x_even, x_odd, sums if EXCESS > 0 else zeros, CODE_BITS, PACKED)
                scale, offset = SCALES(row_ptr, block, i * HALVES + h, NUM_BLOCKS, PLANES)
                scaled += scale[:, :, None] * acc
                if OFFSETS:
                    shifted += offset[:, :, None] * sums
        if UNITS is None:
            products += scaled
            offsets += shifted
        else:
            scale_unit, offset_unit = UNITS(row_ptr, block, NUM_BLOCKS, PLANES)
            products += scale_unit[:, :, None] * scaled
            if OFFSETS:
                offsets += offset_unit[:, :, None] * shifted
    acc = tl.sum(products * UNIT + offsets * (1 / TIMES), axis=0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows_n).to(tl.float32)[:, None]
    if hidden_ptr is not None:
        acc = add_branch(acc, up_ptr, hidden_ptr, rows_n, rows_m, R)
    y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(y_ptrs, tl.trans(acc).to(y_ptr.dtype.element_ty), mask=mask)


def code_constants(fmt: BlockFormat, constants: dict, tile: Tile, packed: bool) -> dict:
    """Return the kernel's constexprs.

    `constants` are those of every kernel for the format's rows; `packed` is true outside of Triton's interpreter.
    """
    codes = fmt.code_tile
    if codes is None:
        raise ValueError(f"{fmt.name} has no codes for the tensor core.")
    return {name: value for name, value in constants.items() if name != "DECODE"} | dict(
        CODES=codes.codes,
        SCALES=codes.scales,
        UNITS=codes.units,
        ZERO=codes.zero,
        CODE_BITS=codes.bits,
        HALVES=SLICE // fmt.sub_block,
        OFFSETS=codes.offsets,
        BLOCK_N=tile.block_n,
        TILE_K=tile.tile_k,
        SPLITS=tile.splits,
        STAGES=tile.num_stages,
        PACKED=packed,
    )
