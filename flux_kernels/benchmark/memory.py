"""How much memory a call takes at its peak beyond what was there before."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import torch

from ..machine.silence import STDERR, silenced


def extra_peak(function: Callable[[], object], device: torch.device) -> int | None:
    """Run a function; return the most bytes torch held beyond what it held before, None where unknown.

    On a CPU torch's profiler counts what is allocated and freed, in a thread that begins without scratch of earlier calls.
    The resident memory of the process would not do: freed memory that is used again does not show in it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not torch.profiler.kineto_available():
        function()
        return None
    return _counted(function)


def _counted(function: Callable[[], object]) -> int:
    def measure() -> int:
        with _profiler() as profiler:
            function()
        changes = (e.nbytes() for e in profiler.kineto_results.events() if e.name() == "[memory]")
        return max(accumulate(changes, initial=0))

    # The profiler's C++ library writes to standard error at every start and stop.
    with silenced(STDERR):
        with _profiler():  # the first one must start in the main thread
            pass
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(measure).result()


def _profiler() -> torch.autograd.profiler.profile:
    # torch.profiler.profile would do the same and import torch's compiler first, which takes seconds.
    return torch.autograd.profiler.profile(profile_memory=True)
