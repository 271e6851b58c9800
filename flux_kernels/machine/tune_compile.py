"""Compile what `tune` will time, in processes of their own.

What cannot be compiled falls out there, even if it kills its compiler.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch

from ..kernels.modes import MODES

_PRODUCTS = tuple(kernel for mode in MODES.values() for kernel in mode.products)
KILLED = "the process that compiled it was killed, or took too long"
# Seconds that a kernel may compile; the slowest known took 50, on a busy core.
LONGEST = 300


class Compilers:
    """Hold processes that compile; used as a context, which ends them."""

    def __init__(self, processes: int, executor: Callable[[int], Executor] | None = None, longest: int = LONGEST):
        """Start no process yet.

        Args:
            processes: how many.
            executor: makes what runs tasks in so many processes.
            longest: seconds of one task.
        """
        # A CUDA context does not survive a fork.
        spawn = multiprocessing.get_context("spawn")
        self._processes, self._longest = processes, longest
        self._executor = executor or partial(ProcessPoolExecutor, mp_context=spawn)
        self._pool: Executor | None = None

    def failures(self, function: Callable[..., str], tasks: Sequence[tuple]) -> list[str]:
        """Run function(*task) for each task and return for each why it failed, "" where it did not.

        A task that kills its process, or takes so long that its process is ended, takes the others of the pool along. Those are
        run again, each in a new pool, and only what ends that pool has failed.
        """
        outcomes = self._together(function, tasks)
        for index, outcome in enumerate(outcomes):
            if outcome == KILLED and len(tasks) > 1:
                (outcomes[index],) = self._together(function, [tasks[index]])
        return outcomes

    def _together(self, function: Callable[..., str], tasks: Sequence[tuple]) -> list[str]:
        try:
            self._pool = self._pool or self._executor(self._processes)
            futures = [self._pool.submit(_within, self._longest, function, *task) for task in tasks]
            outcomes = [_outcome(future) for future in futures]
        # A process died while tasks were still being handed over.
        except BrokenProcessPool:
            outcomes = [KILLED] * len(tasks)
        if KILLED in outcomes:
            self._end()
        return outcomes

    def _end(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._end()


def _within(seconds: int, function: Callable[..., str], *task: object) -> str:
    """Run function(*task); the process ends where that takes longer.

    A compiler that hangs in C++ would answer no exception.
    """
    # Windows.
    if not hasattr(signal, "alarm"):
        return function(*task)
    before = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)
    try:
        return function(*task)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _outcome(future: Future[str]) -> str:
    try:
        return future.result()
    except BrokenProcessPool:
        return KILLED
    # Such as an error that could not be pickled.
    except Exception as error:  # noqa: BLE001
        return one_line(error)


def one_line(error: BaseException) -> str:
    """Return an error as one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def device_is_lost(device: torch.device) -> bool:
    """Return whether an earlier error, such as an illegal address, has ended the use of the device."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except Exception:  # noqa: BLE001
        return True
    return False


class Spills:
    """Count the registers that launches spill, as the driver reports them when Triton loads a kernel.

    In the interpreter there are none.
    """

    def __init__(self) -> None:
        """Know nothing yet."""
        self._known: dict[object, int] = {}

    def after(self, key: object, launch: Callable[[], object]) -> int:
        """Launch, and return how many registers the kernels that were loaded for it spill.

        Kernels are loaded once: the count is kept under `key`, which must name all that decides what is compiled.
        """
        before = {id(kernel) for kernel in _loaded()}
        launch()
        spilled = [getattr(kernel, "n_spills", None) or 0 for kernel in _loaded() if id(kernel) not in before]
        self._known[key] = max([self._known.get(key, 0), *spilled])
        return self._known[key]


def _loaded() -> list[Any]:
    """List the compiled kernels that hold products and are loaded in this process."""
    caches = [cache for kernel in _PRODUCTS for cache in getattr(kernel, "device_caches", {}).values()]
    return [compiled for cache in caches for compiled in cache[0].values()]
