"""Test what the PTX interpreter refuses: small kernels break each rule once, the fault says where."""

from __future__ import annotations

import numpy as np
import pytest

from bench.aot.ptx import Buffer, Fault

from .tiny_ptx import run

N = 32
COPY = "add.s64 %rd10, %rd1, %rd100;\nld.global.b32 %r1, [%rd10];\nadd.s64 %rd11, %rd0, %rd100;\nst.global.b32 [%rd11], %r1;"


def out() -> Buffer:
    return Buffer.empty(N, np.uint32)


def test_a_copy_runs():
    y, x = out(), np.arange(N, dtype=np.uint32)
    counts = run(COPY, y, x)
    assert (y.result() == x).all()
    assert counts.opcodes["ld.global.b32"] == counts.opcodes["st.global.b32"] == 1


def test_the_fault_names_the_line_of_ptx():
    with pytest.raises(Fault, match=r"line \d+: ld\.global\.b32 %r1"):
        run(COPY, out(), np.zeros(N - 1, np.uint32))


@pytest.mark.parametrize("past", [4, -4, 4096])
def test_accesses_beside_a_buffer(past):
    x = np.zeros(N, np.uint32)
    with pytest.raises(Fault, match="outside every buffer"):
        run(COPY.replace("[%rd10]", f"[%rd10+{past}]"), out(), x)
    with pytest.raises(Fault, match="outside every buffer"):
        run(COPY.replace("[%rd11]", f"[%rd11+{past}]"), out(), x)


def test_a_mask_that_lets_one_too_many_store():
    """Planted: 30 of 32 threads have an element; a guard of <= stores the 31st."""
    masked = COPY.replace("st.global", "setp.lt.u32 %p1, %r100, 30;\n@%p1 st.global").replace("ld.", "mov.b32 %r1, 7;\n//")
    y = Buffer.empty(30, np.uint32)
    run(masked, y, np.zeros(1, np.uint32))
    assert (y.result() == 7).all()
    with pytest.raises(Fault, match=r"outside every buffer.*1 of 31 threads"):
        run(masked.replace("setp.lt", "setp.le"), Buffer.empty(30, np.uint32), np.zeros(1, np.uint32))


def test_a_part_of_a_buffer_that_was_not_handed_over():
    allowed = np.ones(4 * N, bool)
    allowed[8:12] = False
    with pytest.raises(Fault, match="outside every buffer"):
        run(COPY, out(), Buffer(np.zeros(N, np.uint32), allowed=allowed))


def test_misaligned_accesses():
    x = np.zeros(2 * N, np.uint32)
    with pytest.raises(Fault, match="misaligned by 2 for 4 bytes"):
        run(COPY.replace("[%rd10]", "[%rd10+2]"), out(), x)
    with pytest.raises(Fault, match="misaligned by 4 for 8 bytes"):
        run(COPY.replace("ld.global.b32 %r1", "ld.global.v2.b32 {%r1, %r2}"), out(), x)


def test_memory_that_nobody_wrote():
    with pytest.raises(Fault, match="nobody wrote"):
        run(COPY, out(), Buffer.empty(N, np.uint32))
    with pytest.raises(Fault, match="nobody wrote"):
        run("ld.shared.b32 %r1, [%r100];".replace("%r100", "0"), out(), shared=128)
    y = out()
    run(COPY.replace("st.global", "setp.ne.u32 %p1, %r100, 5;\n@%p1 st.global"), y, np.zeros(N, np.uint32))
    with pytest.raises(Fault, match="1 of 32 elements of an output were never written"):
        y.result()


def test_registers_that_nobody_wrote():
    with pytest.raises(Fault, match="reads %r7, which nobody wrote"):
        run("add.s32 %r1, %r7, 1;", out())


@pytest.mark.parametrize(
    "opcode", ["add.ftz.f32", "add.s33", "fma.rz.f32", "ld.global.nc.b32", "max.NaN.xorsign.abs.f32", "made.up"]
)
def test_unknown_opcodes(opcode):
    with pytest.raises(Fault, match=rf"unknown opcode {opcode}, line \d+"):
        run(f"{opcode} %r1, %r100, %r100;", out())


def test_unreadable_text():
    for text in ("add.s32 %r1, %r2", "42;", "bra $nowhere;"):
        with pytest.raises(Fault):
            run(text, out())


EXCHANGE = """
shl.b32 %r1, %r100, 2;
st.shared.b32 [%r1], %r100;
bar.sync 0;
xor.b32 %r2, %r1, 128;
ld.shared.b32 %r3, [%r2];
bar.sync 0;
st.shared.b32 [%r1], %r3;
add.s64 %rd10, %rd0, %rd100;
st.global.b32 [%rd10], %r3;
"""  # two warps hand each other a word, then write over what they read


def test_an_exchange_runs_in_any_order():
    for order in (None, *map(np.random.default_rng, range(4))):
        y = Buffer.empty(64, np.uint32)
        run(EXCHANGE, y, threads=64, shared=256, order=order)
        assert (y.result() == np.arange(64) ^ 32).all()


