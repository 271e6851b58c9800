"""Use a short time on a GPU well: correctness, tuning, the kernels' times, peers, a whole step, in order of importance.

    python -m bench.gpu_session --out results --minutes 9
    python -m bench.gpu_session --out /tmp/dry --dry-run          # every part on the CPU with tiny shapes, in a minute or two

Needs the repository, torch and triton (numpy and pytest where the tests are to run); no network, no diffusers. Each part writes its
rows at once; a second call skips the parts that were done and goes on in the one that was stopped, row by row.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OURS = "ours exact,ours fp16_accumulate,ours int8"
PEERS = (
    "bitsandbytes nf4,bitsandbytes int8,bitsandbytes int8 no outliers,sdnq int8,gemlite int8 weight-only,gemlite int8 dynamic,quanto int8,vllm-gguf-plugin,"
    "vllm-gguf-plugin triton,diffusers compiled,torchao int8 weight-only,torchao int8 dynamic,torchao fp8 dynamic"
)
# Shares of the whole time that a part may take at most, so that a slow one does not cost all that comes after it.
SHARES = dict(correctness=0.3, tuning=0.45, peers=0.3)
_LEAST_SECONDS = 15


def parts(options: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """List what is run: names, and commands in which {out} is the output folder."""
    dry = ["--device", "cpu", "--scale", str(options.scale), "--repeats", "1", "--calls", "1"] if options.dry_run else []

    def run(file: str, formats: str, *more: str) -> list[str]:
        return _python("bench.run", "--resume", "--formats", formats, "--write", f"{{out}}/{file}.csv", *more, *dry)

    tuning = ["--minutes", str(min(4.0, options.minutes * 0.4)), "--formats", "Q4_K,Q8_0", "--compute", "exact"]
    linear = ["--csv", "{out}/linear.csv"]
    found = [
        ("correctness", _correctness(run, options.dry_run)),
        ("tuning", _python("bench.tune", "--out", "{out}/tuning.json", *tuning, *(["--list"] if options.dry_run else []))),
        ("linears", run("linear", "Q4_K,Q8_0,Q6_K")),
        ("roofline", _python("bench.roofline", *linear)),
        (
            "calibration",
            _python(
                "bench.calibrate",
                *linear,
                *("--write", "{out}/calibration.csv"),
                *(["--model", "RTX 3090"] if options.dry_run else []),
            ),
        ),
        ("peers", run("peers", "Q4_K,Q8_0", "--providers", f"torch,{OURS},{PEERS}", "--calls", "6")),
        ("whole_step", _whole_step(options)),
        ("batch_2", run("batch2", "Q4_K", "--step", "1024x1024 batch 2")),
        ("512", run("512", "Q4_K,Q8_0", "--step", "512x512")),
        ("more_k", run("more", "Q5_K,Q3_K,Q2_K,IQ4_XS,IQ4_NL")),
        ("small_blocks", run("more", "Q4_0,Q4_1,Q5_0,Q5_1,MXFP4,NVFP4")),
        ("grids", run("more", "IQ1_S,IQ1_M,IQ2_XXS,IQ2_XS,IQ2_S,IQ3_XXS,IQ3_S")),
    ]
    return [(name, command) for name, command in found if command]


def _python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def _correctness(run, dry: bool) -> list[str]:
    """Return the tests where they can run, else every type's results against float64, which torch alone can do."""
    if not dry and all(importlib.util.find_spec(name) for name in ("pytest", "numpy")):
        return _python("pytest", "-q", "-m", "gpu and not slow", "tests/gpu", "-x", "--no-header", "-p", "no:cacheprovider")
    small = [] if dry else ["--scale", "16", "--repeats", "1", "--calls", "2"]
    return run("correctness", "all", "--providers", OURS, *small)


def _whole_step(options: argparse.Namespace) -> list[str]:
    """Return the command of the whole step, or nothing where this checkout has none that can be run by itself."""
    found = importlib.util.find_spec("flux_kernels.benchmark.whole_step")
    if found is None or "__main__" not in Path(str(found.origin)).read_text(encoding="utf-8"):
        return []
    dry = ["--device", "cpu", "--repeats", "2", "--formats", "Q4_K"] if options.dry_run else []
    return _python("flux_kernels.benchmark.whole_step", "--write", "{out}/whole_step.csv", *dry)


def run_part(name: str, command: list[str], out: Path, seconds_left: float) -> str:
    """Run one part, its output going to a log; return "done", "failed" or "out of time"."""
    log = out / f"{name}.log"
    part = log.with_suffix(".part")
    environment = os.environ | dict(FLUX_KERNELS_TUNING=str(out))  # so that what was tuned here is used here
    with part.open("w") as file:
        arguments = [argument.format(out=out) for argument in command]
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds_left)
        except subprocess.TimeoutExpired:
            return "out of time"
        finally:
            with contextlib.suppress(ProcessLookupError):  # the whole group: tuning has processes that compile
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code:
        part.replace(out / f"{name}.failed.log")
        return f"failed with exit code {code}, see {out / f'{name}.failed.log'}"
    part.replace(log)
    return "done"


def main(arguments: list[str] | None = None) -> int:
    """Run the parts that have no log yet, until the time is up; return 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--parts", help="comma-separated; default: all")
    parser.add_argument("--dry-run", action="store_true", help="all parts on the CPU, M and N divided by --scale")
    parser.add_argument("--scale", type=int, default=64, help="of the dry run")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    out, end, failed = options.out.resolve(), time.monotonic() + 60 * options.minutes, False
    for name, command in parts(options):
        if options.parts and name not in options.parts.split(","):
            continue
        if (out / f"{name}.log").exists():
            print(f"{name}: done before", flush=True)
            continue
        left = end - time.monotonic()
        if left < _LEAST_SECONDS:
            print(f"{name}: no time left", flush=True)
            continue
        started = time.monotonic()
        outcome = run_part(name, command, out, min(left, 60 * options.minutes * SHARES.get(name, 1.0)))
        failed |= outcome.startswith("failed")
        print(f"{name}: {outcome} ({time.monotonic() - started:.0f} s)", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
