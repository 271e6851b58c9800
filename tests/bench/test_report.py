"""The verdict of `bench`: ratios of the rows, and no claim without one."""

from __future__ import annotations

import pytest

from flux_kernels.benchmark.linears import summary
from flux_kernels.benchmark.verdict import verdict


def row(provider, milliseconds, spread=0.01, **more):
    """Make a row; `spread` is how far p20 and p80 lie from the median, as a share of it."""
    times = dict.fromkeys(("p20_ms", "p50_ms", "p80_ms"), "")
    if milliseconds:
        middle = float(milliseconds)
        times = dict(p20_ms=str(middle * (1 - spread)), p50_ms=str(middle), p80_ms=str(middle * (1 + spread)))
    base = dict(format="Q4_K", size="1024x1024", provider=provider, calls=2, error="0.001", device="a card", capability="")
    return base | times | dict(note="") | more


def test_ratios_come_from_the_rows_and_a_cpu_is_called_one():
    lines = verdict([row("torch", "2"), row("ours exact", "4"), row("ours int8", "1"), row("diffusers", "6")])
    assert len(lines) == 5 and lines[0].startswith("This is a CPU")
    assert "Q4_K 0.50" in lines[1] and "int8 mode, 2.00 times" in lines[2] and "Q4_K 1.50" in lines[3]
    assert "no difference" not in " ".join(lines)


def test_nothing_is_said_about_what_was_not_measured():
    lines = verdict([row("torch", "2"), row("ours exact", "", error="")])
    assert "not measured" in lines[1] and "not measured" in lines[3] and "not measured" in lines[4]
    missing = row("diffusers", "", error="", note="not installed: gguf. Run: pip install x")
    assert verdict([row("torch", "2"), row("ours exact", "4"), missing])[3] == f"diffusers: {missing['note']}."
    assert verdict([row("torch", "")]) == ["Nothing was measured, so nothing can be said."]
    assert verdict([]) == ["No type was timed in every linear call of a step, so nothing is said about them."]


def test_overlapping_spreads_are_no_difference():
    """3.0 within 10 % and 3.3 within 10 % overlap; 3.0 and 6.0 do not."""
    lines = verdict(
        [row("torch", "3.3", 0.1), row("ours exact", "3.0", 0.1), row("ours int8", "3.1", 0.1), row("diffusers", "6", 0.1)]
    )
    assert "Q4_K 1.10 (no difference seen)" in lines[1]
    assert "Q4_K in exact mode, 1.10 times the speed of torch (no difference seen)" in lines[2]
    assert "no difference seen from it: Q4_K in int8 mode" in lines[2]
    assert "Q4_K 2.00" in lines[3] and "no difference" not in lines[3]


@pytest.mark.parametrize("more", [dict(spread=0), dict(repeats=1), dict(repeats="2")])
def test_fewer_than_three_repeats_have_no_spread_and_support_no_claim(more):
    """Nor is "no difference seen" said of 0.50 times the speed; ratios are speeds as in the rows."""
    rows = [row("torch", "2", **more), row("ours exact", "4", **more)]
    lines = verdict(rows)
    assert "Q4_K 0.50 (spread unknown with fewer than 3 repeats)" in lines[1] and "Speed of exact mode" in lines[1]
    assert "0.50 times the speed of torch (spread unknown" in lines[2] and "Fastest" not in lines[2]
    assert "no difference" not in " ".join(lines) and "2.00" not in " ".join(lines)
    text = summary([one | dict(m=1) for one in rows]).splitlines()
    assert "?0.50 x torch" in text[1] and "?1.00" not in text[0] and text[2].startswith("? spread unknown")


def test_terminal_rows_are_marked_as_in_the_readme():
    text = summary([row("torch", "3.3", 0.1), row("ours exact", "3.0", 0.1), row("ours int8", "9", 0.1)]).splitlines()
    assert (
        "~1.10 x torch" in text[1]
        and " 0.37 x torch" in text[2]
        and text[3].startswith("~ no difference seen")
        and len(text) == 4
    )


def test_what_is_like_torch_is_like_the_best_that_is_slower_than_torch():
    """Of Q6_K at 0.78, whose spread reaches torch's, and Q8_0 at 0.90 nobody can say which is faster."""
    sides = [("Q6_K", "torch", "10", 0.15), ("Q6_K", "ours exact", "12.8", 0.15), ("Q8_0", "torch", "10", 0.01)]
    rows = [row(side, time, spread, format=name) for name, side, time, spread in [*sides, ("Q8_0", "ours exact", "11.1", 0.01)]]
    lines = verdict(rows)
    assert "Q6_K 0.78 (no difference seen), Q8_0 0.90." in lines[1]
    assert lines[2].endswith(
        "Q8_0 in exact mode, 0.90 times the speed of torch; no difference seen from it: Q6_K in exact mode."
    )
    faster = verdict([*rows[2:], *(one | dict(format="Q4_K") for one in (row("torch", "90"), row("ours exact", "400")))])
    assert "no difference seen" not in faster[2]


def test_a_mode_that_failed_its_gate_is_named_with_the_reason():
    failed = row("ours int8", "", error="0.3", note="wrong result: relative error 0.3, at most 0.025")
    lines = verdict([row("torch", "2"), row("ours exact", "4"), row("ours int8", "1"), failed])
    assert len(lines) == 6 and "Q4_K in exact mode, 0.50 times" in lines[2]
    assert "Q4_K in int8 mode (1 call, wrong result: relative error 0.3" in lines[5]
    assert "wrong result" in " ".join(verdict([row("torch", ""), failed]))
