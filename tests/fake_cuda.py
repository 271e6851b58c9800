"""A simulated torch.cuda: a host clock, and a device that runs what is queued, in order.

It has events, sleeps and graphs. Times are microseconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

from flux_kernels.machine import gpu_clock

CYCLES = 1500  # a microsecond
# Launches outstanding at most, as on an H200; the host waits where one more is issued
QUEUE = 1022


class FakeCuda:
    """Hold both clocks and what was called, in order."""

    def __init__(self):
        self.host = 0.0  # now, on the host
        self.free = 0.0  # when the device is done with all that is queued
        self.ends: deque[float] = deque(maxlen=QUEUE)  # of the last launches
        self.calls: list[str] = []
        self.recording: list[float] | None = None
        self.Event = lambda enable_timing: Event(self)
        self.CUDAGraph = lambda: Graph(self)

    def launch(self, host: float, device: float, name: str = "launch") -> None:
        """Spend `host` on the host, then queue `device` of work."""
        self.calls.append(name)
        self.host += host
        if self.recording is not None:
            self.recording.append(device)
            return
        self.queue(device)

    def queue(self, device: float) -> None:
        """Queue a launch for the device, and wait for room first where there is none."""
        if len(self.ends) == QUEUE:
            self.host = max(self.host, self.ends[0])
        self.free = max(self.free, self.host) + device
        self.ends.append(self.free)

    def _sleep(self, cycles: int) -> None:
        self.launch(2, cycles / CYCLES, "sleep")

    def synchronize(self) -> None:
        self.wait(self.free)

    def wait(self, until: float) -> None:
        """Let the host wait for the device, which a capture forbids."""
        if self.recording is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.host = max(self.host, until)

    def device(self, device):
        return nullcontext()

    def stream(self, stream):
        return nullcontext()

    def Stream(self):
        return SimpleNamespace(wait_stream=lambda other: None)

    current_stream = Stream

    @contextmanager
    def graph(self, graph: Graph, stream=None) -> Iterator[None]:
        self.calls.append("capture")
        self.recording = graph.work
        try:
            yield
        finally:
            self.recording = None

    def perf_counter(self) -> float:
        return self.host / 1e6


class Event:
    """Be reached when the device is done with what was queued before."""

    def __init__(self, fake: FakeCuda):
        self.fake, self.time = fake, 0.0

    def record(self) -> None:
        self.fake.calls.append("event")
        self.fake.host += 1
        self.time = max(self.fake.free, self.fake.host)

    def query(self) -> bool:
        return self.time <= self.fake.host

    def synchronize(self) -> None:
        self.fake.wait(self.time)

    def elapsed_time(self, other: Event) -> float:
        return (other.time - self.time) / 1e3


class Graph:
    """Hold the work of a capture; a replay is one launch, whose kernels go through the same queue."""

    def __init__(self, fake: FakeCuda):
        self.fake, self.work = fake, []

    def replay(self) -> None:
        self.fake.calls.append("replay")
        self.fake.host += 8
        for device in self.work:
            self.fake.queue(device)

    def reset(self) -> None:
        self.fake.calls.append("reset")


def use(monkeypatch) -> FakeCuda:
    """Give the GPU clock a simulated device."""
    fake = FakeCuda()
    monkeypatch.setattr(gpu_clock, "cuda", fake)
    monkeypatch.setattr(gpu_clock, "perf_counter", fake.perf_counter)
    return fake
