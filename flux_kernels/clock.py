"""Time functions against each other: interleaved repeats, medians, on a GPU with events and on a CPU with a wall clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import quantiles

import torch


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    before: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Run every function `repeats` times in turn (A B C A B C ...), after one warm-up each; return milliseconds of each run.

    `before` runs ahead of every run, untimed: what empties a cache, for example.
    """
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            before()
            times[name].append(_milliseconds(function, device))
    return times


def percentiles(times: list[float]) -> tuple[float, float, float]:
    """Return the 20th, 50th and 80th percentile."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    cuts = quantiles(times, n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]


def _milliseconds(function: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
