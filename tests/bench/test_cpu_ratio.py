"""The CPU comparison's turns, cells and table, on a small shape."""

from __future__ import annotations

import csv

import pytest

from bench import cpu_ratio


def test_a_small_run_writes_its_cells_and_a_table(tmp_path, monkeypatch, capsys):
    pytest.importorskip("diffusers")
    pytest.importorskip("gguf")
    path = tmp_path / "ratios.csv"
    small = "--formats Q6_K,Q8_0 --dtypes float32 --m 2 --n 64 --k 256 --threads 1 --least 3 --most 4"
    monkeypatch.setattr("sys.argv", ["cpu_ratio", *small.split(), "--write", str(path)])
    # At this size either may be faster.
    assert cpu_ratio.main() in (0, 1)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["format"], row["m"], row["n"], row["k"], row["threads"]) for row in rows] == [
        ("Q6_K", "2", "64", "256", "1"),
        ("Q8_0", "2", "64", "256", "1"),
    ]
    for row in rows:
        assert 3 <= int(row["turns"]) <= 4 and row["commit"] and row["torch"]
        assert float(row["ratio_low"]) <= float(row["ratio"]) <= float(row["ratio_high"])
    assert "| Q6_K | " in capsys.readouterr().out


def test_a_steady_cell_ends_early_and_a_noisy_one_goes_on(monkeypatch):
    """Three functions take fixed times on a made-up clock; in the second case one swings by two."""
    now, turn = [0.0], [0]

    def take(seconds):
        def function():
            now[0] += seconds(turn[0])

        return function

    monkeypatch.setattr(cpu_ratio.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(cpu_ratio.time, "process_time", lambda: now[0] / 2)

    def plain(turn_now):
        turn[0] += 1
        return 1.0

    steady = dict(diffusers=take(lambda _: 6.0), ours=take(lambda _: 2.0), plain=take(plain))
    wall, processor = cpu_ratio.measure(steady, 5, 9, 0.1)
    assert wall["diffusers"] == [6000.0] * 5 and processor["ours"] == [1000.0] * 5
    noisy = dict(diffusers=take(lambda n: 6.0 if n % 4 < 2 else 3.0), ours=take(lambda _: 2.0), plain=take(plain))
    assert len(cpu_ratio.measure(noisy, 5, 9, 0.1)[0]["ours"]) == 9


def test_the_table_has_a_row_a_type_and_a_column_a_call():
    rows = [
        dict(format=name, dtype="float32", m=m, ratio=value, plain_share=2.0)
        for name, m, value in (("Q4_0", 1, 3.0), ("Q4_0", 64, 2.5), ("Q8_0", 1, 1.25), ("Q8_0", 64, 4.0))
    ]
    assert cpu_ratio.table(rows, "ratio", "plain_share").splitlines() == [
        "| ratio | float32 M=1 | float32 M=64 |",
        "|---|---|---|",
        "| Q4_0 | 3.0 [2.0] | 2.5 [2.0] |",
        "| Q8_0 | 1.2 [2.0] | 4.0 [2.0] |",
    ]


def test_a_wrong_result_is_no_speed(monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(cpu_ratio, "relative_errors", lambda *_: (0.5, 1.0))
    with pytest.raises(RuntimeError, match="wrong on Q8_0: relative error 0.5, at most 0.01"):
        cpu_ratio._sides("Q8_0", cpu_ratio.Call(2, 64, 256, 1, ""), cpu_ratio.torch.float32)
