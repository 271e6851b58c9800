"""Test the PTX interpreter's matrix instructions against the ISA's fragments and numpy's matmul."""

from __future__ import annotations

import numpy as np
import pytest

from bench.aot.ptx import Buffer, Fault

from .tiny_ptx import run

LANES = range(32)
SHAPES = {  # opcode's types -> K
    "f32.bf16.bf16.f32": 16,
    "f32.f16.f16.f32": 16,
    "f16.f16.f16.f16": 16,
    "satfinite.s32.s8.s8.s32": 32,
}


def left_place(lane: int, i: int, k: int) -> tuple[int, int]:
    """Return (row, column) of element a_i; k = 16 has 8 elements of 16 bits, k = 32 has 16 bytes."""
    group, member, each = lane >> 2, lane % 4, k // 8
    in_low_rows = i < each or 2 * each <= i < 3 * each
    column = member * each + i % each + (0 if i < 2 * each else k // 2)
    return (group if in_low_rows else group + 8), column


def right_place(lane: int, i: int, k: int) -> tuple[int, int]:
    group, member, each = lane >> 2, lane % 4, k // 8
    return member * each + i % each + (0 if i < each else k // 2), group


def sum_place(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2 if i < 2 else (lane >> 2) + 8), lane % 4 * 2 + i % 2


def fragments(matrix: np.ndarray, elements: int, place) -> np.ndarray:
    """Return the bytes [32, ...] of each lane's fragment as uint32 words."""
    parts = np.array([[matrix[place(lane, i)] for i in range(elements)] for lane in LANES], matrix.dtype)
    return np.ascontiguousarray(parts).view(np.uint32)


def bf16(values: np.ndarray) -> np.ndarray:
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def operands(types: str, k: int, seed: int):
    """Return (a, b, c) as stored, and as numbers; small integers, so that every sum is exact."""
    random = np.random.default_rng(seed)
    a, b, c = (random.integers(-8, 9, shape) for shape in ((16, k), (k, 8), (16, 8)))
    if "s8" in types:
        stored = a.astype(np.int8), b.astype(np.int8), c.astype(np.int32)
    elif "bf16" in types:
        stored = bf16(a), bf16(b), c.astype(np.float32)
    else:
        stored = a.astype(np.float16), b.astype(np.float16), c.astype(np.float16 if types.startswith("f16") else np.float32)
    return stored, (a, b, c)


@pytest.mark.parametrize("types", SHAPES)
def test_mma_places_every_element(types):
    k = SHAPES[types]
    (a, b, c), numbers = operands(types, k, 3)
    each = k // 8
    words = np.concatenate(
        [
            fragments(a, 4 * each, lambda lane, i: left_place(lane, i, k)),
            fragments(b, 2 * each, lambda lane, i: right_place(lane, i, k)),
            fragments(c, 4, sum_place),
        ],
        axis=1,
    )
    count = words.shape[1]
    n_sum = count - 6
    out = Buffer.empty((32, n_sum), np.uint32)
    registers = [f"%r{i}" for i in range(count)]
    left, right, sums = (", ".join(registers[part]) for part in (slice(4), slice(4, 6), slice(6, None)))
    body = "\n".join(
        [
            f"mad.wide.u32 %rd10, %r100, {4 * count}, %rd1;",
            f"mad.wide.u32 %rd11, %r100, {4 * n_sum}, %rd0;",
            *[f"ld.global.b32 %r{i}, [%rd10+{4 * i}];" for i in range(count)],
            f"mma.sync.aligned.m16n8k{k}.row.col.{types} {{ {sums} }}, {{ {left} }}, {{ {right} }}, {{ {sums} }};",
            *[f"st.global.b32 [%rd11+{4 * i}], %r{6 + i};" for i in range(n_sum)],
        ]
    )
    run(body, out, words)
    got = out.result().view(c.dtype)
    expected = numbers[0] @ numbers[1] + numbers[2]
    for lane in LANES:
        for i in range(4):
            assert got[lane, i] == expected[sum_place(lane, i)]


def test_mma_s8_saturates():
    (a, b, _), _ = operands("s8", 32, 4)
    a[:], b[:] = 127, 127
    registers = ", ".join(f"%r{i}" for i in range(4))
    out = Buffer.empty(32, np.uint32)
    body = f"""
    mov.b32 %r0, 2147483000; mov.b32 %r1, 0; mov.b32 %r2, 0; mov.b32 %r3, 0;
    mov.b32 %r4, 0x7f7f7f7f;
    mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 {{ {registers} }}, {{ %r4, %r4, %r4, %r4 }}, {{ %r4, %r4 }}, {{ {registers} }};
    add.s64 %rd10, %rd0, %rd100;
    st.global.b32 [%rd10], %r0;
    """.replace("; mov", ";\n mov")
    run(body, out)
    assert (out.result() == 2**31 - 1).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_and_stmatrix(transposed):
    """Four 8 x 8 matrices go from memory through shared memory and ldmatrix, and back by stmatrix."""
    matrices = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    got, back = Buffer.empty((32, 4), np.uint32), Buffer.empty((4, 8, 8), np.uint16)
    trans = ".trans" if transposed else ""
    body = f"""
    mul.wide.u32 %rd10, %r100, 16;
    add.s64 %rd11, %rd2, %rd10;
    ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd11];
    shl.b32 %r10, %r100, 4;
    st.shared.v4.b32 [%r10], {{%r1, %r2, %r3, %r4}};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r5, %r6, %r7, %r8}}, [%r10];
    add.s64 %rd12, %rd0, %rd10;
    st.global.v4.b32 [%rd12], {{%r5, %r6, %r7, %r8}};
    stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r10+512], {{%r5, %r6, %r7, %r8}};
    ld.shared.v4.b32 {{%r1, %r2, %r3, %r4}}, [%r10+512];
    add.s64 %rd13, %rd1, %rd10;
    st.global.v4.b32 [%rd13], {{%r1, %r2, %r3, %r4}};
    """
    run(body, got, back, matrices, shared=1024)
    assert (back.result() == matrices).all()
    pairs = got.result().view(np.uint16).reshape(32, 4, 2)
    for lane in LANES:
        for matrix in range(4):
            row, column = lane // 4, lane % 4 * 2
            for h in range(2):
                place = (column + h, row) if transposed else (row, column + h)
                assert pairs[lane, matrix, h] == matrices[matrix][place]


def swizzled(address: int, width: int) -> int:
    """Return where a byte stands: bits 4 to 6 of its address exclusive-ored with bits 7 to 9.

    Narrower patterns have fewer such bits.
    """
    return address ^ (address >> 3 & {128: 0x70, 64: 0x30, 32: 0x10}[width])


FENCE, WAIT, PROXY = "wgmma.fence.sync.aligned;", "wgmma.wait_group.sync.aligned 0;", "fence.proxy.async.shared::cta;"
FILL = {  # how 2 KiB come to shared memory
    "store": "ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd11+{0}];\nst.shared.v4.b32 [%r10+{0}], {{%r1, %r2, %r3, %r4}};",
    "async": "cp.async.cg.shared.global [%r10+{0}], [%rd11+{0}], 16;\ncp.async.wait_all;",
}


def wgmma_body(width: int, left_in_registers: bool, fence: str, wait: str, proxy: str, fill: str) -> str:
    """Return PTX that copies 16 KiB to shared memory, multiplies 64 x 16 by 16 x 16, and stores the sums."""
    mode = {128: 1, 64: 2, 32: 3}[width]
    descriptor = mode << 62 | (8 * width // 16) << 32
    left = "{%r20, %r21, %r22, %r23}" if left_in_registers else "%rd20"
    modifiers = "1, 1, 0" if left_in_registers else "1, 1, 0, 0"
    sums = ", ".join(f"%r{i}" for i in range(30, 38))
    copies = "\n".join(FILL[fill].format(2048 * i) for i in range(8))
    return f"""
    mul.wide.u32 %rd10, %r100, 16;
    add.s64 %rd11, %rd1, %rd10;
    shl.b32 %r10, %r100, 4;
    {copies}
    bar.sync 0;
    {proxy}
    mad.wide.u32 %rd12, %r100, 16, %rd2;
    ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [%rd12];
    mov.b64 %rd20, {descriptor};
    mov.b64 %rd21, {descriptor + 8192 // 16};
    {fence}
    wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {{{sums}}}, {left}, %rd21, 0, {modifiers};
    wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {{{sums}}}, {left}, %rd21, 1, {modifiers};
    wgmma.commit_group.sync.aligned;
    {wait}
    mad.wide.u32 %rd13, %r100, 32, %rd0;
    st.global.v4.b32 [%rd13], {{%r30, %r31, %r32, %r33}};
    st.global.v4.b32 [%rd13+16], {{%r34, %r35, %r36, %r37}};
    """


def wgmma_run(width: int, left_in_registers: bool, fence=FENCE, wait=WAIT, proxy=PROXY, fill="store", **options):
    """Return (got, expected) [64, 16] of twice a product."""
    random = np.random.default_rng(5)
    # B is [N, K].
    a, b = random.integers(-8, 9, (64, 16)), random.integers(-8, 9, (16, 16))
    shared = np.zeros(16384, np.uint8)
    for matrix, start in ((a, 0), (b, 8192)):
        for row in range(matrix.shape[0]):
            for k in range(16):
                at = swizzled(start + row // 8 * 8 * width + row % 8 * width + 2 * k, width)
                shared[at : at + 2] = bf16(matrix[row, k]).reshape(1).view(np.uint8)
    warps = [fragments(bf16(a[16 * w : 16 * w + 16]), 8, lambda lane, i: left_place(lane, i, 16)) for w in range(4)]
    out = Buffer.empty((128, 8), np.float32)
    body = wgmma_body(width, left_in_registers, fence, wait, proxy, fill)
    run(body, out, shared, np.concatenate(warps), threads=128, shared=16384, **options)
    got = np.zeros((64, 16))
    for thread in range(128):
        for i in range(8):
            row, column = sum_place(thread % 32, i % 4)
            got[thread // 32 * 16 + row, i // 4 * 8 + column] = out.result()[thread, i]
    return got, 2 * (a @ b.T)


@pytest.mark.parametrize("width", [128, 64, 32])
@pytest.mark.parametrize("left_in_registers", [False, True])
def test_wgmma_reads_swizzled_tiles(width, left_in_registers):
    got, expected = wgmma_run(width, left_in_registers)
    assert (got == expected).all()


def test_wgmma_that_nobody_waited_for():
    with pytest.raises(Fault, match="has not delivered"):
        wgmma_run(128, True, wait="")
    with pytest.raises(Fault, match="has not delivered"):
        wgmma_run(128, True, wait="wgmma.wait_group.sync.aligned 1;")
    with pytest.raises(Fault, match="still uses"):
        wgmma_run(128, True, wait="mov.b32 %r20, 0;")


def test_wgmma_without_its_fences():
    with pytest.raises(Fault, match=r"written after the last wgmma\.fence"):
        wgmma_run(128, True, fence="")
    with pytest.raises(Fault, match=r"written after the last fence\.proxy"):
        wgmma_run(128, False, proxy="")


def test_wgmma_reads_asynchronous_copies():
    """Triton 3.6 leaves out the fence between cp.async and wgmma: a fault unless it is allowed."""
    with pytest.raises(Fault, match=r"written after the last fence\.proxy"):
        wgmma_run(128, False, proxy="", fill="async")
    for options in (dict(proxy="", copies_need_fence=False), {}):
        got, expected = wgmma_run(128, False, fill="async", **options)
        assert (got == expected).all()


def test_wgmma_whose_memory_is_overwritten():
    with pytest.raises(Fault, match="has been overwritten"):
        wgmma_run(
            128, False, wait="mov.b32 %r99, 7;\nbar.sync 0;\nst.shared.b32 [%r10], %r99;\nwgmma.wait_group.sync.aligned 0;"
        )
