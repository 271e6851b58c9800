"""PTX types in numpy: bits to numbers and back, and the roundings that numpy does not have.

bfloat16 is held as float32 and rounded when it becomes bits. Results that must be rounded once from an exact value pass
through a wider type by *rounding to odd*: where the wide result is inexact its last bit is set, so that no tie can arise
that the exact value does not have, and the second rounding is the only one (Boldo and Melquiond, "Emulation of FMA and
correctly rounded sums", 2008; the wider type needs two bits more).
"""

from __future__ import annotations

import re
from functools import cache

import numpy as np

from .memory import UNSIGNED

_DTYPES = {
    **{f"{kind}{8 * width}": dtype for kind in "ub" for width, dtype in UNSIGNED.items()},
    **{f"s{8 * width}": np.dtype(f"i{width}").type for width in UNSIGNED},
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
    "pred": np.bool_,
}
_PACKED = {f"{base}x2": base for base in ("s16", "u16", "f16", "bf16", "f32")}  # two in one register, the low one first
CANONICAL_NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF}  # what arithmetic returns


@cache
def width_of(ptx_type: str) -> int:
    """Return the bytes of a register of a PTX type (a predicate counts as 1)."""
    if ptx_type == "pred":
        return 1
    bits, _, pair = re.search(r"(\d+)(x(2))?$", ptx_type).groups()
    return int(bits) // 8 * (2 if pair else 1)


def from_bits(bits: np.ndarray, ptx_type: str) -> np.ndarray:
    """Return the numbers that unsigned words hold; a packed type gives [..., 2], a predicate bool."""
    if ptx_type[0] in "ub" and ptx_type in _DTYPES or ptx_type == "pred":
        return bits
    if ptx_type in _PACKED:
        base = _PACKED[ptx_type]
        parts = np.ascontiguousarray(bits)[..., None].view(UNSIGNED[width_of(base)])
        return from_bits(parts, base)
    if ptx_type == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(_DTYPES[ptx_type])


def to_bits(values: np.ndarray, ptx_type: str) -> np.ndarray:
    """Return the unsigned words that hold numbers; bfloat16 comes as float32 and is rounded to even."""
    if ptx_type in _PACKED:
        base = _PACKED[ptx_type]
        parts = np.ascontiguousarray(to_bits(values, base))
        return parts.view(UNSIGNED[2 * width_of(base)])[..., 0]
    if ptx_type == "bf16":
        return bf16_bits(values)
    if ptx_type == "pred":
        return np.asarray(values, bool)
    if ptx_type in CANONICAL_NAN and np.isnan(values).any():
        values = np.where(np.isnan(values), from_bits(_nan(ptx_type), ptx_type), values)
    return np.ascontiguousarray(values, _DTYPES[ptx_type]).view(UNSIGNED[width_of(ptx_type)])


def _nan(ptx_type: str) -> np.ndarray:
    return np.array(CANONICAL_NAN[ptx_type], UNSIGNED[width_of(ptx_type)])


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bfloat16, ties to even: uint16; NaN becomes the canonical NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + np.uint64(0x7FFF) + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(values), np.uint16(CANONICAL_NAN["bf16"]), rounded.astype(np.uint16))


def odd(rounded: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Turn float64 results rounded to nearest, with remainders `error`, into results rounded to odd."""
    bits = np.ascontiguousarray(rounded).view(np.int64)
    inexact = (error > 0) | (error < 0)
    away = np.where((error > 0) == (rounded > 0), 1, -1)
    return np.where(inexact & (bits & 1 == 0), bits + away, bits).view(np.float64)


def add_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Add float64 numbers and round to odd; the error of a sum is a float64 number (Knuth's TwoSum)."""
    total = a + b
    b_part = total - a
    return odd(total, (a - (total - b_part)) + (b - b_part))


def round_from_odd(values: np.ndarray, ptx_type: str) -> np.ndarray:
    """Round float64 numbers that were rounded to odd to the nearest number of a PTX type, ties to even."""
    if ptx_type != "bf16":
        return values.astype(_DTYPES[ptx_type])
    narrow = values.astype(np.float32)
    bits = narrow.view(np.int32)
    error = values - narrow
    inexact = ((error > 0) | (error < 0)) & np.isfinite(narrow)
    away = np.where((error > 0) == (narrow > 0), 1, -1).astype(np.int32)
    return np.where(inexact & (bits & 1 == 0), bits + away, bits).view(np.float32)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray, ptx_type: str) -> np.ndarray:
    """Compute a * b + c with one rounding, for f16, bf16 and f32: the product is exact in float64."""
    return round_from_odd(add_odd(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)), ptx_type)
