"""The verdict of `bench`: ratios of the rows, and no claim without one."""

from __future__ import annotations

from flux_kernels.benchmark.verdict import verdict


def row(provider, milliseconds, **more):
    base = dict(format="Q4_K", provider=provider, p50_ms=milliseconds, calls=2, error="0.001", device="a card", capability="")
    return base | more


def test_ratios_come_from_the_rows_and_a_cpu_is_called_one():
    lines = verdict([row("torch", "2"), row("ours exact", "4"), row("ours int8", "1"), row("diffusers", "6")])
    assert len(lines) == 5 and lines[0].startswith("This is a CPU")
    assert "Q4_K 2.00" in lines[1] and "int8 mode, 2.00 times" in lines[2] and "Q4_K 1.50" in lines[3]


def test_nothing_is_said_about_what_was_not_measured():
    lines = verdict([row("torch", "2"), row("ours exact", "", error="")])
    assert "not measured" in lines[1] and "not measured" in lines[3] and "not measured" in lines[4]
    assert verdict([row("torch", "")]) == ["Nothing was measured, so nothing can be said."]
