"""Test `bench.verify`: the worktree goes, a wrong side has no speed, the interval holds the ratio."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time

import pytest
import torch

from bench import verify
from bench.verify import ROOT, compare, interval, main, side, worktree
from flux_kernels.models.calls import Call

GIT = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the checkout's history")
SMALL = Call(16, 32, 256, 1, "a test")


@pytest.fixture
def trees(tmp_path, monkeypatch):
    """List this test's worktrees, those under its own temporary folder: other tests make some as well."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def list_() -> list[str]:
        command = ["git", "-C", str(ROOT), "worktree", "list"]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        return [line for line in lines if str(tmp_path) in line]

    return list_


@GIT
def test_head_against_the_working_tree_gives_ratios_and_leaves_nothing(capsys, tmp_path, trees):
    out = tmp_path / "rows.csv"
    options = ["--scale", "512", "--calls", "1", "--formats", "Q8_0", "--compute", "exact", "--rounds", "3"]
    assert main([*options, "--write", str(out)]) == 0
    assert " x [" in capsys.readouterr().out
    assert ",ratio,low,high,note," in out.read_text().splitlines()[0]
    assert not trees()


@GIT
def test_the_worktree_goes_on_errors_and_a_wrong_ref_is_said(trees):
    with pytest.raises(ZeroDivisionError), worktree("HEAD") as path:
        assert (path / "flux_kernels" / "__init__.py").exists() and trees()
        1 / 0  # noqa: B018
    assert not path.exists() and not trees()
    with pytest.raises(SystemExit, match="no tree for 'no-such-ref'"), worktree("no-such-ref"):
        pass


@GIT
def test_the_worktree_goes_when_the_command_is_terminated(tmp_path, trees):
    command = [sys.executable, "-m", "bench.verify", "--scale", "64", "--rounds", "9999"]
    with open(tmp_path / "messages", "w+") as messages:
        process = subprocess.Popen(command, cwd=ROOT, stdout=messages, stderr=messages)
        until = time.monotonic() + 60
        while not trees() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        assert trees(), (tmp_path / "messages").read_text()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143, (tmp_path / "messages").read_text()
    assert not trees()


@GIT
def test_git_ends_what_it_began_before_a_signal_counts(monkeypatch, trees):
    """Killed while it writes a worktree, git left children that wrote on while the folder was removed."""
    run, ended = subprocess.run, []

    def signalled(command, **options):
        if "add" in command:
            signal.raise_signal(signal.SIGTERM)
        ended.append(run(command, **options))
        return ended[-1]

    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        monkeypatch.setattr(verify.subprocess, "run", signalled)
        with pytest.raises(SystemExit, match="143"), worktree("HEAD"):
            pytest.fail("went on")
        assert [one.args[4] for one in ended[:2]] == ["add", "remove"] and not any(one.returncode for one in ended[:2])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not trees()


@pytest.mark.parametrize("wrong", ["ref", "tree"])
def test_no_speed_where_either_side_is_wrong(tmp_path, wrong):
    """The wrong side is a flux_kernels whose linear returns zeros."""
    package = tmp_path / "flux_kernels"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "ops.py").write_text(
        "import torch\n\ndef linear(x, data, *_, **__):\n    return torch.zeros(x.shape[0], data.shape[0])\n"
    )
    (package / "formats.py").write_text("class F:\n    planes = False\n\nFORMATS = dict(Q8_0=F)\n")
    with side(tmp_path) as bad, side(ROOT) as good:
        sides = dict(ref=bad, tree=good) if wrong == "ref" else dict(ref=good, tree=bad)
        row = compare(sides, "Q8_0", SMALL, "exact", "cpu", torch.float32, 2)
    assert row["note"].startswith(f"{wrong}: wrong result") and row["ratio"] == row["ms"] == ""
    assert "no speed" in verify.verdict(row)


def test_a_side_that_cannot_run_says_why(tmp_path):
    (tmp_path / "flux_kernels").mkdir()
    (tmp_path / "flux_kernels" / "__init__.py").write_text("raise ImportError('too old')")
    with side(tmp_path) as bad, side(ROOT) as good:
        row = compare(dict(ref=bad, tree=good), "Q8_0", SMALL, "exact", "cpu", torch.float32, 2)
        bad.kill()
        bad.wait()
        assert "the process ended" in verify.ask(bad, do="time", runs=1)["failure"]
    assert "too old" in row["note"] and row["ratio"] == ""


def test_the_interval_is_around_the_median_and_narrow_for_steady_ratios():
    low, middle, high = interval([1.1, 0.9, 1.0, 1.05, 0.95])
    assert low <= middle == 1.0 <= high and low < high
    assert interval([2.0] * 5) == (2.0, 2.0, 2.0)
