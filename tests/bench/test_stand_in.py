"""Test the stand-in driver and launch costs on it, in processes whose kernels are compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flux_kernels.benchmark.record import read_csv

pytest.importorskip("triton.backends.nvidia", reason="Triton's NVIDIA backend compiles the kernels")

ROOT = Path(__file__).resolve().parents[2]
CASES = ["nn.Linear", "small m", "fused", "two-stage", "int8", "fp16_accumulate"]


def run(*command: str) -> str:
    """Run a Python module where kernels are compiled; return what it printed."""
    environment = os.environ | dict(TRITON_INTERPRET="0", OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_the_library_runs_on_the_stand_in_as_on_a_card():
    """Launches are counted; memory, grids and captures are refused as by a driver (stand_in_cases.py)."""
    assert "13 passed" in run("pytest", "--noconftest", "-q", "-p", "no:cacheprovider", "tests/bench/stand_in_cases.py")


def test_launch_costs_are_written_beside_nn_linear(tmp_path):
    """A small run writes a row for each mode with its kernels; nn.Linear is 0 above itself."""
    path = tmp_path / "costs.csv"
    run(
        "bench.launch_cost",
        *("--card", "RTX 4090", "--format", "Q8_0", "--rounds", "3", "--repeats", "3", "--write", str(path)),
    )
    rows = {row["case"]: row for row in read_csv(path)}
    assert list(rows) == CASES and all(row["date"] and float(row["us"]) > 0 for row in rows.values())
    assert float(rows["nn.Linear"]["us_above_linear"]) == 0
    assert all("kernel" in row["kernels"] for name, row in rows.items() if name != "nn.Linear")
