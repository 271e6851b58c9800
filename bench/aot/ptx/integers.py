"""Compute with integers and bits (PTX ISA, "Integer Arithmetic", "Logic and Shift")."""

from __future__ import annotations

import operator

import numpy as np

from .faults import Fault
from .forms import elementwise

_NIBBLES = np.arange(0, 16, 4, dtype=np.uint32)
_SIZES = (16, 32, 64)
_WIDER = {"s16": np.int32, "u16": np.uint32, "s32": np.int64, "u32": np.uint64}
_COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Divide and truncate towards zero, as PTX does."""
    if (b == 0).any():
        raise Fault("integer division by zero")
    floor, exact = a // b, a % b == 0
    return np.where(exact | ((a < 0) == (b < 0)), floor, floor + 1).astype(a.dtype)


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a - _quotient(a, b) * b).astype(a.dtype)


def _multiply_wide(a: np.ndarray, b: np.ndarray, wide: type) -> np.ndarray:
    return a.astype(wide) * b.astype(wide)


def _multiply_high(a: np.ndarray, b: np.ndarray, wide: type) -> np.ndarray:
    return (_multiply_wide(a, b, wide) >> wide(8 * a.dtype.itemsize)).astype(a.dtype)


def shift_left(a: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """Shift; an amount of the width or more gives 0."""
    bits = 8 * a.dtype.itemsize
    return np.where(amount < bits, a << np.minimum(amount, bits - 1).astype(a.dtype), 0).astype(a.dtype)


def shift_right(a: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """Shift; an amount of the width or more gives 0, or the sign throughout for signed numbers."""
    bits = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(amount, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(amount < bits, shifted, 0).astype(a.dtype)


def permute_bytes(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Pick four of the eight bytes of b:a by nibbles of `selector`, whose bit 3 spreads the byte's sign."""
    a, b, selector = np.broadcast_arrays(a, b, selector)
    choices = np.stack([a, b], axis=-1).view(np.int8)
    nibbles = selector[..., None] >> _NIBBLES & np.uint32(15)
    picked = np.take_along_axis(choices, (nibbles & np.uint32(7)).astype(np.intp), axis=-1)
    return np.where(nibbles & np.uint32(8), picked >> 7, picked).astype(np.int8).view(np.uint32)[..., 0]


def extract_field(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Extract `length` bits from `position` on, sign-extended for signed `a`; past the end sign or 0."""
    position, length = (value.astype(np.int64) & 255 for value in (position, length))
    # Sign-extended for signed a, zero-extended else.
    wide = a.astype(np.int64)
    field = wide >> np.minimum(position, 63)
    length = np.minimum(length, 63)
    low = field & (np.int64(1) << length) - 1
    if a.dtype.kind == "i":
        sign = np.where(length > 0, low >> np.maximum(length - 1, 0) & 1, 0)
        low = low - (sign << length)
    return low.astype(a.dtype)


def _bitwise_select(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Look up every bit in an eight-bit truth table of three inputs (lop3)."""
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.uint32)
    for row in range(8):
        term = [value if row >> bit & 1 else ~value for value, bit in ((a, 2), (b, 1), (c, 0))]
        result |= np.where(table >> np.uint32(row) & np.uint32(1), term[0] & term[1] & term[2], np.uint32(0))
    return result


def _funnel_left(low: np.ndarray, high: np.ndarray, amount: np.ndarray) -> np.ndarray:
    both = high.astype(np.uint64) << np.uint64(32) | low.astype(np.uint64)
    return ((both << (amount & np.uint32(31)).astype(np.uint64)) >> np.uint64(32)).astype(np.uint32)


def _funnel_right(low: np.ndarray, high: np.ndarray, amount: np.ndarray) -> np.ndarray:
    both = high.astype(np.uint64) << np.uint64(32) | low.astype(np.uint64)
    return (both >> (amount & np.uint32(31)).astype(np.uint64)).astype(np.uint32)


def _same_type(opcode: str, ptx_type: str, sources: int, compute) -> None:
    elementwise(opcode, " ".join([ptx_type] * sources), ptx_type, compute)


def _arithmetic(kind: str, size: int) -> None:
    t = f"{kind}{size}"
    _same_type(f"add.{t}", t, 2, operator.add)
    _same_type(f"sub.{t}", t, 2, operator.sub)
    _same_type(f"mul.lo.{t}", t, 2, operator.mul)
    _same_type(f"mad.lo.{t}", t, 3, lambda a, b, c: a * b + c)
    _same_type(f"min.{t}", t, 2, np.minimum)
    _same_type(f"max.{t}", t, 2, np.maximum)
    _same_type(f"div.{t}", t, 2, _quotient)
    _same_type(f"rem.{t}", t, 2, _remainder)
    elementwise(f"shr.{t}", f"{t} u32", t, shift_right)
    for name, compare in _COMPARE.items():
        elementwise(f"setp.{name}.{t}", f"{t} {t}", "pred", compare)


def _wide_products(t: str) -> None:
    wide = _WIDER[t]
    result = f"{t[0]}{2 * int(t[1:])}"
    elementwise(f"mul.wide.{t}", f"{t} {t}", result, lambda a, b: _multiply_wide(a, b, wide))
    elementwise(f"mad.wide.{t}", f"{t} {t} {result}", result, lambda a, b, c: _multiply_wide(a, b, wide) + c)
    _same_type(f"mul.hi.{t}", t, 2, lambda a, b: _multiply_high(a, b, wide))


def _bitwise(t: str) -> None:
    _same_type(f"and.{t}", t, 2, np.bitwise_and)
    _same_type(f"or.{t}", t, 2, np.bitwise_or)
    _same_type(f"xor.{t}", t, 2, np.bitwise_xor)
    _same_type(f"not.{t}", t, 1, np.invert)


for _size in _SIZES:
    for _kind in "su":
        _arithmetic(_kind, _size)
    _same_type(f"neg.s{_size}", f"s{_size}", 1, operator.neg)
    _same_type(f"abs.s{_size}", f"s{_size}", 1, np.abs)
    _bitwise(f"b{_size}")
    elementwise(f"shl.b{_size}", f"b{_size} u32", f"b{_size}", shift_left)
    for _name in ("eq", "ne"):
        elementwise(f"setp.{_name}.b{_size}", f"b{_size} b{_size}", "pred", _COMPARE[_name])
for _type in _WIDER:
    _wide_products(_type)
_bitwise("pred")
for _type in ("s16x2", "u16x2"):
    for _name, _compute in (("add", operator.add), ("min", np.minimum), ("max", np.maximum)):
        _same_type(f"{_name}.{_type}", _type, 2, _compute)
for _type in ("s32", "u32"):
    elementwise(f"bfe.{_type}", f"{_type} u32 u32", _type, extract_field)
elementwise("prmt.b32", "b32 b32 b32", "b32", permute_bytes)
elementwise("lop3.b32", "b32 b32 b32 u32", "b32", _bitwise_select)
elementwise("shf.l.wrap.b32", "b32 b32 u32", "b32", _funnel_left)
elementwise("shf.r.wrap.b32", "b32 b32 u32", "b32", _funnel_right)
