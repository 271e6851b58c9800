"""Share rows among the threads that torch itself computes with on a CPU.

Threads of our own would meet torch's: OpenMP's workers spin for some 5 ms after each operation before they sleep, and take half
of two cores from whoever computes meanwhile (docs/decisions/torch-backend-on-cpu.md has the times). So the work is given to
that very team where torch's OpenMP runtime can be reached, and to a pool otherwise. Within either, torch computes on one thread.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .formats import BlockFormat

LEAST_WEIGHTS = 1 << 16  # of a chunk: giving one to a thread costs tens of microseconds
KEPT_UNPACKERS = 4  # chunk sizes whose memory a worker keeps: a full and a last chunk of two layer shapes
_local = threading.local()
_forked = False  # whether this process is a fork of one that may have started threads

Work = Callable[[int, int, "Scratch"], None]
Worker = Callable[[], None]


class Scratch:
    """Keep memory of one worker from call to call: fresh pages cost more than what is computed in them."""

    def __init__(self) -> None:
        """Start without any."""
        self._bytes: dict[str, Tensor] = {}
        self._unpackers: dict[tuple[str, int], Callable[[Tensor], tuple[Tensor, Tensor]]] = {}

    def tensor(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """Return the memory of a name as a tensor on the CPU; its content is whatever was there."""
        size = dtype.itemsize
        for length in shape:
            size *= length
        if name not in self._bytes or self._bytes[name].numel() < size:
            self._bytes[name] = torch.empty(size, dtype=torch.uint8, device="cpu")
        return self._bytes[name][:size].view(dtype).view(shape)

    def unpacker(self, fmt: BlockFormat, blocks: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Return the unpacker for so many blocks of a format that has one."""
        if (fmt.name, blocks) not in self._unpackers:
            if len(self._unpackers) == KEPT_UNPACKERS:
                self._unpackers.clear()
            self._unpackers[fmt.name, blocks] = fmt.unpacker(blocks)  # type: ignore[misc]
        return self._unpackers[fmt.name, blocks]


def scratch(worker: int = 0) -> Scratch:
    """Return the scratch of a worker for the calling thread."""
    kept = _local.__dict__.setdefault("scratches", [])
    while len(kept) <= worker:
        kept.append(Scratch())
    return kept[worker]


def share_rows(n: int, k: int, weights: int, work: Work, multiple: int = 1) -> None:
    """Do work(first row, end, scratch) for all of n rows, chunk by chunk, on as many threads as torch uses.

    Args:
        k: weights of a row.
        weights: of a chunk, about; at least a row.
        multiple: rows of a chunk are a multiple of this, but for the last one.

    Raises:
        what `work` raises, in the calling thread.
    """
    threads = torch.get_num_threads() if n * k > LEAST_WEIGHTS else 1
    chunks = max(1, min(_up(-(-n * k // weights), threads), n * k // LEAST_WEIGHTS))
    step = _up(max(1, -(-n // chunks)), multiple)
    left = iter(range(0, n, step))
    workers = iter([scratch(i) for i in range(threads)])
    lock, raised = threading.Lock(), []

    def take_chunks() -> None:
        try:
            with lock:
                mine = next(workers)
            with torch.inference_mode():  # which may write to tensors made inside and outside of it
                while not raised:
                    with lock:
                        first = next(left, n)
                    if first >= n:
                        break
                    work(first, min(first + step, n), mine)
        except BaseException as error:  # noqa: BLE001  raised below; even an interrupt must not unwind through the runtime's C
            raised.append(error)

    if threads == 1 or step >= n:
        take_chunks()
    else:
        _run(take_chunks, threads)
    if raised:
        raise raised[0]


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _run(worker: Worker, threads: int) -> None:
    """Run a worker in each of so many threads, the caller's own among them where it is torch's team."""
    team = None if _forked else _team()
    if team is None:
        list(_pool(threads).map(lambda _: worker(), range(threads)))
    else:
        team(worker, threads)


@cache
def _team() -> Callable[[Worker, int], None] | None:
    """Return how to run a worker on torch's OpenMP team, or None where that cannot be reached.

    GOMP_parallel is what compilers call for `#pragma omp parallel` on Linux. Source: GCC's libgomp ABI.
    """
    if os.name != "posix" or "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    try:
        # Looked up through torch's library, so that it is the runtime torch was linked to, not another package's.
        parallel = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return None
    callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    parallel.argtypes, parallel.restype = [callback, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return lambda worker, threads: parallel(callback(lambda _: worker()), None, threads, 0)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Start threads in which torch's operations run on one thread.

    torch.set_num_threads is a setting of the calling thread, and the default of threads that have not computed yet; so the
    default is put back when all have started.
    """
    pool = ThreadPoolExecutor(threads, "flux_kernels", initializer=_compute_alone)
    started = threading.Barrier(threads + 1)
    for _ in range(threads):
        pool.submit(started.wait)
    started.wait()
    torch.set_num_threads(threads)
    return pool


def _compute_alone() -> None:
    """Let this thread's operations run on it alone.

    The first question or operation of a thread takes over the process's default, so it must come before the setting.
    """
    torch.get_num_threads()
    torch.set_num_threads(1)


def _after_fork() -> None:
    """Leave the parent's threads behind: a child has neither its team, for which libgomp would wait forever, nor its pool."""
    global _forked
    _forked = True
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
