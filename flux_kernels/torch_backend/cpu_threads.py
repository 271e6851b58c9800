"""Share rows among the threads that torch itself computes with on a CPU.

Threads of our own would meet torch's: OpenMP's workers spin for some 5 ms after each operation before they sleep, and take half
of two cores from whoever computes meanwhile (docs/decisions/torch-backend-on-cpu.md has the times). So the work is given to
that very team where torch's OpenMP runtime can be reached, and to a pool otherwise. Within either, torch computes on one thread;
a single chunk is left to the caller, whose operations use all.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..formats import BlockFormat

# A chunk has at least as many: giving a chunk to a thread costs tens of microseconds.
LEAST_WEIGHTS = 1 << 16
# Chunk sizes whose memory a worker keeps: a full and a last chunk of two layer shapes.
KEPT_UNPACKERS = 4
_local = threading.local()
# Whether this process is a fork of a process that may have started threads.
_forked = False

Work = Callable[[int, int, "Scratch"], None]
Worker = Callable[[], None]


class Scratch:
    """Keep memory of one worker from call to call: fresh pages cost more than what is computed in them.

    It lives as long as the thread that called. A worker keeps 20 to 26 MiB for FLUX.1's layers, and the first also the largest
    decoded weight of products with more tokens than `cpu_linear` takes: 216 MiB for 18432 x 3072 in float32.
    """

    def __init__(self) -> None:
        """Start without any."""
        self._bytes: dict[str, Tensor] = {}
        self._unpackers: dict[tuple[str, int], Callable[[Tensor], tuple[Tensor, Tensor]]] = {}

    def tensor(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """Return the memory of a name as a tensor on the CPU; its content is whatever was there."""
        size = dtype.itemsize * prod(shape)
        if name not in self._bytes or self._bytes[name].numel() < size:
            self._bytes[name] = torch.empty(size, dtype=torch.uint8, device="cpu")
        return self._bytes[name][:size].view(dtype).view(shape)

    def unpacker(self, fmt: BlockFormat, blocks: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Return the unpacker for so many blocks of a format, where there is any."""
        if (fmt.name, blocks) not in self._unpackers:
            if len(self._unpackers) == KEPT_UNPACKERS:
                self._unpackers.clear()
            self._unpackers[fmt.name, blocks] = fmt.unpacker(blocks)  # type: ignore[misc]
        return self._unpackers[fmt.name, blocks]


def scratch(worker: int = 0) -> Scratch:
    """Return the scratch of a worker for the calling thread.

    Signal handlers must not ask for it: they may interrupt its use.
    """
    kept = _local.__dict__.setdefault("scratches", [])
    while len(kept) <= worker:
        kept.append(Scratch())
    return kept[worker]


def share_rows(n: int, k: int, weights: int, work: Work, multiple: int = 1) -> None:
    """Do work(first row, end, scratch) for all of n rows, chunk by chunk.

    It works on as many threads as torch uses.

    Args:
        k: weights of a row.
        weights: of a chunk, about; at least a row.
        multiple: rows of a chunk are a multiple of this, but for the last chunk.

    Raises:
        what `work` raises, in the calling thread.
    """
    threads = torch.get_num_threads() if n * k > LEAST_WEIGHTS else 1
    chunks = max(1, min(_up(-(-n * k // weights), threads), n * k // LEAST_WEIGHTS))
    step = _up(max(1, -(-n // chunks)), multiple)
    left = iter(range(0, n, step))
    workers = iter([scratch(i) for i in range(threads)])
    lock = threading.Lock()
    raised: list[BaseException] = []

    def take_chunks() -> None:
        try:
            with lock:
                mine = next(workers)
            # Inference mode may write to tensors made inside and outside of it.
            with torch.inference_mode():
                while not raised:
                    with lock:
                        first = next(left, n)
                    if first >= n:
                        break
                    work(first, min(first + step, n), mine)
        # Raised below: even an interrupt must not unwind through the runtime's C.
        except BaseException as error:  # noqa: BLE001
            raised.append(error)

    if threads == 1 or step >= n:
        take_chunks()
    else:
        _run(take_chunks, threads, raised)
    if raised:
        # Still true, for workers that come late; and no cycle that keeps tensors alive.
        error, raised[:] = raised[0], [BaseException()]
        try:
            raise error
        finally:
            del error


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _run(worker: Worker, threads: int, raised: list) -> None:
    """Run a worker in each of so many threads, and wait for all.

    The caller's own is among them where it is torch's team.
    """
    team = None if _forked else _team()
    if team is None:
        _run_in_pool(worker, threads, raised)
    else:
        team(worker, threads)


def _run_in_pool(worker: Worker, threads: int, raised: list) -> None:
    """Run a worker in a pool's threads; what interrupts the waiting is added to `raised`.

    That stops the workers: then none uses the caller's scratches any more.
    """
    futures: list[Future] = []
    try:
        pool = _pool(threads)
        futures.extend(pool.submit(worker) for _ in range(threads))
    except BaseException as error:  # noqa: BLE001  raised by the caller
        raised.append(error)
    while not all(future.done() for future in futures):
        try:
            wait(futures)
        except BaseException as error:  # noqa: BLE001  raised by the caller
            raised.append(error)


@cache
def _team() -> Callable[[Worker, int], None] | None:
    """Return how to run a worker on torch's OpenMP team, or None where that cannot be reached.

    GOMP_parallel is what compilers call for `#pragma omp parallel` on Linux. Source: GCC's libgomp ABI.
    """
    if os.name != "posix" or "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    entry = "GOMP_parallel"
    try:
        # Looked up through torch's library, so that it is the runtime torch was linked to, not another package's.
        parallel = getattr(ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")), entry)
    except (OSError, AttributeError):
        return None
    first = getattr(ctypes.CDLL(None), entry, parallel)
    # A preloaded runtime: torch runs on that.
    if _address(first) != _address(parallel):
        return None
    callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    parallel.argtypes, parallel.restype = [callback, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None

    def run(worker: Worker, threads: int) -> None:
        ended = set()

        def work(_: int | None) -> None:
            worker()
            ended.add(threading.get_ident())

        parallel(callback(work), None, threads, 0)
        if threading.get_ident() not in ended:
            # A signal's exception came before `worker` could catch it: ctypes only prints it.
            raise KeyboardInterrupt

    return run


def _address(function: object) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Start threads in which torch's operations run on one thread.

    torch.set_num_threads is a setting of the calling thread, and the default of threads that have not computed yet; so the
    default is put back when all have started.
    """
    pool = ThreadPoolExecutor(threads, "flux_kernels", initializer=_compute_alone)
    started = threading.Barrier(threads + 1)
    try:
        for _ in range(threads):
            pool.submit(started.wait)
        started.wait()
    except BaseException:
        # Otherwise its threads would wait, and Python for them at its end.
        started.abort()
        pool.shutdown(wait=False)
        raise
    finally:
        torch.set_num_threads(threads)
    return pool


def _compute_alone() -> None:
    """Let this thread's operations run on it alone.

    The first question or operation of a thread takes over the process's default, so it must come before the setting.
    """
    torch.get_num_threads()
    torch.set_num_threads(1)


def _after_fork() -> None:
    """Leave the parent's threads behind.

    A child has neither its team, for which libgomp would wait forever, nor its pool.
    """
    global _forked
    _forked = True
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
