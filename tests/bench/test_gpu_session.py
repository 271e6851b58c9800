"""Test the GPU session: it runs on a bare machine, goes on where it stopped, prints what is true."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from flux_kernels.benchmark.record import read_csv

pytest.importorskip("triton.backends.nvidia", reason="Triton's NVIDIA backend compiles the kernels")

import triton

from bench.gpu_session import __main__ as command
from bench.gpu_session import cache, summary
from bench.gpu_session.__main__ import State, archive, run_section
from bench.gpu_session.key import short, triton_key_of
from bench.gpu_session.predict import modelled_ms, product_ms, rates_of, two_stage_ms
from bench.gpu_session.sections import SECTIONS, Section

ROOT = Path(__file__).resolve().parents[2]
BLOCK = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked by a test)", name=name)

sys.meta_path.insert(0, Absent())
"""
BLOCKED = (
    "typer",
    "rich",
    "matplotlib",
    "diffusers",
    "transformers",
    "gguf",
    "scipy",
    "torchmetrics",
    "safetensors",
    "libggml",
)
NAMES = [section.name for section in SECTIONS]
TAKE_OVER = """
import sys
from pathlib import Path
from bench.gpu_session import cache
print(cache.take_over(*map(Path, sys.argv[1:]), 60, 1))
"""
THREADS = """
import os
import torch
torch.set_num_threads(4)
before = len(os.listdir("/proc/self/task"))
import bench.gpu_session.__main__
print(len(os.listdir("/proc/self/task")) - before)
"""
HANGS = """
import sys
from pathlib import Path
import torch
from bench.gpu_session.__main__ import run_section
from bench.gpu_session.sections import Section

def compute(session=None):
    return torch.ones(1 << 22).add(1)  # on all threads

torch.set_num_threads(4)
compute()
print(run_section(Section("computes", 20, compute, ""), Path(sys.argv[1]), 20.0))
"""


def environment(**more: str) -> dict[str, str]:
    return os.environ | dict(TRITON_INTERPRET="0", OMP_NUM_THREADS="1") | more


