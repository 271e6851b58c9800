"""`flux-kernels bench`: its rows, its summary, and what it refuses."""

from __future__ import annotations

from typer.testing import CliRunner

from flux_kernels.benchmark.record import read_csv
from flux_kernels.cli import app


def bench(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(
        app, ["bench", "--formats", "Q4_0", "--scale", "1024", *map(str, arguments)]
    )


def test_every_row_tells_where_it_comes_from(tmp_path):
    result = bench("--repeats", 1, "--contribute", tmp_path / "rows.csv", "--plot", tmp_path / "speed.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.csv", "speed.png"]
    assert "x torch" in result.output
    rows = read_csv(tmp_path / "rows.csv")
    assert all(row["device"] and row["torch"] and row["commit"] and row["date"] for row in rows)
    assert {"torch", "ours exact"} <= {row["provider"] for row in rows if row["p50_ms"]}


def test_types_cut_short_by_time_are_not_summed(tmp_path):
    result = bench("--minutes", 0)
    assert result.exit_code == 0, result.output
    assert "x torch" not in result.output and "11 of 11 shapes were not begun" in result.output


def test_a_file_that_is_there_is_not_overwritten(tmp_path):
    there = tmp_path / "rows.csv"
    there.write_text("mine")
    result = bench("--contribute", there)
    assert result.exit_code == 1 and there.read_text() == "mine"
