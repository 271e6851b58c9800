"""Integer instructions of the PTX interpreter against Python's integers."""

from __future__ import annotations

import numpy as np
import pytest

from .tiny_ptx import each_thread

pytestmark = pytest.mark.filterwarnings("error")
_EDGES = np.array([0, 1, 2, 31, 32, 255, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x80, 0xFF80, 0x12345678], np.uint32)


def words(seed: int, n: int = 256) -> np.ndarray:
    random = np.random.default_rng(seed).integers(0, 1 << 32, n, dtype=np.uint32)
    random[: len(_EDGES)] = _EDGES
    random[len(_EDGES) : 2 * len(_EDGES)] = np.roll(_EDGES, seed)
    return random


def signed(word: int) -> int:
    return int(word) - (1 << 32) if word >> 31 else int(word)


def in_python(compute, *operands) -> np.ndarray:
    return np.array([compute(*map(int, row)) & 0xFFFFFFFF for row in zip(*operands, strict=True)], np.uint32)


def test_prmt_picks_bytes_and_spreads_signs():
    def permute(a, b, selector):
        source = (a | b << 32).to_bytes(8, "little")
        picked = []
        for i in range(4):
            nibble = selector >> 4 * i & 15
            byte = source[nibble & 7]
            picked.append((255 if byte & 128 else 0) if nibble & 8 else byte)
        return int.from_bytes(bytes(picked), "little")

    a, b, selector = words(1), words(2), words(3)
    assert (each_thread("prmt.b32 %r0, %r1, %r2, %r3;", a, b, selector) == in_python(permute, a, b, selector)).all()


@pytest.mark.parametrize("kind", ["s", "u"])
def test_bfe_sign_extends_and_ends_at_the_word(kind):
    def extract(a, position, length):
        a, position, length = signed(a) if kind == "s" else a, position & 255, length & 255
        if not length:
            return 0
        # Python's >> of a negative number brings in the sign, for ever.
        value = a >> position & (1 << length) - 1
        return value - (1 << length) if kind == "s" and value >> length - 1 else value

    a, position, length = words(4), words(5) % 40, words(6) % 36
    assert (
        each_thread(f"bfe.{kind}32 %r0, %r1, %r2, %r3;", a, position, length) == in_python(extract, a, position, length)
    ).all()


def test_shifts_past_the_width():
    a, amount = words(7), words(8) % 70
    assert (each_thread("shl.b32 %r0, %r1, %r2;", a, amount) == in_python(lambda x, n: x << n, a, amount)).all()
    assert (each_thread("shr.u32 %r0, %r1, %r2;", a, amount) == in_python(lambda x, n: x >> n, a, amount)).all()
    assert (each_thread("shr.s32 %r0, %r1, %r2;", a, amount) == in_python(lambda x, n: signed(x) >> n, a, amount)).all()


def test_funnel_shifts_and_lop3():
    low, high, amount = words(9), words(10), words(11) % 70
    both = lambda a, b: a | b << 32
    left = in_python(lambda a, b, n: both(a, b) << (n & 31) >> 32, low, high, amount)
    right = in_python(lambda a, b, n: both(a, b) >> (n & 31), low, high, amount)
    assert (each_thread("shf.l.wrap.b32 %r0, %r1, %r2, %r3;", low, high, amount) == left).all()
    assert (each_thread("shf.r.wrap.b32 %r0, %r1, %r2, %r3;", low, high, amount) == right).all()
    either = in_python(lambda a, b, c: (a & b) | (~a & c), low, high, amount)
    assert (each_thread("lop3.b32 %r0, %r1, %r2, %r3, 0xCA;", low, high, amount) == either).all()


def test_division_truncates_towards_zero():
    a, b = words(12), np.where(words(13) == 0, np.uint32(7), words(13))
    quotient = lambda x, y: abs(signed(x)) // abs(signed(y)) * (1 if (signed(x) < 0) == (signed(y) < 0) else -1)
    assert (each_thread("div.s32 %r0, %r1, %r2;", a, b) == in_python(quotient, a, b)).all()
    rest = in_python(lambda x, y: signed(x) - quotient(x, y) * signed(y), a, b)
    assert (each_thread("rem.s32 %r0, %r1, %r2;", a, b) == rest).all()


def test_products_low_high_and_packed_sums():
    a, b, c = words(14), words(15), words(16)
    assert (each_thread("mad.lo.s32 %r0, %r1, %r2, %r3;", a, b, c) == in_python(lambda x, y, z: x * y + z, a, b, c)).all()
    assert (each_thread("mul.hi.u32 %r0, %r1, %r2;", a, b) == in_python(lambda x, y: x * y >> 32, a, b)).all()
    assert (each_thread("mul.hi.s32 %r0, %r1, %r2;", a, b) == in_python(lambda x, y: signed(x) * signed(y) >> 32, a, b)).all()
    pairs = in_python(lambda x, y: (x + y & 0xFFFF) | ((x >> 16) + (y >> 16) & 0xFFFF) << 16, a, b)
    assert (each_thread("add.s16x2 %r0, %r1, %r2;", a, b) == pairs).all()


def test_comparisons_know_signs():
    a, b = words(17), words(18)
    chosen = each_thread("setp.lt.s32 %p1, %r1, %r2;\n\tselp.b32 %r0, %r1, %r2, %p1;", a, b)
    assert (chosen == in_python(lambda x, y: min(signed(x), signed(y)), a, b)).all()
    chosen = each_thread("setp.lt.u32 %p1, %r1, %r2;\n\tselp.b32 %r0, %r1, %r2, %p1;", a, b)
    assert (chosen == np.minimum(a, b)).all()


@pytest.mark.parametrize(
    "mode, source",
    [
        ("bfly", "lane ^ 5"),
        ("idx", "5"),
        ("up", "max(lane - 5, lane if lane < 5 else 0)"),
        ("down", "lane + 5 if lane < 27 else lane"),
    ],
)
def test_shuffles_stay_in_their_warp(mode, source):
    values = words(19, 64)
    clamp = 0 if mode == "up" else 31
    got = each_thread(f"shfl.sync.{mode}.b32 %r0, %r1, 5, {clamp}, -1;", values)
    where = [32 * (i // 32) + eval(source, {"max": max}, {"lane": i % 32}) for i in range(64)]
    assert (got == values[where]).all()


def test_a_warp_reduces_to_its_largest_signed_word():
    values = words(21, 64)
    got = each_thread("redux.sync.max.s32 %r0, %r1, -1;", values)
    largest = [max(int(word) for word in values[start : start + 32].astype(np.int32)) for start in (0, 32)]
    assert (got.astype(np.int32) == np.repeat(largest, 32)).all()


@pytest.mark.parametrize("size, kind", [(8, "s"), (8, "u"), (16, "s"), (16, "u")])
def test_narrowing_conversions_extend_again(size, kind):
    def narrow(a):
        low = a & (1 << size) - 1
        return low - (1 << size) if kind == "s" and low >> size - 1 else low

    a = words(20)
    got = each_thread(f"cvt.{kind}{size}.u32 %rs1, %r1;\n\tcvt.{kind}32.{kind}16 %r0, %rs1;", a)
    assert (got == in_python(narrow, a)).all()
