"""A compiler that is killed costs its own candidate only; spilled registers are counted."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import ClassVar

import pytest

from flux_kernels.machine.tune_compile import KILLED, Compilers, Spills


def test_spills_are_those_of_the_kernels_that_a_launch_loaded(monkeypatch):
    """A second launch of the same code loads nothing, so the count of the first is kept."""

    class Kernel:
        device_caches: ClassVar[dict] = {}

    class Compiled:
        n_spills = 7

    monkeypatch.setattr("flux_kernels.machine.tune_compile._PRODUCTS", (Kernel,))
    spills = Spills()
    assert spills.after("a", lambda: Kernel.device_caches.setdefault(0, ({}, {}))[0].setdefault("key", Compiled())) == 7
    assert spills.after("a", lambda: None) == 7
    assert spills.after("b", lambda: None) == 0


class _Pool:
    """Run tasks here; a task may kill the pool, as a dead process does.

    All that was handed over and is not done goes with it.
    """

    started: ClassVar[list[_Pool]] = []

    def __init__(self, processes: int):
        self.dead = False
        self.started.append(self)

    def submit(self, function, *task):
        future: Future = Future()
        if self.dead:
            raise BrokenProcessPool
        self.dead = task[-1:] == ("kills",)
        if self.dead:
            future.set_exception(BrokenProcessPool())
        else:
            future.set_result(function(*task))
        return future

    def shutdown(self, **options):
        self.dead = True


def test_a_killed_compiler_costs_its_own_candidate_only():
    _Pool.started.clear()
    with Compilers(2, _Pool) as compilers:
        assert compilers.failures(lambda name: "", [("a",), ("kills",), ("b",)]) == ["", KILLED, ""]
        assert compilers.failures(lambda name: f"{name} failed", [("c",)]) == ["c failed"]
    assert all(pool.dead for pool in _Pool.started)


def _die_or_not(kill: bool) -> str:
    if kill:
        os.kill(os.getpid(), signal.SIGKILL)
    return ""


@pytest.mark.slow
def test_a_process_that_is_really_killed():
    with Compilers(2) as compilers:
        assert compilers.failures(_die_or_not, [(False,), (True,), (False,)]) == ["", KILLED, ""]


def _take(seconds: float) -> str:
    time.sleep(seconds)
    return ""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "alarm"), reason="this system has no alarms: a compiler that hangs is waited for")
def test_a_compiler_that_hangs_is_ended():
    """And costs its own candidate only."""
    with Compilers(2, longest=2) as compilers:
        assert compilers.failures(_take, [(0.0,), (60.0,), (0.0,)]) == ["", KILLED, ""]
