"""What CI's small sweep of compiled kernels runs: no kernel, format, dtype or card is left out."""

from __future__ import annotations

import pytest

from bench.aot.sweep.cases import CAPABILITIES, FLOATS, FORMAT_FREE, KERNELS, SHARED, WITH_FORMAT, small
from flux_kernels.formats import FORMATS

CASES = small()


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_is_left_out(kernel):
    """Each kernel meets each format or dtype, on all cards; what shares its main loop, every fifth format."""
    mine = [case for case in CASES if case.kernel == kernel]
    if kernel in FORMAT_FREE:
        assert {case.dtype for case in mine} == set(FLOATS)
    elif kernel not in SHARED:
        assert {case.format for case in mine} == set(FORMATS)
    if kernel in WITH_FORMAT:
        assert {case.capability for case in mine} == set(CAPABILITIES)
        assert {case.dtype for case in mine} == set(KERNELS[kernel])


def test_every_format_meets_every_card():
    assert {(case.format, case.capability) for case in CASES} == {(name, card) for name in FORMATS for card in CAPABILITIES}
