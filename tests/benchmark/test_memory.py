"""Test the peak of a call's memory: what it held at one time, scratch included, nothing from before."""

from __future__ import annotations

import pytest
import torch

from flux_kernels.benchmark.memory import extra_peak
from flux_kernels.torch_backend import cpu_threads

CPU = torch.device("cpu")
MB = 250_000  # float32 numbers in 10^6 bytes
HELD = torch.ones(8 * MB)


def test_the_peak_is_what_was_held_at_one_time(capfd):
    """4 + 2 MB at once, then 2 + 1; what is freed of the time before counts as little as what stays of it."""

    def work():
        first = torch.ones(4 * MB)
        second = torch.ones(2 * MB)
        del first
        return second + 0, torch.ones(MB)

    assert extra_peak(work, CPU) == 6_000_000
    assert extra_peak(lambda: HELD[:10].sum(), CPU) < 1000
    assert capfd.readouterr().err == ""


def test_scratch_of_earlier_calls_is_counted_again():
    def work():
        return cpu_threads.scratch().tensor("made up", torch.float32, 1000, 1000)

    work()
    assert extra_peak(work, CPU) >= 4_000_000


def test_an_error_comes_through(capfd):
    with pytest.raises(ZeroDivisionError):
        extra_peak(lambda: 1 / 0, CPU)


def test_a_device_that_does_not_tell_is_run_all_the_same():
    ran = []
    assert extra_peak(lambda: ran.append(1), torch.device("meta")) is None and ran == [1]
