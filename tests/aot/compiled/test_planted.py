"""Plant errors in code that Triton compiled: the interpreter finds each, in any order of warps."""

from __future__ import annotations

import re
from functools import cache

import numpy as np

from bench.aot.sweep.cases import Case

from .planted import outcome, replaced, text_of

CASE = Case("narrow", "Q4_K", "bf16", 89)
KERNEL = "fused_gemm_kernel"
BARRIER, STORE, LESS = r"\tbar\.sync[^\n]*\n", r"@%p\d+ (st\.global)", r"setp\.lt\.s32"
WAIT = r"cp\.async\.wait_group\s+\d+;"


@cache
def ptx() -> str:
    return text_of(CASE, KERNEL)


def count(pattern: str) -> int:
    return len(re.findall(pattern, ptx()))


def test_unedited_code_is_right_in_every_order_of_warps():
    assert outcome(CASE, KERNEL, lambda text: text) == "right"
    assert outcome(CASE, KERNEL, lambda text: text, np.random.default_rng(1)) == "right"
    assert outcome(Case("narrow", "Q8_0", "bf16", 90), KERNEL, lambda text: text, np.random.default_rng(2)) == "right"


def test_each_barrier_is_missed():
    """A planted race: whichever barrier is removed, two warps meet at a byte."""
    assert count(BARRIER) >= 3
    for number in range(count(BARRIER)):
        assert outcome(CASE, KERNEL, replaced(BARRIER, number, "")).startswith("fault: race"), number


def test_a_missing_barrier_shows_warp_by_warp():
    assert outcome(CASE, KERNEL, replaced(BARRIER, 0, ""), np.random.default_rng(0)).startswith("fault")


def test_a_wait_that_is_too_weak():
    """A planted early read: the loop's wait leaves all copies under way."""
    found = outcome(CASE, KERNEL, replaced(WAIT, 0, "cp.async.wait_group 9;"))
    assert found.startswith("fault: reads bytes that nobody wrote") and "ld" in found


def test_each_wrong_mask():
    """A store without its mask, and masks that let one row or one column too many through."""
    assert count(STORE) >= 1
    assert count(LESS) >= 2
    for edits, pattern, instead in ((count(STORE), STORE, r"\1"), (count(LESS), LESS, "setp.le.s32")):
        found = [outcome(CASE, KERNEL, replaced(pattern, number, instead)) for number in range(edits)]
        assert all(one != "right" for one in found), found
        assert any(one.startswith("fault: outside every buffer") for one in found), found


def test_an_instruction_that_is_not_known():
    found = outcome(CASE, KERNEL, replaced(r"fma\.rn\.f32", 0, "fma.rz.ftz.f32"))
    assert found.startswith("fault: unknown opcode fma.rz.ftz.f32, line ")


def test_a_product_that_nobody_waited_for():
    """On sm_90 the waits for the warpgroup's products are removed."""
    case = Case("narrow", "Q8_0", "bf16", 90)
    found = outcome(case, KERNEL, lambda text: re.sub(r"wgmma\.wait_group\.sync\.aligned\s+\d+;", "", text))
    assert "has not delivered" in found or "still uses" in found, found
    found = outcome(case, KERNEL, replaced(r"fence\.proxy\.async[^\n]*\n", 0, "\n"))
    assert "after the last fence.proxy.async" in found, found
