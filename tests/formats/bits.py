"""Bitwise comparison of float32 arrays, for decodes that promise the oracle's very bits."""

from __future__ import annotations

import numpy as np


def assert_same_bits(got: np.ndarray, expected: np.ndarray) -> None:
    """Fail with the first differing position; a NaN equals any NaN.

    The payload of a NaN is not part of the promise.
    """
    assert got.dtype == expected.dtype == np.float32 and got.shape == expected.shape
    same = (got.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(got) & np.isnan(expected))
    if not same.all():
        at = tuple(int(i) for i in np.argwhere(~same)[0])
        raise AssertionError(
            f"{(~same).sum()} of {same.size} differ, first at {at}: got {got[at]!r}, expected {expected[at]!r}"
        )
