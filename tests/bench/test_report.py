"""The verdict of `bench`: ratios of the rows, and no claim without one."""

from __future__ import annotations

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
    assert "Q4_K 2.00" in lines[1] and "int8 mode, 2.00 times" in lines[2] and "Q4_K 1.50" in lines[3]
    assert "no difference" not in " ".join(lines) and "not told apart" not in lines[2]


def test_nothing_is_said_about_what_was_not_measured():
    lines = verdict([row("torch", "2"), row("ours exact", "", error="")])
    assert "not measured" in lines[1] and "not measured" in lines[3] and "not measured" in lines[4]
    assert verdict([row("torch", "")]) == ["Nothing was measured, so nothing can be said."]
    assert verdict([]) == ["No type was timed in every linear call of a step, so nothing is said about them."]


def test_overlapping_spreads_are_no_difference():
    """3.0 within 10 % and 3.3 within 10 % overlap; 3.0 and 6.0 do not."""
    lines = verdict(
        [row("torch", "3.3", 0.1), row("ours exact", "3.0", 0.1), row("ours int8", "3.1", 0.1), row("diffusers", "6", 0.1)]
    )
    assert "Q4_K 0.91 (no difference seen)" in lines[1]
    assert "no difference seen from torch" in lines[2] and "times the speed" not in lines[2]
    assert "not told apart from it: Q4_K in int8 mode" in lines[2]
    assert "Q4_K 2.00" in lines[3] and "no difference" not in lines[3]


def test_one_repeat_has_no_spread_and_supports_no_claim():
    lines = verdict([row("torch", "2", 0), row("ours exact", "4", 0)])
    assert "no difference seen" in lines[1] and "no difference seen" in lines[2]


def test_a_mode_that_failed_its_gate_is_named_with_the_reason():
    failed = row("ours int8", "", error="0.3", note="wrong result: relative error 0.3, at most 0.025")
    lines = verdict([row("torch", "2"), row("ours exact", "4"), row("ours int8", "1"), failed])
    assert len(lines) == 6 and "Q4_K in exact mode, 0.50 times" in lines[2]
    assert "Q4_K in int8 mode (1 call, wrong result: relative error 0.3" in lines[5]
    assert "wrong result" in " ".join(verdict([row("torch", ""), failed]))
