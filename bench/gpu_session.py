"""Use a short time on a GPU well: correctness, then the kernels' times, then more formats, in order of importance.

    python -m bench.gpu_session --out results --minutes 9

Needs the repository, torch and triton (numpy and pytest where the tests are to run); no network, no diffusers. Each part writes its
result at once and is skipped when its file is there already, so a second call goes on where the first was stopped.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = [  # name, command; {out} is the output folder
    (
        "gpu_tests",
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu and not slow", "tests/gpu", "-x", "--no-header", "-p", "no:cacheprovider"],
    ),
    ("q4_k_q8_0", [sys.executable, "-m", "bench.run", "--formats", "Q4_K,Q8_0", "--write", "{out}/linear.csv"]),
    ("q6_k", [sys.executable, "-m", "bench.run", "--formats", "Q6_K", "--write", "{out}/linear.csv"]),
    (
        "batch_2",
        [sys.executable, "-m", "bench.run", "--formats", "Q4_K", "--step", "1024x1024 batch 2", "--write", "{out}/batch2.csv"],
    ),
    ("512", [sys.executable, "-m", "bench.run", "--formats", "Q4_K,Q8_0", "--step", "512x512", "--write", "{out}/512.csv"]),
    ("other_k", [sys.executable, "-m", "bench.run", "--formats", "Q5_K,Q3_K,Q2_K,IQ4_XS,IQ4_NL", "--write", "{out}/other.csv"]),
    (
        "small_blocks",
        [sys.executable, "-m", "bench.run", "--formats", "Q4_0,Q4_1,Q5_0,Q5_1,MXFP4,NVFP4", "--write", "{out}/other.csv"],
    ),
    ("grids", [sys.executable, "-m", "bench.run", "--formats", "IQ1_S,IQ2_XXS,IQ3_S", "--write", "{out}/other.csv"]),
]


def run_part(name: str, command: list[str], out: Path, seconds_left: float) -> str:
    """Run one part, its output going to a log; return "done", "failed" or "out of time"."""
    log = out / f"{name}.log"
    with log.with_suffix(".part").open("w") as file:
        try:
            arguments = [part.format(out=out) for part in command]
            code = subprocess.run(
                arguments, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=seconds_left, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return "out of time"
    log.with_suffix(".part").rename(log)
    return "done" if code == 0 else f"failed with exit code {code}, see {log}"


def main() -> None:
    """Run the parts that have no log yet, until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--parts", default=",".join(name for name, _ in PARTS), help="comma-separated; default: all")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    out, end = arguments.out.resolve(), time.monotonic() + 60 * arguments.minutes
    for name, command in PARTS:
        if name not in arguments.parts.split(","):
            continue
        if (out / f"{name}.log").exists():
            print(f"{name}: done before", flush=True)
            continue
        left = end - time.monotonic()
        if left < 15:
            print(f"{name}: no time left", flush=True)
            continue
        started = time.monotonic()
        print(f"{name}: {run_part(name, command, out, left)} ({time.monotonic() - started:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
