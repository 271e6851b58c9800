"""Time functions against each other, on a GPU with events and on a CPU with a wall clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from statistics import quantiles
from typing import TypeVar

import torch

from .gpu_clock import GpuClock, Replay, no_capture

Work = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)
_LEAST_REPLAYS = 3
# Bytes.
_LEAST_FLUSH = 1 << 26


def interleaved(
    functions: Mapping[Key, Work],
    repeats: int,
    device: torch.device,
    before: Work = lambda: None,
) -> dict[Key, list[float]]:
    """Run every function `repeats` times in turn, after one warm-up each; return milliseconds of each run.

    The order changes from turn to turn (`balanced_order`): what runs right after a heavy function finds cold caches, and
    sometimes threads that still spin. With one order it would always be the same function that pays for it. `before` runs ahead
    of every run, untimed: what empties a cache, for example. On CUDA the times are the GPU's alone (gpu_clock.py).
    """
    for function in functions.values():
        function()
    measured = _clock(device)
    times: dict[Key, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for turn in range(repeats):
        for name in (names[index] for index in balanced_order(len(names), turn)):
            times[name].append(measured(functions[name], before))
    return times


def graph_replayed(
    functions: Mapping[str, Work],
    repeats: int,
    device: torch.device,
    before: Work = lambda: None,
) -> dict[str, list[float] | None]:
    """Return milliseconds of each function's replays as a CUDA graph.

    None where it cannot be captured, with a log line why, and for each where the device is not CUDA's. One function runs after
    the other, so that only one graph holds memory. `before` runs ahead of every replay: many replays in a row would find in the
    L2 cache what a model reads from memory.
    """
    if device.type != "cuda":
        return dict.fromkeys(functions)
    clock = GpuClock(device)
    times: dict[str, list[float] | None] = {}
    for name, function in functions.items():
        try:
            with Replay(function, device) as replay:
                times[name] = [clock.milliseconds(replay, before) for _ in range(max(repeats, _LEAST_REPLAYS))]
        # Whatever a function does that a capture forbids.
        except Exception as error:  # noqa: BLE001
            no_capture(name, error)
            times[name] = None
    return times


def cache_flusher(device: torch.device) -> Work:
    """Return what empties a GPU's L2 cache, by writing twice its size.

    On a CPU, whose caches the operands outgrow, it does nothing. Inside a step each weight comes from memory. Repeats of one
    call would find it in the cache of a large card.
    """
    if device.type != "cuda":
        return lambda: None
    size = max(2 * torch.cuda.get_device_properties(device).L2_cache_size, _LEAST_FLUSH)
    return torch.empty(size, dtype=torch.uint8, device=device).zero_


def balanced_order(count: int, turn: int) -> list[int]:
    """Return the order in which `count` functions run in a turn.

    Each comes after every other equally often, and never after itself. The turns are the rows of a Williams design: it is
    complete after `count` turns, or twice as many where `count` is odd. Two functions alternate, which is balanced already.

    Source: Williams 1949, Experimental designs balanced for the estimation of residual effects of treatments.
    """
    if count < 3:
        return list(range(count))
    # 0, 1, -1, 2, -2, ...
    zigzag = [(step + 1) // 2 if step % 2 else -(step // 2) for step in range(count)]
    if count % 2 and turn % 2:
        zigzag.reverse()
    return [(turn + step) % count for step in zigzag]


def percentiles(times: list[float]) -> tuple[float, float, float]:
    """Return the 20th, 50th and 80th percentile."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    cuts = quantiles(times, n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]


def _clock(device: torch.device) -> Callable[[Work, Work], float]:
    """Return what times one run of a function, after what runs untimed ahead of it."""
    return GpuClock(device).milliseconds if device.type == "cuda" else _wall_milliseconds


def _wall_milliseconds(function: Work, before: Work) -> float:
    before()
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)
