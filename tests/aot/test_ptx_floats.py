"""Test the PTX interpreter's floating point against exact fractions, rounded by hand."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from .tiny_ptx import each_thread

# name -> (bits of the significand with the hidden one, smallest exponent of a normal number, bits of the exponent field)
_FORMATS = {"f16": (11, -14, 5), "bf16": (8, -126, 8), "f32": (24, -126, 8)}


def exactly(bits: int, name: str) -> Fraction:
    """Return the value of a finite number's bits."""
    precision, smallest, exponent_bits = _FORMATS[name]
    sign = -1 if bits >> (precision - 1 + exponent_bits) & 1 else 1
    exponent, fraction = bits >> precision - 1 & (1 << exponent_bits) - 1, bits & (1 << precision - 1) - 1
    if exponent == 0:
        return sign * Fraction(fraction) * Fraction(2) ** (smallest - precision + 1)
    return sign * Fraction(fraction | 1 << precision - 1) * Fraction(2) ** (exponent - 1 + smallest - precision + 1)


def rounded(value: Fraction, name: str) -> int:
    """Round a value to the nearest number, ties to even, and return its bits without the sign of a zero."""
    precision, smallest, exponent_bits = _FORMATS[name]
    sign, magnitude = (1 if value < 0 else 0) << precision - 1 + exponent_bits, abs(value)
    if not magnitude:
        return 0
    exponent = max(smallest, magnitude.numerator.bit_length() - magnitude.denominator.bit_length())
    while magnitude >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while exponent > smallest and magnitude < Fraction(2) ** exponent:
        exponent -= 1
    # Python rounds ties to even.
    units = round(magnitude / Fraction(2) ** (exponent - precision + 1))
    if units == 1 << precision:
        units, exponent = units >> 1, exponent + 1
    if exponent - smallest + 1 >= (1 << exponent_bits) - 1:
        return sign | (1 << exponent_bits) - 1 << precision - 1
    field = 0 if units < 1 << precision - 1 else exponent - smallest + 1
    return sign | field << precision - 1 | units & (1 << precision - 1) - 1


