"""Time the torch backend on a CPU in turn with diffusers' GGUF layer and a plain linear.

    python -m bench.cpu_ratio                                              # the table of docs/decisions/torch-backend-on-cpu.md
    python -m bench.cpu_ratio --formats Q6_K --m 64 --dtypes bfloat16 --threads 1
    python -m bench.cpu_ratio --write bench/results/cpu_ratio.csv          # also a CSV, each cell as soon as it is measured

The three take turns (and the order turns round every time); a ratio is the median over the turns, so that a machine that is slow
for a while is slow for all of them. A cell is repeated until the middle half of its ratios lies within --spread of the median, or
--most times. Processor time (of all threads) is given with the wall clock: other work on the machine disturbs it less.
A time counts only where the result passed the correctness gate of `flux-kernels bench`.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import torch

from bench.record import append_csv, origin
from flux_kernels.benchmark.linears import make_problem, relative_errors
from flux_kernels.benchmark.providers import PROVIDERS
from flux_kernels.compute import dtype_name
from flux_kernels.models.calls import Call

TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
SIDES = {"diffusers": "diffusers", "ours": "ours exact", "plain": "torch"}
Times = dict[str, list[float]]


def main() -> int:
    """Parse the command line, measure every cell, print the table; return 1 where diffusers is faster."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=",".join(TYPES), help="comma-separated ggml types")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="of x, weight and y on every side")
    parser.add_argument("--m", default="1,64,512", help="rows of x")
    parser.add_argument("--n", type=int, default=3072, help="output features")
    parser.add_argument("--k", type=int, default=3072, help="input features")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch, and so of all three")
    parser.add_argument("--least", type=int, default=15, help="turns of every cell")
    parser.add_argument("--most", type=int, default=45, help="turns of a cell that stays noisy")
    parser.add_argument(
        "--spread", type=float, default=0.15, help="quartile distance of the ratios, as a share of their median"
    )
    parser.add_argument("--write", type=Path, help="CSV to append every cell to")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    made_at, rows = origin(torch.device("cpu")), []
    for name in arguments.formats.split(","):
        for dtype in arguments.dtypes.split(","):
            for m in map(int, arguments.m.split(",")):
                shape = Call(m, arguments.n, arguments.k, 1, "")
                row = cell(name, shape, getattr(torch, dtype), arguments.least, arguments.most, arguments.spread)
                rows.append(row)
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
                if arguments.write:
                    append_csv(row | made_at, arguments.write)
    print(table(rows, "ratio", "plain_share"), table(rows, "processor_ratio"), sep="\n\n")
    return int(any(row["ratio"] < 1 for row in rows))


def cell(name: str, call: Call, dtype: torch.dtype, least: int, most: int, spread: float) -> dict:
    """Measure one cell of the table.

    Columns: medians in ms; `ratio` and `processor_ratio`, diffusers' time divided by ours (median over turns), with the quartiles
    of the former; `plain_share`, ours divided by the plain linear; turns, and the machine's load before the cell.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    wall, processor = measure(_sides(name, call, dtype), least, most, spread)
    ratios = _ratios(wall, "diffusers", "ours")
    low, middle, high = quantiles(ratios, n=4)
    row = dict(format=name, dtype=dtype_name(dtype), m=call.m, n=call.n, k=call.k, threads=torch.get_num_threads())
    row |= {f"{side}_ms": round(median(times), 3) for side, times in wall.items()}
    return row | dict(
        ratio=round(middle, 2),
        ratio_low=round(low, 2),
        ratio_high=round(high, 2),
        processor_ratio=round(median(_ratios(processor, "diffusers", "ours")), 2),
        plain_share=round(median(_ratios(wall, "ours", "plain")), 2),
        turns=len(ratios),
        load=round(load, 1),
    )


def _sides(name: str, call: Call, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Make the three functions of a cell, after each has passed its gate."""
    problem = make_problem(name, call, torch.device("cpu"), dtype)
    x = torch.randn(call.m, call.k, generator=torch.Generator().manual_seed(call.m)).to(dtype)
    sides: dict[str, Callable[[], object]] = {}
    for side, provider in SIDES.items():
        function = PROVIDERS[provider].make(problem)
        error = relative_errors(function(x), x, problem)[0]
        if not error <= PROVIDERS[provider].gate:
            raise RuntimeError(
                f"{provider} is wrong on {name}: relative error {error:.2g}, at most {PROVIDERS[provider].gate}."
            )
        sides[side] = partial(function, x)
    return sides


@torch.inference_mode()
def measure(functions: dict[str, Callable[[], object]], least: int, most: int, spread: float) -> tuple[Times, Times]:
    """Time functions in turns until the ratios settle; return wall and processor times in ms."""
    for function in functions.values():
        function()
    wall: Times = {name: [] for name in functions}
    processor: Times = {name: [] for name in functions}
    for turn in range(most):
        for name in list(functions)[:: 1 if turn % 2 else -1]:
            clock, used = time.perf_counter(), time.process_time()
            functions[name]()
            processor[name].append(1e3 * (time.process_time() - used))
            wall[name].append(1e3 * (time.perf_counter() - clock))
        if turn + 1 >= least:
            low, middle, high = quantiles(_ratios(wall, "diffusers", "ours"), n=4)
            if high - low <= spread * middle:
                break
    return wall, processor


def _ratios(times: Times, one: str, other: str) -> list[float]:
    return [a / b for a, b in zip(times[one], times[other], strict=True)]


def table(rows: list[dict], column: str, bracketed: str = "") -> str:
    """Write a Markdown table: a type a row, a dtype and M a column."""
    cells = list(dict.fromkeys((row["dtype"], row["m"]) for row in rows))
    lines = [f"| {column} | " + " | ".join(f"{dtype} M={m}" for dtype, m in cells) + " |", "|---" * (len(cells) + 1) + "|"]
    for name in dict.fromkeys(row["format"] for row in rows):
        by_cell = {(row["dtype"], row["m"]): row for row in rows if row["format"] == name}
        texts = [f"{by_cell[key][column]:.1f}" + (f" [{by_cell[key][bracketed]:.1f}]" if bracketed else "") for key in cells]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
