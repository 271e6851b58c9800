"""The GPU session: it needs torch and triton alone, goes on where it stopped, and its tables tell the truth."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from bench import gpu_session
from bench.gpu_session import ROOT
from bench.roofline import roofline, table
from flux_kernels.benchmark import peers  # noqa: F401 - registers the other libraries
from flux_kernels.benchmark.ceilings import Ceilings
from flux_kernels.benchmark.providers import PROVIDERS
from flux_kernels.benchmark.record import read_csv

BLOCK = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked by a test)", name=name)

sys.meta_path.insert(0, Absent())
"""
BLOCKED = ("typer", "rich", "numpy", "matplotlib", "diffusers", "transformers", "gguf", "scipy", "torchmetrics", "pytest")
MEASURED = dict(format="Q4_K", m="4608", n="3072", k="3072", calls="1", where="a test", p50_ms="2.0")


def test_every_part_runs_without_anything_but_torch_and_triton(tmp_path):
    """The dry run in a Python where the other packages cannot be imported: its parts write rows, and none fails."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK.format(blocked=BLOCKED))
    out = tmp_path / "out"
    environment = os.environ | dict(PYTHONPATH=str(tmp_path), OMP_NUM_THREADS="1")
    environment.pop("TRITON_INTERPRET", None)  # its interpreter needs numpy; a GPU does not use it
    names = "correctness,tuning,linears,roofline,calibration,whole_step"
    command = [sys.executable, "-m", "bench.gpu_session", "--dry-run", "--scale", "512", "--out", str(out), "--parts", names]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": done (") == 6
    checked = read_csv(out / "correctness.csv")
    assert len({row["format"] for row in checked}) == 25 and all(row["p50_ms"] for row in checked)
    diffusers = next(row for row in read_csv(out / "linear.csv") if row["provider"] == "diffusers")
    assert "not installed" in diffusers["note"]
    assert read_csv(out / "calibration.csv")
    steps = {(row["provider"], row["what"]): row for row in read_csv(out / "whole_step.csv")}
    assert all(steps[name, "embedded step"]["p50_ms"] for name in ("torch", "dequantize", *gpu_session.OURS.split(",")))
    assert "not installed" in steps["diffusers", "embedded step"]["note"]
    assert "not installed: diffusers, transformers, gguf. Run" in steps["ours exact", "denoising"]["note"]
    assert "Q4_K" in (out / "roofline.log").read_text()


def test_a_session_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    """A part that was done is not run again; one that failed says so and is; one that runs out of time leaves no log."""
    say = [sys.executable, "-c", "print('hello')"]
    parts = [("first", say), ("bad", [sys.executable, "-c", "raise SystemExit(3)"]), ("last", say)]
    monkeypatch.setattr(gpu_session, "parts", lambda _: parts)
    assert gpu_session.main(["--out", str(tmp_path)]) == 1
    assert "exit code 3" in capsys.readouterr().out
    assert (tmp_path / "first.log").read_text() == "hello\n"
    gpu_session.main(["--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert shown.count("done before") == 2 and "exit code 3" in shown
    assert gpu_session.run_part("slow", [sys.executable, "-c", "import time; time.sleep(9)"], tmp_path, 0.3) == "out of time"
    assert not (tmp_path / "slow.log").exists()


def test_what_a_part_started_ends_with_it(tmp_path):
    """A part out of time leaves no process of its own behind: the file that its child would write never comes."""
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert gpu_session.run_part("slow", [sys.executable, "-c", parent], tmp_path, 1.0) == "out of time"
    time.sleep(2.5)
    assert not (tmp_path / "late").exists()


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


def test_the_session_measures_every_peer():
    assert {one.name for one in PROVIDERS.values() if one.group == "peer"} == set(gpu_session.PEERS.split(",")) - {
        "diffusers compiled"
    }


def test_the_roof_is_the_nearer_ceiling():
    """100 GFLOP and 1 GB in 2 s, where the device does 100 GFLOP/s and 1 GB/s, are half of the operations' roof and of the copy's."""
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
