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
    """Run every function `repeats` times in turn, after one warm-up each; return milliseconds of each run.

    The order changes from turn to turn (`balanced_order`): what runs right after a heavy function finds cold caches, and sometimes
    threads that still spin. With one order it would always be the same function that pays for it. `before` runs ahead of
    every run, untimed: what empties a cache, for example.
    """
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for turn in range(repeats):
        for name in (names[index] for index in balanced_order(len(names), turn)):
            before()
            times[name].append(_milliseconds(functions[name], device))
    return times


def balanced_order(count: int, turn: int) -> list[int]:
    """Return in which order `count` things run in a turn: each comes after every other equally often, and never after itself.

    The turns are the rows of a Williams design: it is complete after `count` turns, or twice as many where `count` is odd. Two things
    alternate, which is balanced already.

    Source: Williams 1949, Experimental designs balanced for the estimation of residual effects of treatments.
    """
    if count < 3:
        return list(range(count))
    zigzag = [(step + 1) // 2 if step % 2 else -(step // 2) for step in range(count)]  # 0, 1, -1, 2, -2, ...
    if count % 2 and turn % 2:
        zigzag.reverse()
    return [(turn + step) % count for step in zigzag]


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
