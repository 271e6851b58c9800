"""Run every kernel with every format once in the PTX interpreter (see bench/aot/sweep)."""

from __future__ import annotations

import pytest

from bench.aot.sweep.cases import CAPABILITIES, FLOATS, FORMAT_FREE, KERNELS, WITH_FORMAT, small
from bench.aot.sweep.outcome import run_case
from flux_kernels.formats import FORMATS

CASES = small()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kernel}-{case.format}-{case.dtype}-{case.capability}")
def test_result_is_within_its_bound(case):
    outcome = run_case(case)
    assert not outcome.problem, outcome.problem
    assert outcome.launches


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
