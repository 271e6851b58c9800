"""Compare the working tree's speed with a git ref's: same calls and weights, runs in turn, checked.

    python -m bench.verify --ref HEAD~3 --formats Q4_K,Q8_0                 # on a GPU
    python -m bench.verify --ref main --scale 32 --rounds 9                  # a small version for a CPU

Both sides run in processes of their own, the ref's from a temporary worktree. No speed is reported where a result is wrong on
either side, and the exit status is 1 then. Above 1 the working tree is faster; the interval holds the median ratio of
rounds in 99 of 100 resamplings.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch

from bench.record import ROOT, append_csv, origin
from flux_kernels.benchmark.providers import GATE_EXACT, GATE_INT8
from flux_kernels.benchmark.shapes import reduced
from flux_kernels.formats import get_format
from flux_kernels.machine.random_rows import random_weight
from flux_kernels.models.calls import STEPS, Call, step_calls
from flux_kernels.torch_backend import reference

_CHECKED = 32  # rows of the output that are compared with float64
_RESAMPLINGS = 2000


@contextlib.contextmanager
def worktree(ref: str, root: Path = ROOT) -> Iterator[Path]:
    """Check a ref out in a temporary folder, which is removed in any case.

    Raises:
        SystemExit: where git does not know the ref.
    """
    with tempfile.TemporaryDirectory(prefix="flux_kernels_verify_") as folder:
        # Git calls the worktree by its last name, which two runs at once must not share.
        path = Path(folder) / Path(folder).name
        try:
            added = _git(root, "add", "--quiet", "--detach", str(path), ref)
            if added.returncode:
                raise SystemExit(f"git has no tree for {ref!r}: {added.stderr.strip()}")
            yield path
        finally:
            # Forced twice: one that was stopped while it was made is locked. Where even that fails, forget it without its folder.
            if path.exists() and _git(root, "remove", "--force", "--force", str(path)).returncode:
                _git(root, "unlock", str(path))
                shutil.rmtree(path)
                _git(root, "prune")


def _git(root: Path, *words: str) -> subprocess.CompletedProcess:
    """Run git to its end, whatever signal comes: killed, its children would go on writing the worktree."""
    with _signals_later():
        return subprocess.run(["git", "-C", str(root), "worktree", *words], capture_output=True, text=True, check=False)


@contextlib.contextmanager
def _signals_later() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the end."""
    came: list[int] = []
    note = lambda number, _: came.append(number)
    handlers = {caught: signal.signal(caught, note) for caught in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for caught, handler in handlers.items():
            signal.signal(caught, handler)
        for number in came[:1]:
            signal.raise_signal(number)


@contextlib.contextmanager
def side(tree: Path) -> Iterator[subprocess.Popen]:
    """Start the process that measures with the code of one tree, and end it in any case."""
    environment = os.environ | dict(PYTHONPATH=str(tree), PYTHONSAFEPATH="1")
    command = [sys.executable, str(Path(__file__).with_name("verify_side.py"))]
    process = subprocess.Popen(
        command, cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ask(process: subprocess.Popen, **order) -> dict:
    """Send one order and return its answer; a process that ended answers with a failure."""
    try:
        process.stdin.write(json.dumps(order) + "\n")
        answer = process.stdout.readline()
    except BrokenPipeError:
        answer = ""
    return json.loads(answer) if answer else dict(failure="the process ended, see its messages above")


def compare(
    sides: dict[str, subprocess.Popen], name: str, call: Call, compute: str, device: str, dtype: torch.dtype, rounds: int
) -> dict:
    """Compare one call on both sides: errors, median times, their ratio and interval, or why not."""
    row = dict(format=name, compute=compute) | asdict(call)
    row |= dict.fromkeys(("ref_error", "error", "ref_ms", "ms", "ratio", "low", "high", "note"), "")
    with tempfile.TemporaryDirectory(prefix="flux_kernels_verify_") as folder:
        path, rows, oracle = _write_problem(Path(folder), name, call, dtype)
        order = dict(problem=str(path), format=name, compute=compute, device=device, rows=rows)
        answers, outputs = {}, {}
        for which, process in sides.items():
            answers[which] = ask(process, do="prepare", out=f"{folder}/{which}", **order)
            if "failure" not in answers[which]:
                outputs[which] = torch.load(f"{folder}/{which}", weights_only=True).double()
    gate, notes = GATE_INT8 if compute == "int8" else GATE_EXACT, []
    for which, answer in answers.items():
        if "failure" in answer:
            notes.append(f"{which}: {answer['failure']}")
            continue
        error = ((outputs[which] - oracle).norm() / oracle.norm()).item()
        row["ref_error" if which == "ref" else "error"] = f"{error:.3g}"
        if not error <= gate:
            notes.append(f"{which}: wrong result, relative error {error:.2g}, at most {gate}")
    if notes:
        return row | dict(note="; ".join(notes))
    times: dict[str, list[float]] = {which: [] for which in sides}
    for _ in range(rounds):
        for which, process in sides.items():
            answer = ask(process, do="time", runs=3)
            if "failure" in answer:
                return row | dict(note=f"{which}: {answer['failure']}")
            times[which].append(median(answer["times"]))
    low, middle, high = interval([a / b for a, b in zip(times["ref"], times["tree"], strict=True)])
    ms = dict(ref_ms=f"{median(times['ref']):.4f}", ms=f"{median(times['tree']):.4f}")
    return row | ms | dict(ratio=f"{middle:.3f}", low=f"{low:.3f}", high=f"{high:.3f}")


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Return the median of some ratios and its 99 % bootstrap interval around it: (low, median, high)."""
    draw = random.Random(0)
    medians = sorted(median(draw.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLINGS))
    return medians[round(0.005 * _RESAMPLINGS)], median(ratios), medians[round(0.995 * _RESAMPLINGS) - 1]


def _write_problem(folder: Path, name: str, call: Call, dtype: torch.dtype) -> tuple[Path, list[int], torch.Tensor]:
    """Write weight, activation and bias for both sides; return some output rows and float64 values."""
    generator, fmt = torch.Generator().manual_seed(call.n + call.k), get_format(name)
    weight = random_weight(fmt, call.n, call.k, planes=False, seed=call.n + call.k)
    x, bias = torch.randn(call.m, call.k, generator=generator).to(dtype), torch.randn(call.n, generator=generator).to(dtype)
    rows = torch.linspace(0, call.m - 1, min(_CHECKED, call.m)).long()
    oracle = x[rows].double() @ reference.dequantize(weight).double().T + bias.double()
    path = folder / "problem.pt"
    torch.save(dict(data=weight.data, x=x, bias=bias), path)
    return path, rows.tolist(), oracle


def verdict(row: dict) -> str:
    """Say one row in words."""
    call = f"{row['format']:8} {row['compute']:16} {row['m']:6} {row['n']:6} {row['k']:6}"
    if row["note"]:
        return f"{call} no speed: {row['note']}"
    word = "faster" if float(row["low"]) > 1 else "slower" if float(row["high"]) < 1 else "no difference seen"
    return f"{call} {row['ref_ms']:>10} -> {row['ms']:>10} ms  {row['ratio']} x [{row['low']}, {row['high']}] {word}"


def main(arguments: list[str] | None = None) -> int:
    """Compare, print a line for each call, and return 1 where any result was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ref", default="HEAD", help="commit, branch or tag that the working tree is compared with")
    parser.add_argument("--formats", default="Q4_K,Q8_0")
    parser.add_argument("--compute", default="exact,int8")
    parser.add_argument("--step", default="1024x1024", choices=STEPS)
    parser.add_argument("--calls", type=int, default=11, help="only the first calls of the list, which matter most")
    parser.add_argument("--rounds", type=int, default=15, help="each of three runs a side; the median of the three counts")
    parser.add_argument("--scale", type=int, default=1, help="divide M and N by this, for slow machines")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="default: bfloat16, on a CPU float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", type=Path, help="CSV to append rows to")
    options = parser.parse_args(arguments)
    dtype = getattr(torch, options.dtype or ("float32" if options.device == "cpu" else "bfloat16"))
    made_at, red = origin(torch.device(options.device)) | dict(ref=options.ref), False
    calls = [reduced(call, options.scale) for call in step_calls(**STEPS[options.step])[: options.calls]]
    with worktree(options.ref) as old, side(old) as before, side(ROOT) as now:
        for name in options.formats.split(","):
            for compute in options.compute.split(","):
                for call in dict.fromkeys(calls):
                    row = compare(dict(ref=before, tree=now), name, call, compute, options.device, dtype, options.rounds)
                    red |= bool(row["note"])
                    print(verdict(row), flush=True)
                    if options.write:
                        append_csv(row | made_at, options.write)
    return int(red)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the worktree goes on a kill too
    sys.exit(main())
