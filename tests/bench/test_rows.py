"""Runs of `bench.run` that go on row by row, and the roofline of their rows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bench.roofline import roofline, table
from flux_kernels.benchmark.ceilings import Ceilings
from flux_kernels.benchmark.record import read_csv

ROOT = Path(__file__).resolve().parents[2]
MEASURED = dict(format="Q4_K", m="4608", n="3072", k="3072", calls="1", where="a test", p50_ms="2.0")


def test_a_stopped_run_goes_on_row_by_row(tmp_path):
    path = tmp_path / "rows.csv"
    command = [
        sys.executable,
        "-m",
        "bench.run",
        "--device",
        "cpu",
        "--scale",
        "1024",
        "--repeats",
        "1",
        "--providers",
        "torch",
    ]
    command += ["--resume", "--formats", "Q8_0", "--dtype", "float32", "--write", str(path)]
    for calls, rows in (("1", 1), ("2", 2), ("2", 2)):
        subprocess.run([*command, "--calls", calls], cwd=ROOT, check=True, capture_output=True)
        assert len(read_csv(path)) == rows


def test_the_roof_is_the_nearer_ceiling():
    """100 GFLOP and 1 GB in 2 s are half of both roofs where a device does 100 GFLOP/s and 1 GB/s."""
    shares = Ceilings(1.0, 0.1, "float32").shares(2000.0, 100e9, 0.5e9)
    assert shares == dict(share_of_matmul=0.5, share_of_copy=0.25)
    row = MEASURED | dict(provider="ours exact", device="a", dtype="float32", commit="b", date="c")
    compute, memory, own = roofline(
        [
            row | shares,
            row | dict(share_of_matmul="0.1", share_of_copy="0.8"),
            row | dict(share_of_matmul="0.1", share_of_copy=""),
            row | dict(share_of_matmul="", share_of_copy=""),
            row | dict(p50_ms="", share_of_matmul="0.1", share_of_copy="0.1"),
        ]
    )
    assert (compute["bound"], compute["share"]) == ("compute", 0.5)
    assert (memory["bound"], memory["share"]) == ("memory", 0.8)
    assert own["bound"] == "?"
    assert "80.0%" in table([memory])
