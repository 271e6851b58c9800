"""Compute in f16, bf16 and f32, each result rounded once (PTX ISA, "Floating-Point Instructions").

Only forms without .ftz are here: Triton compiles ours without. div.full.f32 is an approximation of at most two units in the
last place; it is exact here unless Threads.division_error says by how many units it shall be off.
"""

from __future__ import annotations

import operator
from functools import reduce

import numpy as np

from .faults import Fault
from .forms import Step, elementwise, form
from .numbers import add_odd, fma, round_from_odd
from .parse import Instruction
from .threads import Mask, Threads, reader

_ORDERED = {"eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}


def larger(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the maximum: of a number and NaN the number, and +0 above -0."""
    return np.where(np.isnan(a), b, np.where(np.isnan(b) | (a > b) | ((a == b) & np.signbit(b)), a, b))


def smaller(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the minimum: of a number and NaN the number, and -0 below +0."""
    return np.where(np.isnan(a), b, np.where(np.isnan(b) | (a < b) | ((a == b) & np.signbit(a)), a, b))


def _or_nan(choose):
    def compute(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.where(np.isnan(a) | np.isnan(b), a + b, choose(a, b))

    return compute


def _of_all(choose):
    return lambda *operands: reduce(choose, operands)


def _add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Add bfloat16 numbers, held as float32, with one rounding."""
    return round_from_odd(add_odd(a.astype(np.float64), b.astype(np.float64)), "bf16")


def _fma_of(ptx_type: str):
    return lambda a, b, c: fma(a, b, c, ptx_type)


def _arithmetic(t: str) -> None:
    pair = f"{t} {t}"
    add = _add if t.startswith("bf16") else operator.add
    for rounding in ("", ".rn"):
        elementwise(f"add{rounding}.{t}", pair, t, add)
        elementwise(f"sub{rounding}.{t}", pair, t, lambda a, b: add(a, -b))
        # Of bfloat16 exact in float32.
        elementwise(f"mul{rounding}.{t}", pair, t, operator.mul)
    elementwise(f"fma.rn.{t}", f"{t} {t} {t}", t, _fma_of(t.removesuffix("x2")))


def _selection(t: str) -> None:
    # sm_100 and up take three operands.
    pair, more = f"{t} {t}", 1 if t == "f32" else 0
    for name, choose in (("max", larger), ("min", smaller)):
        elementwise(f"{name}.{t}", pair, t, _of_all(choose), more)
        elementwise(f"{name}.NaN.{t}", pair, t, _of_all(_or_nan(choose)), more)


def _comparisons(t: str) -> None:
    pair = f"{t} {t}"
    for name, compare in _ORDERED.items():
        elementwise(f"setp.{name}.{t}", pair, "pred", compare)
    elementwise(f"setp.ne.{t}", pair, "pred", lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b))
    elementwise(f"setp.neu.{t}", pair, "pred", np.not_equal)
    elementwise(f"setp.equ.{t}", pair, "pred", lambda a, b: (a == b) | np.isnan(a) | np.isnan(b))
    for name, opposite in (("ltu", "ge"), ("leu", "gt"), ("gtu", "le"), ("geu", "lt")):
        elementwise(f"setp.{name}.{t}", pair, "pred", _not(_ORDERED[opposite]))
    elementwise(f"setp.nan.{t}", pair, "pred", lambda a, b: np.isnan(a) | np.isnan(b))
    elementwise(f"setp.num.{t}", pair, "pred", lambda a, b: ~(np.isnan(a) | np.isnan(b)))


def _not(compare):
    return lambda a, b: ~compare(a, b)


def _sign_changes(t: str, bits: int) -> None:
    """Register neg and abs, which change the sign bit alone, of NaN too."""
    word = f"b{bits}"
    sign = {16: np.uint16(1 << 15), 32: np.uint32(1 << 31)}[bits]
    elementwise(f"neg.{t}", word, word, lambda a: a ^ sign)
    elementwise(f"abs.{t}", word, word, lambda a: a & ~sign)


for _type in ("f32", "f16", "bf16"):
    _arithmetic(_type)
    _arithmetic(f"{_type}x2")
    _selection(_type)
    _sign_changes(_type, 32 if _type == "f32" else 16)
    _comparisons(_type)
for _type in ("f16x2", "bf16x2"):
    _selection(_type)
for _half in ("f16", "bf16"):  # sm_100 and up: 16-bit operands, float32 result
    for _name, _compute in (("add", operator.add), ("sub", operator.sub)):
        elementwise(f"{_name}.rn.f32.{_half}", f"{_half} f32", "f32", lambda a, b, op=_compute: op(a.astype(np.float32), b))
    elementwise(f"fma.rn.f32.{_half}", f"{_half} {_half} f32", "f32", _fma_of("f32"))
elementwise("div.rn.f32", "f32 f32", "f32", operator.truediv)


@form("div.full.f32")
def _divide(instruction: Instruction) -> Step:
    destination, a, b = instruction.operands
    read_a, read_b = reader(a, "f32"), reader(b, "f32")

    def step(threads: Threads, mask: Mask) -> None:
        quotient = threads.spread(read_a(threads) / read_b(threads))
        threads.set(destination, off_by(quotient, threads.division_error), "f32", mask)

    return step


def off_by(values: np.ndarray, units: int) -> np.ndarray:
    """Move finite non-zero float32 numbers away from zero by units in the last place (to it if negative)."""
    moved = (values.view(np.int32) + np.int32(units)).view(np.float32)
    return np.where(np.isfinite(values) & (values != 0) & np.isfinite(moved), moved, values)


def check_division_error(units: int) -> None:
    """Raise Fault where an error is more than div.full.f32 allows."""
    if abs(units) > 2:
        raise Fault(f"div.full.f32 is off by at most 2 units in the last place, not {units}")