@pytest.mark.parametrize(
    "which, fault",
    [(0, "reads what another warp wrote|nobody wrote"), (1, "overwrites what another warp read|reads what another")],
)
def test_a_missing_barrier(which, fault):
    """Without the first barrier a warp reads early, without the second it writes early, in both orders."""
    parts = EXCHANGE.split("bar.sync 0;")
    body = [parts[0] + parts[1] + "bar.sync 0;" + parts[2], parts[0] + "bar.sync 0;" + parts[1] + parts[2]][which]
    for order in (None, *map(np.random.default_rng, range(4))):
        with pytest.raises(Fault, match=fault):
            run(body, Buffer.empty(64, np.uint32), threads=64, shared=256, order=order)


def test_two_warps_may_write_the_same_value_but_not_two():
    same = "and.b32 %r1, %r100, 31;\nshl.b32 %r2, %r1, 2;\nst.shared.b32 [%r2], %r1;"
    for order in (None, np.random.default_rng(0)):
        run(same, Buffer.empty(1, np.uint32), threads=64, shared=128, order=order)
        with pytest.raises(Fault, match="race"):
            run(same.replace("[%r2], %r1", "[%r2], %r100"), Buffer.empty(1, np.uint32), threads=64, shared=128, order=order)


ASYNC = """
shl.b32 %r1, %r100, 4;
mad.wide.u32 %rd10, %r100, 16, %rd1;
cp.async.cg.shared.global [ %r1 + 0 ], [ %rd10 + 0 ], 0x10, %r2;
cp.async.commit_group;
cp.async.ca.shared.global [ %r1 + 512 ], [ %rd10 + 0 ], 0x4, %r3;
cp.async.commit_group;
cp.async.wait_group 1;
ld.shared.b32 %r4, [%r1];
cp.async.wait_group 0;
ld.shared.b32 %r5, [%r1+512];
add.s32 %r6, %r4, %r5;
add.s64 %rd11, %rd0, %rd100;
st.global.b32 [%rd11], %r6;
"""


def run_async(body: str) -> np.ndarray:
    y = out()
    run("mov.b32 %r2, 16;\nmov.b32 %r3, 4;\n" + body, y, np.arange(4 * N, dtype=np.uint32), shared=1024)
    return y.result()


def test_asynchronous_copies_land_at_their_wait():
    assert (run_async(ASYNC) == 8 * np.arange(N)).all()
    # A source of 0 bytes: zeros.
    assert (run_async(ASYNC.replace("0x4, %r3", "0x4, 0")) == 4 * np.arange(N)).all()


@pytest.mark.parametrize(
    "wait, instead", [("wait_group 1", "wait_group 2"), ("wait_group 0", "wait_group 1"), ("cp.async.wait_group 1;", "")]
)
def test_a_read_before_the_wait(wait, instead):
    """Planted early read: a wait is weakened or removed."""
    with pytest.raises(Fault, match=r"nobody wrote.*ld\.shared"):
        run_async(ASYNC.replace(wait, instead))


def test_a_copy_of_the_wrong_size_or_place():
    with pytest.raises(Fault, match="cannot copy 4 bytes"):
        run_async(ASYNC.replace("0x10", "0x4"))
    with pytest.raises(Fault, match="misaligned by 4 for 16 bytes"):
        run_async(ASYNC.replace("[ %rd10 + 0 ], 0x10", "[ %rd10 + 4 ], 0x10"))


def test_divergence():
    half = "setp.lt.u32 %p1, %r100, 16;\n@%p1 bra $end;\nmov.b32 %r1, 0;\n$end:"
    with pytest.raises(Fault, match="divergent"):
        run(half, out())
    with pytest.raises(Fault, match="divergent"):
        run("setp.lt.u32 %p1, %r100, 16;\n@%p1 ret;", out())
    whole = half.replace("16", "64").replace("%p1 bra", "!%p1 bra")
    run(whole, out())


def test_a_barrier_that_not_every_warp_reaches():
    body = "setp.lt.u32 %p1, %r100, 32;\n@%p1 bra $end;\nbar.sync 0;\n$end:"
    with pytest.raises(Fault, match="only 1 of 2 groups of 32 threads reach a barrier"):
        run(body, Buffer.empty(1, np.uint32), threads=64, order=np.random.default_rng(0))


@pytest.mark.parametrize(
    "stride, width, taken, least",
    [
        (4, "b32", 1, 1),
        (8, "b32", 2, 1),
        (128, "b32", 32, 1),
        (0, "b32", 1, 1),
        (8, "v2.b32", 2, 2),
        (16, "v4.b32", 4, 4),
        (128, "v4.b32", 32, 4),
    ],
)
def test_bank_conflicts(stride, width, taken, least):
    registers = {"b32": "%r3", "v2.b32": "{%r3, %r4}", "v4.b32": "{%r3, %r4, %r5, %r6}"}[width]
    fill = "\n".join(f"st.shared.v4.b32 [%r1+{512 * i}], {{%r100, %r100, %r100, %r100}};" for i in range(8))
    body = (
        f"shl.b32 %r1, %r100, 4;\n{fill}\nbar.sync 0;\nmul.lo.s32 %r2, %r100, {stride};\nld.shared.{width} {registers}, [%r2];"
    )
    counts = run(body, out(), shared=4096, count_banks=True)
    assert counts.bank_conflicts[f"ld.shared.{width}"] == [taken, least]
    assert counts.bank_conflicts["st.shared.v4.b32"] == [32, 32]
