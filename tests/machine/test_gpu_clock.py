"""The GPU clock measures what a simulated device takes, whatever the host takes to issue it."""

from __future__ import annotations

import pytest
import torch

from flux_kernels.machine.clock import graph_replayed, interleaved
from flux_kernels.machine.gpu_clock import GpuClock, Replay

from ..fake_cuda import CYCLES, use

GPU = torch.device("cuda", 0)


@pytest.fixture
def cuda(monkeypatch):
    return use(monkeypatch)


def launching(cuda, count: int, host: float, device: float):
    def run():
        for _ in range(count):
            cuda.launch(host, device)

    return run


def test_a_short_call_is_measured_as_the_device_runs_it(cuda):
    """Ten launches of 30 us on the host and 5 us on the device take 50 us.

    Two events around them would measure 300.
    """
    times = interleaved({"short": launching(cuda, 10, 30, 5)}, 4, GPU)["short"]
    assert times == pytest.approx([0.05] * 4)
    start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    cuda.synchronize()
    start.record()
    launching(cuda, 10, 30, 5)()
    end.record()
    assert start.elapsed_time(end) > 0.3


def test_the_sleep_comes_first_then_what_runs_before_then_the_events(cuda):
    clock = GpuClock(GPU)
    cuda.calls.clear()
    time = clock.milliseconds(launching(cuda, 1, 10, 20), before=lambda: cuda.launch(5, 35, "flush"))
    assert cuda.calls == ["sleep", "flush", "event", "launch", "event"]
    assert time == pytest.approx(0.02)


def test_the_sleep_is_counted_in_the_cards_cycles(cuda):
    clock = GpuClock(GPU)
    assert clock._cycles == pytest.approx(1000 * CYCLES, rel=0.01)


def test_a_run_that_the_device_overtook_is_repeated_behind_a_longer_sleep(cuda):
    """1,000 launches of 8 us on the host: a sleep of 1 ms is too short, one of 16 ms serves, and is kept."""
    clock, run = GpuClock(GPU), launching(cuda, 1000, 8, 1)
    cuda.calls.clear()
    assert clock.milliseconds(run) == pytest.approx(1.0)
    assert cuda.calls.count("sleep") == 2
    cuda.calls.clear()
    assert clock.milliseconds(run) == pytest.approx(1.0)
    assert cuda.calls.count("sleep") == 1


def test_a_function_that_waits_for_the_device_is_timed_without_a_sleep_and_said_once(cuda, caplog):
    clock = GpuClock(GPU)

    def run():
        cuda.launch(10, 50)
        cuda.synchronize()

    assert [clock.milliseconds(run) for _ in range(3)] == pytest.approx([0.061] * 3)
    assert len(caplog.records) == 1 and "may include the host's" in caplog.text
    cuda.calls.clear()
    clock.milliseconds(run)
    assert "sleep" not in cuda.calls


def test_a_function_too_slow_to_be_queued_is_run_twice_not_seven_times(cuda):
    clock = GpuClock(GPU)
    cuda.calls.clear()
    clock.milliseconds(launching(cuda, 1, 40_000, 10))
    assert cuda.calls.count("launch") == 2


def test_a_function_that_waits_for_the_device_is_run_four_times_not_eight(cuda):
    """Three sleeps, each twice what issuing took before, are followed by a run without one.

    A longer one could not serve either.
    """
    clock = GpuClock(GPU)

    def run():
        cuda.launch(10, 50)
        cuda.synchronize()

    cuda.calls.clear()
    clock.milliseconds(run)
    assert (cuda.calls.count("sleep"), cuda.calls.count("launch")) == (3, 4)


@pytest.mark.parametrize("device", [5.0, 50.0])
def test_a_graph_that_fills_the_queue_is_timed_rightly_soon_and_without_a_warning(cuda, caplog, device):
    """A replay of 3,342 kernels cannot be queued behind a sleep, but no host is between its kernels."""
    with Replay(launching(cuda, 3342, 8, device), GPU) as replay:
        clock = GpuClock(GPU)
        cuda.calls.clear()
        with caplog.at_level("INFO"):
            assert clock.milliseconds(replay) == pytest.approx(3342 * device / 1e3)
        assert cuda.calls.count("replay") <= 4
        assert [record.levelname for record in caplog.records] == ["INFO"] and "to issue behind a sleep" in caplog.text
        cuda.calls.clear()
        assert clock.milliseconds(replay) == pytest.approx(3342 * device / 1e3)
        assert cuda.calls.count("replay") == 1


def test_an_eager_function_that_fills_the_queue_is_warned_of(cuda, caplog):
    """The host may be late in it: nothing tells that it was not."""
    clock = GpuClock(GPU)
    cuda.calls.clear()
    assert clock.milliseconds(launching(cuda, 3342, 8, 50)) == pytest.approx(3342 * 0.05, rel=1e-3)
    assert cuda.calls.count("launch") == 2 * 3342
    assert len(caplog.records) == 1 and "may include the host's" in caplog.text


def test_graphs_are_captured_once_and_replayed_behind_a_flush(cuda):
    times = graph_replayed({"one": launching(cuda, 10, 30, 5)}, 4, GPU, before=lambda: cuda.launch(5, 35, "flush"))
    assert times["one"] == pytest.approx([0.05] * 4)
    assert cuda.calls.count("capture") == cuda.calls.count("reset") == 1
    # After the ten launches of the capture.
    replayed = cuda.calls[cuda.calls.index("capture") + 11 : -1]
    assert replayed == ["sleep", "flush", "event", "replay", "event"] * 4


def test_warming_up_comes_before_a_capture(cuda):
    graph_replayed({"one": launching(cuda, 1, 30, 5)}, 3, GPU)
    assert cuda.calls.index("launch") < cuda.calls.index("capture")


def test_what_cannot_be_captured_has_no_graph_time_and_a_reason(cuda, caplog):
    def reads_back():
        cuda.launch(10, 10)
        cuda.synchronize()

    times = graph_replayed({"bad": reads_back, "good": launching(cuda, 1, 10, 10)}, 3, GPU)
    assert times["bad"] is None and times["good"] == pytest.approx([0.01] * 3)
    assert "bad is not captured" in caplog.text and "RuntimeError: operation not permitted" in caplog.text


def test_there_are_no_graphs_without_cuda():
    assert graph_replayed({"one": lambda: None}, 3, torch.device("cpu")) == {"one": None}
