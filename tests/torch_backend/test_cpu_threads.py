"""Rows shared among torch's own threads, or among a pool's where torch's cannot be reached."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch

from flux_kernels.formats import FORMATS, Packed
from flux_kernels.torch_backend import cpu_decode, cpu_threads

from ..kernels.samples import finite_rows

TEAM = cpu_threads._team()


@pytest.fixture(params=["team", "pool"])
def way(request, monkeypatch):
    if request.param == "pool":
        monkeypatch.setattr(cpu_threads, "_team", lambda: None)
    elif TEAM is None:
        pytest.skip("this torch has no OpenMP runtime that can be reached by name")
    monkeypatch.setattr(cpu_threads, "LEAST_WEIGHTS", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("n", [0, 1, 5, 64, 100])
@pytest.mark.parametrize("multiple", [1, 8])
def test_every_row_is_done_once(way, n, multiple):
    rows, sizes = torch.zeros(n, dtype=torch.int32), []

    def work(first, end, scratch):
        rows[first:end] += 1
        sizes.append((first, end))

    cpu_threads.share_rows(n, 10, 70, work, multiple)
    assert (rows == 1).all()
    assert all(first % multiple == 0 and (end % multiple == 0 or end == n) for first, end in sizes)


def test_threads_compute_alone_and_meet(way):
    """All workers are inside work at once, each with a scratch of its own.

    torch's operations use one thread there.
    """
    met, scratches, counts = threading.Barrier(3, timeout=20), set(), []

    def work(first, end, scratch):
        met.wait()
        scratches.add(id(scratch))
        before = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0
        torch.randn(1 << 18).exp()
        after = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0
        counts.append(after - before)
        met.wait()

    cpu_threads.share_rows(3, 1, 1, work)
    assert len(scratches) == 3 and counts == [0] * 3


def test_torchs_thread_count_stays(way):
    """For the caller and for threads that start later."""
    cpu_threads._pool.cache_clear()
    cpu_threads.share_rows(64, 1, 1, lambda first, end, scratch: torch.randn(1 << 16).exp())
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert torch.get_num_threads() == 3 and later == [3]


def test_threads_of_a_pool_compute_alone():
    """What a thread asks first takes over the process's default of 3."""
    before = torch.get_num_threads()
    cpu_threads._pool.cache_clear()
    try:
        counts = cpu_threads._pool(3).map(lambda _: (torch.randn(1 << 16).exp(), torch.get_num_threads())[1], range(9))
        assert list(counts) == [1] * 9
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_errors_reach_the_caller(way, error):
    """The first of them, and the other threads begin nothing new; the next call works."""
    done = []

    def work(first, end, scratch):
        if first >= 2:
            raise error("here")
        done.append(first)

    with pytest.raises(error, match="here"):
        cpu_threads.share_rows(1000, 1, 1, work)
    assert len(done) < 10
    cpu_threads.share_rows(4, 1, 1, lambda first, end, scratch: done.append(first))


@pytest.mark.skipif(TEAM is None, reason="this torch has no OpenMP runtime that can be reached by name")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_before_work_begins_is_not_lost():
    """A signal's handler may raise in the callback outside of what catches.

    ctypes prints that and goes on.
    """
    caller = threading.get_ident()

    def worker():
        if threading.get_ident() == caller:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TEAM(worker, 2)
    TEAM(lambda: None, 2)


def test_an_interrupted_wait_leaves_no_worker_behind(monkeypatch):
    """Workers of a pool use the caller's scratches: it goes on only when they have stopped, early."""
    monkeypatch.setattr(cpu_threads, "_team", lambda: None)
    monkeypatch.setattr(cpu_threads, "LEAST_WEIGHTS", 1)
    before, wait, waits, running, done = torch.get_num_threads(), cpu_threads.wait, [], [], []

    def interrupted(futures):
        waits.append(1)
        if len(waits) <= 2:
            raise KeyboardInterrupt
        wait(futures)

    def work(first, end, scratch):
        running.append(first)
        time.sleep(0.02)
        done.append(first)

    monkeypatch.setattr(cpu_threads, "wait", interrupted)
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            cpu_threads.share_rows(1000, 1, 1, work)
        assert len(waits) == 3 and len(running) == len(done) < 100
    finally:
        torch.set_num_threads(before)


def test_an_interrupted_start_of_a_pool_leaves_no_thread_waiting(monkeypatch):
    before, threads = torch.get_num_threads(), threading.active_count()

    class Interrupted(threading.Barrier):
        def wait(self, timeout=None):
            if threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(cpu_threads.threading, "Barrier", Interrupted)
    cpu_threads._pool.cache_clear()
    try:
        with pytest.raises(KeyboardInterrupt):
            cpu_threads._pool(5)
        assert torch.get_num_threads() == 5
        deadline = time.monotonic() + 20
        while threading.active_count() > threads and time.monotonic() < deadline:
            time.sleep(0.01)
        assert threading.active_count() <= threads
    finally:
        torch.set_num_threads(before)


def test_callers_do_not_share_scratches(way):
    """Four callers at once, each with a team: every result is right."""
    fmt, (data, weight) = FORMATS["Q6_K"], finite_rows("Q6_K", 40)
    wrong = []

    def caller():
        torch.set_num_threads(3)
        for _ in range(10):
            if not torch.equal(cpu_decode.dequantize(Packed(data, fmt), torch.float32), weight):
                wrong.append(1)

    callers = [threading.Thread(target=caller) for _ in range(4)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert not wrong


def test_unpackers_keep_little_and_follow_the_shape():
    """More shapes than are kept, there and back: every decode is right, and a worker's memory is bounded."""
    fmt, scratch = FORMATS["Q6_K"], cpu_threads.Scratch()
    for n in (1, 2, 3, 4, 5, 6, 5, 1):
        data, weight = finite_rows("Q6_K", n)
        out = torch.empty_like(weight)
        cpu_decode.decoder(fmt).rows(data, out, scratch)
        assert torch.equal(out, weight)
        assert len(scratch._unpackers) <= cpu_threads.KEPT_UNPACKERS


@pytest.mark.plain_memory  # filling it would need threads that do not survive the fork
@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is POSIX")
def test_a_forked_child_decodes(way):
    """Threads do not survive a fork; the child makes a pool of its own (data loaders fork)."""
    data, weight = finite_rows("Q6_K", 64)
    assert torch.equal(cpu_decode.dequantize(Packed(data, FORMATS["Q6_K"]), torch.float32), weight)
    child = os.fork()
    if child == 0:
        same = torch.equal(cpu_decode.dequantize(Packed(data, FORMATS["Q6_K"]), torch.float32), weight)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
