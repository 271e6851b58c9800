"""What CI's small sweep of compiled kernels runs: no kernel, format, dtype or card is left out."""

from __future__ import annotations

import pytest

from bench.aot.sweep.cases import CAPABILITIES, FLOATS, FORMAT_FREE, KERNELS, WITH_FORMAT, small
from flux_kernels.formats import FORMATS

CASES = small()


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_is_left_out(kernel):
    """Each kernel meets each format or dtype, the branches every fifth format, on all cards."""
    mine = [case for case in CASES if case.kernel == kernel]
    if kernel in FORMAT_FREE:
        assert {case.dtype for case in mine} == set(FLOATS)
    elif not kernel.endswith("_branch"):
        assert {case.format for case in mine} == set(FORMATS)
    if kernel in WITH_FORMAT:
        assert {case.capability for case in mine} == set(CAPABILITIES)
        assert {case.dtype for case in mine} == set(KERNELS[kernel])


def test_every_format_meets_every_card():
    assert {(case.format, case.capability) for case in CASES} == {(name, card) for name in FORMATS for card in CAPABILITIES}
