"""Time what a CUDA device takes for a function, and not what Python takes to issue it.

A call of this library issues its kernels in tens of microseconds and may run in ten. Two events around it would measure the
host. So a sleep is queued on the device first; while it lasts, all launches of the function and both events are queued behind
it, and the device runs them back to back. The start event shows whether that worked: it must not have been reached when the
last launch is issued.

A driver's queue has an end: on an H200, an eager step of 3,342 launches had 1,022 outstanding at most and waited 160 times
("Command Buffer Full" in its profile), so none of its launches beyond can be issued before the device begins, whatever the
sleep.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import perf_counter
from types import TracebackType
from typing import Self

import torch
from torch import cuda

# Milliseconds of the first sleep.
_SLEEP = 1.0
# Beyond, a function waits for the device or fills the driver's launch queue, and no sleep is long enough.
_LONGEST = 64.0
# Each behind twice the issuing of the run before: if the device overtakes them too, issuing waits for the device.
_RETRIES = 2
# Before a capture: compiling, and the lazy initialisation of libraries, cannot be captured.
_WARM_UPS = 3
_PROBE_CYCLES = 1_000_000
# Cycles a millisecond of any GPU's clock.
_RATES = (2e5, 4e6)

log = logging.getLogger(__name__)


class GpuClock:
    """Time functions on one device; how long a sleep each needs is learnt and kept."""

    def __init__(self, device: torch.device):
        """Measure the clock rate, in which sleeps are counted."""
        self._device = device
        self._sleeps: dict[Callable[[], object], float] = {}
        self._unserved: set[Callable[[], object]] = set()
        with cuda.device(device):
            self._cycles = _cycles_a_millisecond()

    def milliseconds(self, function: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
        """Return the device's milliseconds of one run of `function`.

        `before` runs between the sleep and the start event. A run whose start event was reached before the last launch is
        repeated behind a longer sleep. A function that no sleep serves is timed without a sleep, with a log line: its time may
        include the host's. A replay that no sleep serves is timed behind the longest: a single launch, which no longer waits
        for the host once it has begun.
        """
        with cuda.device(self._device):
            for retry in range(_RETRIES + 1):
                sleep = self._sleeps.get(function, _SLEEP)
                milliseconds, issuing, ahead = self._run(function, before, sleep)
                if ahead or function in self._unserved:
                    return milliseconds
                longer = 2 * max(sleep, issuing)
                self._sleeps[function] = min(longer, _LONGEST)
                if longer > _LONGEST or retry == _RETRIES:
                    self._give_up(function, issuing, sleep)
                    break
            return self._run(function, before, self._sleeps[function])[0]

    def _give_up(self, function: Callable[[], object], issuing: float, sleep: float) -> None:
        self._unserved.add(function)
        milliseconds = issuing, sleep
        if isinstance(function, Replay):
            log.info(
                "A graph is not queued ahead of the device: it took %.1f ms to issue behind a sleep of %.1f ms", *milliseconds
            )
            return
        self._sleeps[function] = 0.0
        log.warning(
            "A function is not queued ahead of the device (issuing it took %.1f ms behind a sleep of %.1f ms): its time may "
            "include the host's",
            *milliseconds,
        )

    def _run(self, function: Callable[[], object], before: Callable[[], object], sleep: float) -> tuple[float, float, bool]:
        """Return milliseconds on the device, those of issuing, and whether issuing was done before it began."""
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        if sleep:
            cuda._sleep(int(sleep * self._cycles))
        issued = perf_counter()
        before()
        start.record()
        function()
        end.record()
        ahead = not start.query()
        issuing = 1e3 * (perf_counter() - issued)
        end.synchronize()
        return start.elapsed_time(end), issuing, ahead


def _cycles_a_millisecond() -> float:
    """Return the device's clock rate, from a sleep that is timed after another has woken it."""
    start, end = (cuda.Event(enable_timing=True) for _ in range(2))
    cuda._sleep(_PROBE_CYCLES)
    start.record()
    cuda._sleep(_PROBE_CYCLES)
    end.record()
    end.synchronize()
    slowest, fastest = _RATES
    return min(max(_PROBE_CYCLES / max(start.elapsed_time(end), 1e-3), slowest), fastest)


class Replay:
    """Hold a function as a captured CUDA graph; calling it replays the graph.

    It is used as a context, which frees the graph's memory.
    """

    def __init__(self, function: Callable[[], object], device: torch.device):
        """Warm up on a side stream, then capture one run there.

        What the function raises where it cannot be captured is raised.
        """
        with cuda.device(device):
            cuda.synchronize()
            side = cuda.Stream()
            side.wait_stream(cuda.current_stream())
            with cuda.stream(side):
                for _ in range(_WARM_UPS):
                    function()
            cuda.current_stream().wait_stream(side)
            cuda.synchronize()
            self._graph = cuda.CUDAGraph()
            with cuda.graph(self._graph, stream=side):
                # Kept: the graph writes to this memory.
                self._output = function()

    def __call__(self) -> None:
        self._graph.replay()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        cuda.synchronize()
        self._graph.reset()
        self._output = None


def no_capture(name: str, error: Exception) -> None:
    """Log why a function has no graph time."""
    log.warning("%s is not captured in a CUDA graph: %s: %s", name, type(error).__name__, " ".join(str(error).split())[:200])
