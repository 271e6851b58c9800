"""Time every linear call of a FLUX.1-dev step: plain, decode-then-multiply, and ours in every mode.

    python -m bench.run --formats Q4_K,Q6_K,Q8_0 --write bench/results/linear.csv        # on a GPU
    python -m bench.run --scale 8 --repeats 3                                          # a small version for a CPU

A provider's speed is reported only where its result passes the correctness gate in the same run. Every row is written at once.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from bench.record import append_csv, origin, read_csv
from flux_kernels.benchmark.ceilings import measure_ceilings
from flux_kernels.benchmark.linears import is_broken, measure, summary
from flux_kernels.benchmark.providers import default_providers
from flux_kernels.benchmark.shapes import reduced, size_name
from flux_kernels.compute import capability_of
from flux_kernels.formats import FORMATS
from flux_kernels.models.calls import STEPS, Call, step_calls


def main() -> int:
    """Parse the command line, measure, write every row as it comes; return 1 where one of ours failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="Q4_K,Q6_K,Q8_0", help='comma-separated, or "all"')
    parser.add_argument("--providers", help="comma-separated; default: those that tell something about a call, without peers")
    parser.add_argument("--step", default="1024x1024", choices=STEPS, help="picture size and batch")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--scale", type=int, default=1, help="divide M and N by this, for slow machines (rows say so by their shapes)"
    )
    parser.add_argument("--calls", type=int, default=11, help="only the first calls of the list, which take the most time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", type=Path, help="CSV to append rows to, each as soon as it is measured")
    parser.add_argument("--resume", action="store_true", help="go on in the CSV of --write: leave out the calls it has")
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    made_at, rows = origin(device), _there(arguments.write) if arguments.resume else []
    done = {(row["format"], row["where"], row["m"], row["n"]) for row in rows}
    ceilings = measure_ceilings(device, dtype)
    print(
        f"ceilings: copy {ceilings.copy_gb_s:.0f} GB/s, matmul {ceilings.matmul_tflops:.3g} TFLOP/s {ceilings.dtype}",
        flush=True,
    )
    for name in _formats(arguments.formats):
        for call in one_of_each_height_first(step_calls(**STEPS[arguments.step])[: arguments.calls]):
            small = reduced(call, arguments.scale)
            if (name, small.where, small.m, small.n) in done:
                continue
            named = arguments.providers
            wanted = named.split(",") if named else default_providers(small.m, dtype, capability_of(device))
            size = size_name(arguments.step, arguments.scale)
            for row in measure(name, small, wanted, device, dtype, arguments.repeats, ceilings, size):
                rows.append(row)
                print(
                    f"{name:8} {row['m']:6} {row['n']:6} {row['k']:6} {row['provider']:22} {row['p50_ms']:>10} ms {row['note']}",
                    flush=True,
                )
                if arguments.write:
                    append_csv(row | made_at, arguments.write)
    print(summary(rows))
    return int(any(map(is_broken, rows)))


def one_of_each_height_first(calls: list[Call]) -> list[Call]:
    """Put one call of each M first: where time runs out, image, text and modulation have all been seen."""
    first = list({call.m: call for call in reversed(calls)}.values())
    return [call for call in calls if call in first] + [call for call in calls if call not in first]


def _there(path: Path | None) -> list[dict]:
    """Read the rows that an earlier call wrote; a file's last call may be incomplete, and counts."""
    if path is None or not path.exists():
        return []
    return [row | {name: int(row[name]) for name in ("m", "n", "k", "calls")} for row in read_csv(path)]


def _formats(names: str) -> list[str]:
    return list(FORMATS) if names == "all" else names.split(",")


if __name__ == "__main__":
    sys.exit(main())
