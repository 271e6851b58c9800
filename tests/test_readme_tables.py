"""The README's tables of GPUs: what the rows say and nothing else.

From folders made here and from those recorded.
"""

from __future__ import annotations

import pytest

from bench.record import write_csv
from flux_kernels.formats import FORMATS
from flux_kernels.models.calls import STEPS, step_calls
from tools import gpu_tables
from tools.gpu_tables import gpu_section

SIZE = "1024x1024"
ORIGIN = dict(
    device="Card X", capability="8.9", driver="1.2", torch="2.12", triton="3.7", libggml="", commit="abc", date="2027-01-01"
)
CALLS = step_calls(**STEPS[SIZE])
WEIGHTS = sum(call.calls * call.n * call.k for call in CALLS)


def linear(provider: str, milliseconds: float, **more: str) -> list[dict]:
    """Make a row for each call of a step; all take the same time."""
    made = []
    for call in CALLS:
        shape = dict(m=call.m, n=call.n, k=call.k, calls=call.calls, where=call.where)
        times = dict(repeats=5, p20_ms=0.99 * milliseconds, p50_ms=milliseconds, p80_ms=1.01 * milliseconds)
        made.append(dict(format="Q4_K", size=SIZE, provider=provider, **shape, **times, error="0.002", note="") | more | ORIGIN)
    return made


def step(provider: str, milliseconds: float | str, peak: float | str = "", **more: str) -> dict:
    """Make the row of a whole step as a graph."""
    row = dict(format="Q4_K", provider=provider, size=SIZE, what="graph", p50_ms=milliseconds)
    return row | dict(error="0.01", gate="0.02", peak_gb=peak, note="") | more | ORIGIN


def cells(text: str, kind: str, name: str = "Q4_K") -> dict[str, str]:
    """Return column -> text of one line of the table."""
    split = lambda line: [cell.strip() for cell in line.strip("|").split("|")]
    lines = [split(line) for line in text.splitlines() if line.startswith("|")]
    (line,) = [line for line in lines if line[:2] == [name, kind]]
    return dict(zip(lines[0][2:], line[2:], strict=True))


@pytest.fixture
def write(tmp_path):
    """Return what writes a card's folder and gives back the section."""

    def written(**files: list[dict]) -> str:
        for name, rows in files.items():
            write_csv(rows, tmp_path / "card-x" / f"{name}.csv")
        return gpu_section(tmp_path)

    return written


def test_times_speeds_memory_and_origin_come_from_the_rows(write):
    packed, plain = WEIGHTS * FORMATS["Q4_K"].bits_per_weight / 8e9, WEIGHTS * 2 / 1e9
    steps = [step("torch", 200, packed + plain + 1), step("ours exact", 160, packed + 1), step("dequantize", 320)]
    text = write(linear=linear("torch", 2) + linear("ours exact", 4), step=steps)
    count = sum(call.calls for call in CALLS)
    assert cells(text, "linear calls") == {
        "torch, 16 bit": f"{2 * count:.1f} ms",
        "exact": f"{4 * count:.1f} ms, 0.50",
        "decode in torch, then multiply": "not measured",
    }
    assert list(cells(text, "whole step").values()) == ["200.0 ms", "160.0 ms, 1.25", "320.0 ms, 0.62"]
    assert list(cells(text, "peak").values()) == [f"{plain + 1:.1f} GB", f"{packed + 1:.1f} GB", "not measured"]
    assert "with decoding in torch at every call as 1: Q4_K 2.00." in text
    assert "Card X, driver 1.2, torch 2.12, triton 3.7, commit abc, 2027-01-01" in text and "Arithmetic" not in text


def test_a_torch_that_was_alone_in_memory_keeps_its_peak(write):
    text = write(step=[step("torch", 200, WEIGHTS * 2 / 1e9 + 1)])
    assert cells(text, "peak") == {"torch, 16 bit": f"{WEIGHTS * 2 / 1e9 + 1:.1f} GB"}


def test_one_missing_call_leaves_the_sum_out(write):
    """Of one side: that side has none. Of every side: a session that was cut short, and no side has one."""
    text = write(linear=linear("torch", 2) + linear("ours exact", 4)[1:])
    assert list(cells(text, "linear calls").values()) == [f"{2 * sum(call.calls for call in CALLS):.1f} ms", "not measured"]
    text = write(linear=linear("torch", 2)[1:] + linear("ours exact", 4)[1:])
    assert set(cells(text, "linear calls").values()) == {"not measured"}
    assert set(cells(text, "whole step").values()) | set(cells(text, "peak").values()) == {"not measured"}


