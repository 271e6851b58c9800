"""Time what a call costs in Python above nn.Linear in the same run; no GPU is needed.

    python -m bench.launch_cost                                         # an H100's choices
    python -m bench.launch_cost --card "RTX 3090" --write bench/results/launch_cost.csv

A stand-in driver launches nothing, so the times leave out the driver's own part of a launch (3 to 5 us each) and what cuBLAS does
after torch's dispatcher. Kernels are really compiled, once. A round runs every case in turn; times are CPU time of this
thread, which other work on the machine disturbs less than the wall clock. Each row is the median of the rounds' means.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

import flux_kernels as fk
from bench.record import origin, write_csv
from bench.stand_in import CARDS, StandIn, stand_in
from flux_kernels.formats import FORMATS, Packed
from flux_kernels.machine.clock import balanced_order
from flux_kernels.machine.random_rows import random_weight

CASES = {  # name -> compute mode, M; N and K are those of most of FLUX.1's linears
    "small m": ("exact", 1),
    "fused": ("exact", 16),
    "two-stage": ("exact", 4608),
    "int8": ("int8", 4608),
    "fp16_accumulate": ("fp16_accumulate", 4608),
}
_N = _K = 3072
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_memory() -> None:
    """Make malloc keep what is freed, as torch's GPU allocator does: large results cost no system calls."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def cases(card: StandIn, format: str, dtype: torch.dtype, entry: str) -> dict[str, Callable[[], object]]:
    """Return name -> one call, for nn.Linear and every mode the card has, each called once to compile.

    Args:
        entry: "layer" calls a `GGUFLinear`, "function" calls `flux_kernels.linear`.
    """
    plain = nn.Linear(8, 8).requires_grad_(False)
    x = torch.zeros(8, 8)
    calls: dict[str, Callable[[], object]] = {"nn.Linear": lambda: plain(x)}
    weight, bias = random_weight(FORMATS[format], _N, _K), torch.zeros(_N, dtype=dtype)
    for name, (compute, m) in CASES.items():
        calls[name] = entered(torch.empty(m, _K, dtype=dtype), weight, bias, compute, entry)
    return {name: call for name, call in calls.items() if _runs(name, call)}


def _runs(name: str, call: Callable[[], object]) -> bool:
    """Call once; tell why where the card has no such mode."""
    try:
        call()
    except fk.BackendUnavailable as error:
        print(f"{name:16} left out: {error}", flush=True)
        return False
    return True


def entered(x: Tensor, weight: Packed, bias: Tensor, compute: str, entry: str) -> Callable[[], object]:
    """Return one call of packed rows, entered as a "layer" or a "function"."""
    data, fmt, planes, _ = weight
    if entry == "function":
        return lambda: fk.linear(x, data, fmt, bias, compute=compute, planes=planes)
    layer = fk.GGUFLinear.from_packed(data, fmt, bias, planes=planes, compute=compute)
    return lambda: layer(x)


def time_calls(calls: dict[str, Callable[[], object]], rounds: int, repeats: int) -> dict[str, list[float]]:
    """Return name -> microseconds of a call in each round, the mean of `repeats` calls in a row."""
    names, times = list(calls), {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            for turn in range(rounds):
                for name in (names[index] for index in balanced_order(len(names), turn)):
                    times[name].append(_microseconds(calls[name], repeats))
    finally:
        gc.enable()
    return times


def _microseconds(call: Callable[[], object], repeats: int) -> float:
    start = time.thread_time_ns()
    for _ in range(repeats):
        call()
    return (time.thread_time_ns() - start) / repeats / 1e3


def launched(card: StandIn, call: Callable[[], object]) -> str:
    """Return which kernels one call launches, with how often where it is more than once."""
    card.launches.clear()
    call()
    return " ".join(name if count == 1 else f"{name}x{count}" for name, count in card.launches.items())


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measure, print a table and write the rows where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=CARDS, default="H100")
    parser.add_argument("--format", choices=FORMATS, default="Q4_K")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--entry", default="layer", choices=["layer", "function"])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--repeats", type=int, default=50, help="calls in a row in each round")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args(arguments)
    made_at = origin(torch.device("cpu"))
    keep_memory()
    print(f"On a stand-in for {CARDS[options.card].name}: nothing is launched, Python's part of a call is timed.", flush=True)
    with stand_in(CARDS[options.card]) as card, torch.no_grad():
        calls = cases(card, options.format, getattr(torch, options.dtype), options.entry)
        kernels = {name: launched(card, call) for name, call in calls.items()}
        times = time_calls(calls, options.rounds, options.repeats)
    plain = median(times["nn.Linear"])
    rows = []
    for name, means in times.items():
        us, compute, m = median(means), *CASES.get(name, ("", ""))
        rows.append(
            dict(case=name, card=options.card, format=options.format, dtype=options.dtype, entry=options.entry)
            | dict(compute=compute, m=m, us=f"{us:.1f}", us_above_linear=f"{us - plain:.1f}", least_us=f"{min(means):.1f}")
            | dict(rounds=options.rounds, repeats=options.repeats, kernels=kernels[name])
            | made_at
        )
        print(
            f"{name:16} {us:7.1f} us {us - plain:7.1f} above nn.Linear, least {min(means):7.1f}   {kernels[name]}", flush=True
        )
    if options.write:
        write_csv(rows, options.write)
    return rows


if __name__ == "__main__":
    main()
