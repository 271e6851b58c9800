"""Launch each kernel of interest once between the profiler's start and stop, for Nsight Compute.

ncu --profile-from-start off --clock-control none ... python -m bench.gpu_session.profiled
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from bench.gpu_session import int8, sweep
from bench.gpu_session.session import Session
from flux_kernels.compute import capability_of, group_width
from flux_kernels.formats import FORMATS
from flux_kernels.kernels import int8 as int8_mode
from flux_kernels.kernels import two_stage
from flux_kernels.kernels.choice import Choice, choose
from flux_kernels.kernels.tiles import fused_tile, int8_tile

SECTIONS = ("SpeedOfLight", "WarpStateStats", "SchedulerStats", "MemoryWorkloadAnalysis", "Occupancy")
# Why warps wait, and sectors that L2 was asked for: not in those sections' tables.
_METRICS = (
    "regex:smsp__average_warps_issue_stalled_.*_per_issue_active,lts__t_sectors_op_read.sum,lts__t_requests_srcunit_tex.sum"
)
_K = _N = 3072
_MODULATION = 18432  # N that fills the card in a call of few rows


def command(out: Path, python: list[str]) -> list[str]:
    """Return the command that profiles this module with Nsight Compute, a CSV on standard output."""
    chosen = [part for section in SECTIONS for part in ("--section", section)] + ["--metrics", _METRICS]
    ours = ["--profile-from-start", "off", "--clock-control", "none", "--target-processes", "application-only"]
    return ["ncu", *ours, *chosen, "--csv", "--page", "details", *python, "-m", "bench.gpu_session.profiled", "--out", str(out)]


def launches(session: Session) -> dict[str, Callable[[], object]]:
    """Return what is launched, by name."""
    x, large, few = (session.activations(m, _K) for m in (512, 4608, 8))
    bias, dense = session.bias(_N), session.activations(_N, _K)
    calls: dict[str, Callable[[], object]] = {"cuBLAS": lambda: F.linear(large, dense, bias)}
    for format in ("Q4_K", "Q6_K"):
        fmt, weights = FORMATS[format], session.weights(format, _N, _K)[:1]
        tile = fused_tile(fmt, 512, _N, _K, capability_of(session.device))
        calls[f"fused {format}"] = sweep.exact_call(x, weights, bias, Choice("fused", tile, ""))
        calls[f"unpack {format}"] = lambda w=weights[0]: two_stage.unpack(w, torch.bfloat16)
        modulation, wide_bias = session.weights(format, _MODULATION, _K)[:1], session.bias(_MODULATION)
        for m in (1, 8):
            small = choose("exact", fmt, m, _MODULATION, _K, session.device)
            calls[f"small M {format}, {m}"] = sweep.exact_call(few[:m], modulation, wide_bias, small)
    x8, w8 = int8._codes(session, 4608, _N, _K)
    problem = int8._problem(session, 4608, _N, _K)
    x_scale = torch.ones(_K // group_width(_K), 4608, device=session.device)
    for scales, count in (("rows", 1), ("groups", _K // group_width(_K))):
        w_scale = torch.ones(count, _N, device=session.device)
        calls[f"int8 product {scales}"] = int8.product(problem, x8, x_scale, w8, w_scale, int8_tile(4608))
    packed = session.weights("Q4_K", _N, _K)[0]
    calls["int8 unpack rows"] = lambda: int8_mode.unpack_weight(packed, group_width(_K), True)
    calls["quantize x"] = lambda: int8_mode.quantize_activation(large, group_width(_K))
    return calls


def main(arguments: list[str] | None = None, dry: bool = False) -> None:
    """Launch everything once to load it, then once more for the profiler."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    session = Session(options.out, dry, time.monotonic() + 600)
    calls = launches(session)
    for call in calls.values():
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for call in calls.values():
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    print("launched:", ", ".join(calls))


if __name__ == "__main__":
    main()
