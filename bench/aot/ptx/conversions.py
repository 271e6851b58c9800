"""Convert between integers and floats: cvt (PTX ISA, "Data Movement and Conversion Instructions")."""

from __future__ import annotations

import numpy as np

from .forms import elementwise
from .numbers import odd, round_from_odd, width_of

_INTEGERS = tuple(f"{kind}{size}" for kind in "su" for size in (8, 16, 32, 64))
_FLOATS = ("f16", "bf16", "f32")
_NUMPY = {
    f"{kind}{size}": np.dtype(f"{'i' if kind == 's' else 'u'}{size // 8}").type for kind in "su" for size in (8, 16, 32, 64)
}
_TO_WHOLE = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def _integer_to_integer(source: str, target: str) -> None:
    """Register cvt that truncates or extends; an 8-bit result is extended by its own sign."""
    kept = target if width_of(target) > 1 else f"{target[0]}16"
    elementwise(f"cvt.{target}.{source}", source, kept, lambda a: a.astype(_NUMPY[target]).astype(_NUMPY[kept]))
    if source != target:
        lowest, highest = np.iinfo(_NUMPY[target]).min, np.iinfo(_NUMPY[target]).max

        def saturate(a: np.ndarray) -> np.ndarray:
            low = max(lowest, int(np.iinfo(a.dtype).min))
            high = min(highest, int(np.iinfo(a.dtype).max))
            return np.clip(a, a.dtype.type(low), a.dtype.type(high)).astype(_NUMPY[target]).astype(_NUMPY[kept])

        elementwise(f"cvt.sat.{target}.{source}", source, kept, saturate)


def integer_to_float(values: np.ndarray, target: str) -> np.ndarray:
    """Round integers to the nearest float of a PTX type, ties to even."""
    # Inexact for 64 bits only.
    near = values.astype(np.float64)
    if values.dtype.itemsize == 8:
        exact = np.array([int(whole) - int(rounded) for whole, rounded in zip(values, near, strict=True)], np.float64)
        near = odd(near, exact)
    return round_from_odd(near, target)


def float_to_integer(values: np.ndarray, target: str, to_whole) -> np.ndarray:
    """Round to a whole number, clamp to the target's range; NaN gives 0 below 64 bits (sm_80 and up)."""
    whole = to_whole(values.astype(np.float64))
    limits = np.iinfo(_NUMPY[target])
    clamped = np.clip(np.nan_to_num(whole, nan=0.0), float(limits.min), float(limits.max))
    return clamped.astype(np.int64 if target[0] == "s" else np.uint64).astype(_NUMPY[target])


def _widen(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)


def _narrow(target: str):
    return lambda a: a.astype(np.float16) if target == "f16" else a


def _two_narrow(target: str):
    """Return what packs two float32 operands, the first into the upper half."""
    narrow = _narrow(target)
    return lambda high, low: np.stack(np.broadcast_arrays(narrow(low), narrow(high)), axis=-1)


for _source in _INTEGERS:
    for _target in _INTEGERS:
        _integer_to_integer(_source, _target)
    for _target in _FLOATS:
        elementwise(f"cvt.rn.{_target}.{_source}", _source, _target, lambda a, t=_target: integer_to_float(a, t))
for _source in _FLOATS:
    for _target in _INTEGERS:
        if _target in ("s64", "u64"):
            continue  # their limits are not float64 numbers; no kernel needs them
        _kept = _target if width_of(_target) > 1 else f"{_target[0]}16"
        for _mode, _whole in _TO_WHOLE.items():
            elementwise(
                f"cvt.{_mode}.{_target}.{_source}",
                _source,
                _kept,
                lambda a, t=_target, kept=_kept, whole=_whole: float_to_integer(a, t, whole).astype(_NUMPY[kept]),
            )
for _half in ("f16", "bf16"):
    elementwise(f"cvt.f32.{_half}", _half, "f32", _widen)
    elementwise(f"cvt.rn.{_half}.f32", "f32", _half, _narrow(_half))
    elementwise(f"cvt.rn.{_half}x2.f32", "f32 f32", f"{_half}x2", _two_narrow(_half))
for _mode, _whole in _TO_WHOLE.items():
    elementwise(f"cvt.{_mode}.f32.f32", "f32", "f32", _whole)