def python(*arguments: str, **more: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment(**more), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> tuple[Path, str]:
    """Return folder and output of a short dry run with torch, triton, numpy and pytest alone."""
    folder = tmp_path_factory.mktemp("session")
    (folder / "sitecustomize.py").write_text(BLOCK.format(blocked=BLOCKED))
    out = folder / "rows"
    text = python("-m", "bench.gpu_session", "--dry-run", "--reduced", "--out", str(out), PYTHONPATH=str(folder))
    return out, text


def test_every_section_runs_on_a_bare_machine(rehearsed):
    """No section fails for a file, an import or an option; each tells its expected seconds and kernels."""
    out, text = rehearsed
    assert [line for line in text.splitlines() if line.endswith(": done")] == [f"{one.name}: done" for one in SECTIONS]
    for name in (
        "ceilings",
        "two_stage",
        "int8",
        "sweep",
        "small_m",
        "geforce",
        "tuning",
        "step",
        "host",
        "linear",
        "linear_others",
    ):
        rows = read_csv(out / f"{name}.csv")
        assert rows and all(row["device"] == "NVIDIA H100 80GB HBM3" and row["commit"] and row["date"] for row in rows), name
        assert all(row["p50_ms"] for row in rows), [row["note"] for row in rows if not row["p50_ms"]]
        assert name.startswith("linear") or any(row["predicted_ms"] for row in rows)
    lines = [line.split() for line in text.splitlines() if len(line.split()) > 3 and not line.startswith(("in all", "section"))]
    expected = {name: (int(kernels), float(gpu), float(limit)) for name, kernels, _, gpu, _, _, limit, *_ in lines}
    assert len(expected) == len(SECTIONS) and sum(kernels for kernels, _, _ in expected.values()) > 100
    # Those of one type.
    assert expected["correctness"][0] <= 45
    # The host's seconds depend on what else runs here.
    assert all(0 <= gpu < limit for _, gpu, limit in expected.values())


def test_the_summary_fits_the_last_lines(rehearsed, tmp_path):
    out, _ = rehearsed
    text = summary.write(out, tmp_path / "summary.txt", dict(ceilings="done"))
    assert len(text) <= 12_000 and "## ceilings" in text and "## step" in text
    rows = [
        dict(name=str(i), p50_ms="1", measured_over_predicted=ratio, note="") for i, ratio in enumerate(("1.1", "0.2", "3.0"))
    ]
    shown = summary.table("some", [*rows, rows[0] | dict(p50_ms="", note="it broke")], 2).splitlines()
    # The largest misses.
    assert [line.split()[0] for line in shown[1:3]] == ["1", "2"]
    assert "3 timed, 1 not" in shown[0] and shown[-1] == "! it broke"


def test_kernels_are_compiled_ahead_and_found_again(rehearsed, tmp_path):
    """A kernel compiled ahead under another build's key and carried to another folder is a hit there.

    The Triton that compiles has its libdevice at a path that is not there any more when the archive is taken over.
    """
    script = """
import sys
from dataclasses import replace
from pathlib import Path
from triton.compiler import make_backend
from bench.gpu_session import cache
from bench.gpu_session.kernels import Kernel, compile_all, load
rows, folder, archive = map(Path, sys.argv[1:])
found = next(k for k in load(rows / "kernels" / "two_stage.pickle") if k.fn.fn.__name__ == "dequantize_kernel")
launched = vars(make_backend(found.target).parse_options(found.options | dict(extern_libs=None)))  # as the library's launches give them
assert dict(launched["extern_libs"])["libdevice"] == sys.argv[2] + "/libdevice.bc"
kernels = [Kernel.of(found.source, found.target, launched)]
assert kernels[0].folder == replace(kernels[0], options=launched).folder  # what a launch looks for
with cache.keyed("a key", folder / "triton"):
    assert not kernels[0].cached(folder / "triton")
    assert compile_all(kernels, 1) == (1, [])
    cache.pack(kernels, folder, dict(key="a key", commit="abc", triton="3"), archive)
"""
    archive_path, there, build = tmp_path / "cache.tar.xz", tmp_path / "elsewhere", tmp_path / "build"
    build.mkdir()
    own = Path(triton.__file__).parent / "backends" / "nvidia" / "lib" / "libdevice.10.bc"
    shutil.copy(own, build / "libdevice.bc")
    python("-c", script, str(rehearsed[0]), str(build), str(archive_path), TRITON_LIBDEVICE_PATH=str(build / "libdevice.bc"))
    shutil.rmtree(build)
    with tarfile.open(archive_path) as tar:
        assert any(name.endswith(".cubin") for name in tar.getnames()) and not any(
            name.endswith(".ptx") for name in tar.getnames()
        )
        pickled = tar.extractfile("kernels.pickle")
        assert pickled is not None and b"libdevice" not in pickled.read()
    printed = python("-c", TAKE_OVER, str(archive_path), str(there))
    assert "1 of 1 kernels are there" in printed and "0 compiled here" in printed
    assert [line.split(":")[0] for line in printed.splitlines() if line.endswith(" s")] == [
        "unpacked",
        "looked for",
        "compiled",
    ]
    group = json.loads(next((there / "triton").glob("*/__grp__*.json")).read_text())
    assert all(Path(path).parent.parent == there / "triton" for path in group["child_paths"].values())
    metadata = json.loads(next((there / "triton").glob("*/dequantize_kernel.json")).read_text())
    assert metadata["extern_libs"] == [["libdevice", str(own)]]


def test_an_archive_that_is_of_no_use_does_not_end_the_session(tmp_path):
    """Whatever is wrong with it is printed, and kernels compile as they are launched."""
    (tmp_path / "cache.tar.xz").write_bytes(b"half an archive")
    printed = python("-c", TAKE_OVER, str(tmp_path / "cache.tar.xz"), str(tmp_path / "there"))
    assert "ReadError" in printed and printed.splitlines()[-2].startswith("the archive is not used any further")
    assert printed.splitlines()[-1] == "{}"


def test_processes_that_a_session_starts_use_the_archives_key(tmp_path):
    """Where the machine's own Triton has another key, sitecustomize gives it the archive's."""
    (tmp_path / "triton_key").write_text("another key")
    show = "from triton.runtime.cache import triton_key; print(triton_key())"
    path = str(Path(cache.__file__).with_name("on_start"))
    assert python("-c", show, PYTHONPATH=path, TRITON_KEY_FILE=str(tmp_path / "triton_key")).strip() == "another key"


def test_a_wheels_key_is_the_one_its_triton_computes():
    from triton.runtime.cache import triton_key

    folder = Path(triton.__file__).parents[1]
    assert triton_key_of(folder) == triton_key() and len(short(triton_key())) == 16


def test_a_session_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    """What was done is not run again, what was not reached precedes what failed, rows are kept."""
    ran = tmp_path / "ran"

    def note(name: str):
        def run(session):
            with ran.open("a") as file:
                file.write(f"{name} ")
            if name == "bad":
                raise ValueError("it broke")

        return run

    sections = (
        Section("good", 9, note("good"), ""),
        Section("bad", 9, note("bad"), ""),
        Section("last", 9, note("last"), ""),
    )
    monkeypatch.setattr(command, "SECTIONS", sections)
    monkeypatch.setattr(cache, "take_over", lambda *_, **__: {})
    arguments = ["--out", str(tmp_path / "rows"), "--results", str(tmp_path)]
    monkeypatch.setenv("FLUX_KERNELS_TUNING", str(tmp_path))
    # No GPU here.
    assert command.main(arguments) == 2 and not ran.exists() and not (tmp_path / "rows" / "state.json").exists()
    assert "No GPU is seen" in capsys.readouterr().out
    monkeypatch.setattr(command, "gpu_is_here", lambda: True)
    # Too little for anything.
    assert command.main([*arguments, "--minutes", "0.1"]) == 0
    assert "good: no time left" in capsys.readouterr().out
    assert command.main(arguments) == 1
    assert "bad: failed: ValueError: it broke" in capsys.readouterr().out
    assert ran.read_text() == "good bad last "
    assert command.main(arguments) == 1 and ran.read_text() == "good bad last bad "
    with tarfile.open(tmp_path / "results.tar.gz") as tar:
        assert {"good.log", "bad.log", "state.json"} <= set(tar.getnames())
    state = State(tmp_path / "s", dict(bad="failed: x", good="done"))
    assert [one.name for one in state.order(sections)] == ["last", "bad"]


def test_a_section_out_of_time_ends_with_what_it_started(tmp_path):
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    section = Section("slow", 9, lambda session: subprocess.run([sys.executable, "-c", child], check=False), "")
    assert run_section(section, tmp_path, 1.0) == "out of time, no rows"
    time.sleep(3)
    assert not (tmp_path / "late").exists()


def test_a_section_that_hangs_is_told_from_a_slow_one_and_says_where(tmp_path):
    """A section that wrote rows or outcomes of tests was slow; the log of either has its stack."""

    def hang(session):
        time.sleep(9)

    def slow(session):
        (session.out / "some.csv").write_text("a\n1\n")
        time.sleep(9)

    def tests(session):
        print("[gw3] PASSED tests/one.py", flush=True)
        time.sleep(9)

    outcomes = [run_section(Section(run.__name__, 9, run, ""), tmp_path, 1.5) for run in (hang, slow, tests, tests)]
    assert outcomes == ["out of time, no rows", *["out of time"] * 3]
    assert "in hang\n" in (tmp_path / "hang.log").read_text() and "in slow\n" in (tmp_path / "slow.log").read_text()
    sections = tuple(Section(name, 9, hang, "") for name in ("broke", "hung", "slow", "new"))
    state = State(tmp_path / "s", dict(broke="failed: x", hung=outcomes[0], slow=outcomes[1]))
    assert [one.name for one in state.order(sections)] == ["slow", "new", "hung", "broke"]


def test_a_section_computes_where_its_parent_computed_on_several_threads(tmp_path):
    """A fork has none of its parent's threads, and OpenMP would wait for them forever."""
    assert python("-c", HANGS, str(tmp_path), OMP_NUM_THREADS="4").strip() == "done"


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in Linux's /proc")
def test_importing_what_a_session_runs_starts_no_threads():
    """An operation of torch that runs in parallel at import leaves its team in every process."""
    assert python("-c", THREADS, OMP_NUM_THREADS="4").strip() == "0"


def test_nine_minutes_reach_everything():
    """Count by what sections took on an H200, else by their limits; all may take a third longer."""
    # 20: to start
    seconds = 20.0 + sum(section.took or section.seconds for section in SECTIONS[: NAMES.index("racecheck") + 1])
    assert seconds <= 9 * 60
    assert all(section.seconds >= 1.35 * section.took for section in SECTIONS if section.took)
    # Though each of those that decide most hung.
    assert sum(section.seconds for section in SECTIONS[: NAMES.index("peers")]) <= 8 * 60


def test_the_archive_leaves_out_what_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_ARCHIVE_BYTES", 1000)
    out = tmp_path / "rows"
    out.mkdir()
    (out / "rows.csv").write_text("a\n" * 100)
    (out / "large.trace.json.gz").write_bytes(b"0" * 5000)
    archive(out, tmp_path / "results.tar.gz")
    with tarfile.open(tmp_path / "results.tar.gz") as tar:
        assert tar.getnames() == ["rows.csv"]


def test_predictions_are_those_of_the_card():
    h100, h200 = rates_of("NVIDIA H100 80GB HBM3"), rates_of("NVIDIA H200")
    assert (h100.name, h200.name) == ("H100", "H200")
    assert product_ms(h100, 4608, 12288, 3072) == pytest.approx(2 * 4608 * 12288 * 3072 / 790e9, rel=0.1)
    whole, strided = (two_stage_ms(h100, "Q4_K", 4608, 3072, 3072, copied_bias=one) for one in (False, True))
    assert strided - whole == pytest.approx(4 * 4608 * 3072 / 2900e6, rel=0.2)
    assert modelled_ms(h200, "exact", "Q4_K", 4608, 3072, 3072) < modelled_ms(h100, "exact", "Q4_K", 4608, 3072, 3072)