def finite(name: str, seed: int, n: int = 512) -> np.ndarray:
    """Return bits of finite numbers, many of them with few significant bits, so that ties happen."""
    precision, _, exponent_bits = _FORMATS[name]
    generator = np.random.default_rng(seed)
    bias = (1 << exponent_bits - 1) - 1
    exponent = np.where(generator.random(n) < 0.1, 0, bias + generator.integers(-8, 9, n))
    fraction = generator.integers(0, 1 << precision - 1, n)
    fraction = np.where(generator.random(n) < 0.5, fraction & -(1 << precision // 2), fraction)
    return (generator.integers(0, 2, n) << precision - 1 + exponent_bits | exponent << precision - 1 | fraction).astype(
        np.uint32
    )


def narrow(name: str, instruction: str, sources: int) -> str:
    """Return PTX of a 16-bit instruction on the low halves of %r1, %r2, ...; the result is zero-extended."""
    if name == "f32":
        return instruction
    into = [f"cvt.u16.u32 %rs{i}, %r{i};" for i in range(1, sources + 1)]
    return "\n\t".join([*into, instruction.replace("%r", "%rs"), "cvt.u32.u16 %r0, %rs0;"])


@pytest.mark.parametrize("name", _FORMATS)
@pytest.mark.parametrize(
    "operation, compute", [("add", lambda a, b: a + b), ("mul", lambda a, b: a * b), ("sub", lambda a, b: a - b)]
)
def test_sums_and_products_are_rounded_once(name, operation, compute):
    a, b = finite(name, 1), finite(name, 2)
    if operation != "mul":
        # Nearly cancels or doubles.
        b[::3] = a[::3] ^ np.uint32(1)
    got = each_thread(narrow(name, f"{operation}.{name} %r0, %r1, %r2;", 2), a, b)
    expected = [rounded(compute(exactly(int(x), name), exactly(int(y), name)), name) for x, y in zip(a, b, strict=True)]
    zero = np.array(expected) == 0
    assert (got[~zero] == np.array(expected)[~zero]).all()
    assert (got[zero] & (0x7FFFFFFF if name == "f32" else 0x7FFF) == 0).all()


@pytest.mark.parametrize("name", _FORMATS)
def test_fma_is_rounded_once(name):
    """Among the operands are ones where rounding a float64 sum again would give another number."""
    a, b, c = finite(name, 3, 4096), finite(name, 4, 4096), finite(name, 5, 4096)
    if name == "f32":
        # (1 + 2^-23)(1 + 2^-23 u) + tiny: the product ends just above or below a tie of float32, far below float64's last bit
        a[:64], b[:64] = 0x3F800001, 0x3F800001 + 2 * np.arange(64)
        product = [exactly(int(x), name) * exactly(int(y), name) for x, y in zip(a[:64], b[:64], strict=True)]
        tie = [round(one * 2**23) / Fraction(2**23) + Fraction(1, 2**24) for one in product]
        c[:64] = [rounded(half - one, name) for half, one in zip(tie, product, strict=True)]
        # 1 + 2^-24: a tie.
        c[64:128], a[64:128], b[64:128] = 0x3F800000, 0x33800000, 0x3F800000
        # And a hair from it.
        a[96:128], b[96:128] = 0x33800001, 0x3F7FFFFF
    got = each_thread(narrow(name, f"fma.rn.{name} %r0, %r1, %r2, %r3;", 3), a, b, c)
    rows = zip(a, b, c, strict=True)
    expected = np.array(
        [rounded(exactly(int(x), name) * exactly(int(y), name) + exactly(int(z), name), name) for x, y, z in rows]
    )
    some = expected != 0
    assert (got[some] == expected[some]).all()


def test_fma_where_float64_rounds_to_the_tie():
    """(1 + 2^-12)^2 is half-way between float32 numbers; 2^-80 decides, which float64 cannot hold."""
    # Product 1 + 2^-11 + 2^-24: a tie of float32.
    a, b = f32(*[1 + 2.0**-12] * 32), f32(*[1 + 2.0**-12] * 32)
    c = f32(*[2.0**-80] * 32)
    # What two roundings give.
    assert np.float32(np.float64(1 + 2.0**-12) ** 2 + 2.0**-80) == np.float32(1 + 2.0**-11)
    assert (each_thread("fma.rn.f32 %r0, %r1, %r2, %r3;", a, b, c) == f32(1 + 2.0**-11 + 2.0**-23)[0]).all()
    assert (each_thread("fma.rn.f32 %r0, %r1, %r2, %r3;", a, b, c ^ np.uint32(1 << 31)) == f32(1 + 2.0**-11)[0]).all()


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_float32_to_16_bit_rounds_ties_to_even(name):
    precision = _FORMATS[name][0]
    values = finite("f32", 6, 2048)
    keep = 24 - precision
    # Every one a tie.
    values[:1024] = values[:1024] >> np.uint32(keep) << np.uint32(keep) | np.uint32(1 << keep - 1)
    got = each_thread(f"cvt.rn.{name}.f32 %rs1, %r1;\n\tcvt.u32.u16 %r0, %rs1;", values)
    expected = np.array([rounded(exactly(int(bits), "f32"), name) for bits in values])
    some = expected & 0x7FFF != 0
    assert (got[some] == expected[some]).all()
    pair = each_thread(f"cvt.rn.{name}x2.f32 %r0, %r1, %r2;", values, values[::-1].copy())
    assert (pair == (got << 16 | got[::-1])).all()


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32).view(np.uint32)


def test_maximum_drops_nan_unless_told_not_to():
    a, b = f32(np.nan, 1.0, np.nan, -0.0, 0.0, 3.0), f32(1.0, np.nan, np.nan, 0.0, -0.0, -3.0)
    plain = each_thread("max.f32 %r0, %r1, %r2;", a, b)
    assert (plain == np.array([*f32(1.0, 1.0), 0x7FFFFFFF, *f32(0.0, 0.0, 3.0)])).all()
    strict = each_thread("max.NaN.f32 %r0, %r1, %r2;", a, b)
    assert (strict == np.array([0x7FFFFFFF] * 3 + [*f32(0.0, 0.0, 3.0)])).all()
    small = each_thread("min.f32 %r0, %r1, %r2;", a, b)
    assert (small == np.array([*f32(1.0, 1.0), 0x7FFFFFFF, *f32(-0.0, -0.0, -3.0)])).all()
    three = each_thread("max.f32 %r0, %r1, %r2, %r3;", a, b, f32(9.0, -9.0, np.nan, -1.0, np.nan, 5.0))
    assert (three == np.array([*f32(9.0, 1.0), 0x7FFFFFFF, *f32(0.0, 0.0, 5.0)])).all()


def test_comparisons_with_nan():
    a, b = f32(np.nan, 1.0, 2.0), f32(1.0, 1.0, 1.0)
    assert each_thread("setp.gt.f32 %p1, %r1, %r2;\n\tselp.b32 %r0, 1, 0, %p1;", a, b).tolist() == [0, 0, 1]
    assert each_thread("setp.gtu.f32 %p1, %r1, %r2;\n\tselp.b32 %r0, 1, 0, %p1;", a, b).tolist() == [1, 0, 1]
    assert each_thread("setp.neu.f32 %p1, %r1, %r2;\n\tselp.b32 %r0, 1, 0, %p1;", a, b).tolist() == [1, 0, 1]


def test_float_to_integer_truncates_clamps_and_takes_nan_for_zero():
    values = f32(1.9, -1.9, 4e9, -4e9, np.nan, np.inf)
    got = each_thread("cvt.rzi.s32.f32 %r0, %r1;", values)
    assert got.view(np.int32).tolist() == [1, -1, 2**31 - 1, -(2**31), 0, 2**31 - 1]
    halves = each_thread("cvt.rni.s32.f32 %r0, %r1;", f32(0.5, 1.5, 2.5, -0.5))
    assert halves.view(np.int32).tolist() == [0, 2, 2, 0]
    short = each_thread("cvt.rzi.s16.f32 %rs1, %r1;\n\tcvt.s32.s16 %r0, %rs1;", f32(70000.0, -70000.0, -3.5))
    assert short.view(np.int32).tolist() == [32767, -32768, -3]


def test_integers_to_float_round_once():
    integers = np.random.default_rng(7).integers(0, 1 << 32, 512, dtype=np.uint32)
    # Ties.
    integers[:2] = 0x01000001, 0x01000003
    assert (each_thread("cvt.rn.f32.u32 %r0, %r1;", integers) == [rounded(Fraction(int(i)), "f32") for i in integers]).all()
    got = each_thread("cvt.rn.f32.s32 %r0, %r1;", integers)
    assert (got == [rounded(Fraction(int(i) - (int(i) >> 31 << 32)), "f32") for i in integers]).all()
