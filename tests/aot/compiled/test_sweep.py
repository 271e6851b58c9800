"""Run the cases of CI's small sweep in the PTX interpreter (see bench/aot/sweep)."""

from __future__ import annotations

import pytest

from bench.aot.sweep.cases import small
from bench.aot.sweep.outcome import run_case


@pytest.mark.parametrize("case", small(), ids=lambda case: f"{case.kernel}-{case.format}-{case.dtype}-{case.capability}")
def test_result_is_within_its_bound(case):
    outcome = run_case(case)
    assert not outcome.problem, outcome.problem
    assert outcome.launches