@pytest.mark.parametrize("more", [dict(note="wrong result: relative error 0.3"), dict(note="wrong result"), dict(gate="0.001")])
def test_a_wrong_result_has_no_speed(write, more):
    """Even where a row has a time; `gate` says by itself that a step was wrong."""
    wrong = linear("ours exact", 4)
    wrong[3]["note"] = more.get("note", "wrong result")
    steps = [step("torch", 200), step("ours exact", 100, 7.0, **more), step("dequantize", 400)]
    text = write(linear=linear("torch", 2) + wrong, step=steps)
    for kind in ("linear calls", "whole step", "peak"):
        assert cells(text, kind)["exact"] == "wrong result"
    assert "with decoding in torch at every call" not in text


def test_a_row_that_failed_is_not_measured(write):
    failed = linear("ours exact", 4)
    failed[0] |= dict(p20_ms="", p50_ms="", p80_ms="", note="failed: out of memory")
    text = write(linear=linear("torch", 2) + failed, step=[step("ours exact", "", note="OutOfMemoryError: 24 GB")])
    assert [cells(text, kind)["exact"] for kind in ("linear calls", "whole step", "peak")] == ["not measured"] * 3


def test_speeds_inside_the_noise_are_marked(write):
    text = write(linear=linear("torch", 2) + linear("ours exact", 2.01))
    assert cells(text, "linear calls")["exact"].endswith("ms, ~1.00") and "~ no difference seen" in text


def test_rows_of_whole_step_serve_too_and_a_cpu_is_no_card(write):
    """`flux-kernels bench --contribute` names columns otherwise: bytes, and no gate."""
    row = step("ours exact", 150) | dict(what="step", peak_bytes=8_000_000_000)
    del row["gate"], row["peak_gb"]
    text = write(step=[row])
    assert (cells(text, "whole step")["exact"], cells(text, "peak")["exact"]) == ("150.0 ms", "8.0 GB")
    assert "CUDA graph" not in text
    assert write(step=[row | dict(capability="")]) == ""


def test_two_commits_are_both_named(write):
    text = write(linear=linear("torch", 2), step=[step("torch", 200) | dict(commit="def")])
    assert "commit abc, 2027-01-01; Card X, driver 1.2, torch 2.12, triton 3.7, commit def" in text


def swept(milliseconds: dict[str, float], skip: int = 0) -> list[dict]:
    """Make the rows of sweep.csv for the calls of 512 rows, but the first `skip`."""
    shapes = [dict(format="Q4_K", m=call.m, n=call.n, k=call.k) for call in CALLS if call.m == 512][skip:]
    return [shape | dict(algorithm=name, p50_ms=ms, note="") | ORIGIN for shape in shapes for name, ms in milliseconds.items()]


def test_a_default_that_changed_is_added_up_only_where_every_call_was_timed_both_ways(write, monkeypatch):
    change = gpu_tables.Changed("8.9", range(17, 513), "fused", "two_stage", "as we know now")
    monkeypatch.setattr(gpu_tables, "CHANGED", {"abc": change})
    rows, both = linear("torch", 2) + linear("ours exact", 4), {"fused": 3.5, "two_stage": 1.5}
    left = sum(call.calls * (2 if call.m == 512 else 4) for call in CALLS)
    speed = 2 * sum(call.calls for call in CALLS) / left
    text = write(linear=rows, sweep=swept(both))
    assert "Arithmetic, not a measurement" in text and "as we know now" in text
    assert f"Q4_K {left:.1f} ms, {speed:.2f}." in text
    assert "Arithmetic" not in write(linear=rows, sweep=swept(both, skip=1))
    assert "Arithmetic" not in write(linear=rows, sweep=swept(dict(fused=3.5)))
    assert "Arithmetic" not in write(linear=[row | dict(commit="later") for row in rows], sweep=swept(both))
    assert "Arithmetic" not in write(linear=[row | dict(capability="9.0") for row in rows], sweep=swept(both))


def test_int8_is_taken_apart_at_the_widest_weight(write):
    times = {
        ("product", "rows"): 5,
        ("product", "groups"): 4,
        ("product", "none"): 2,
        ("bf16 torch", ""): 3,
        ("shipped", ""): 1,
    }
    shapes = [dict(format="Q4_K", m=4608, n=n, k=3072) for n in (9216, 12288)]
    rows = [
        shape | dict(what=what, scales=scales, p50_ms=ms + (shape["n"] == 9216) * 10, note="") | ORIGIN
        for shape in shapes
        for (what, scales), ms in times.items()
    ]
    assert (
        "4608 x 12288 x 3072 (Q4_K), with the best tile each: 4.00 ms, without its scales 2.00 ms; torch's in bfloat16 3.00 ms."
        in write(linear=linear("torch", 2), int8=rows)
    )
    assert "int8's product" not in write(int8=[row for row in rows if row["scales"] != "none"])
