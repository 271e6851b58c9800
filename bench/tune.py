"""Tune this card with torch and triton alone (`flux-kernels tune` is the same, nicer).

    python -m bench.tune --formats Q4_K,Q8_0 --minutes 8 --out results/tuning.json

The most important calls come first, each result is written at once, and a second run goes on where the first was stopped.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from flux_kernels.backends import resolve
from flux_kernels.formats import FORMATS
from flux_kernels.machine.tune import tune
from flux_kernels.machine.tune_jobs import step_jobs
from flux_kernels.models.calls import STEPS, step_calls


def main() -> None:
    """Parse the command line and tune, printing a line for each call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="Q4_K,Q8_0,Q6_K")
    parser.add_argument("--compute", default="exact,int8")
    parser.add_argument("--step", default="1024x1024", choices=STEPS)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"], help="of the activations")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, help="the record to write; default: the card's own in the user's folder")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile")
    parser.add_argument("--list", action="store_true", help="only list what would be tuned, which needs no GPU")
    arguments = parser.parse_args()
    jobs = step_jobs(step_calls(**STEPS[arguments.step]), arguments.compute.split(","), arguments.formats.split(","))
    if arguments.list:
        print(*jobs, sep="\n")
        return
    device = torch.device("cuda", 0)
    for mode in dict.fromkeys(job.compute for job in jobs):
        # Raises where the card refuses the mode.
        resolve("triton", mode, device, FORMATS[jobs[0].format])
    options = dict(
        dtype=getattr(torch, arguments.dtype), path=arguments.out, minutes=arguments.minutes, processes=arguments.processes
    )
    path = tune(jobs, device, on_row=_show, **options)
    print(f"written to {path}")


def _show(job, row) -> None:
    if row is None:
        print(f"{job}: up to date", flush=True)
    else:
        chunks = f"in chunks of {row.rows} rows " if row.rows else ""
        print(f"{job}: {row.algorithm} {row.tile or ''} {chunks}{row.ms:.4f} ms, default {row.default_ms:.4f} ms", flush=True)


if __name__ == "__main__":
    main()
