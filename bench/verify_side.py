"""Be one side of `bench.verify`: time calls of the flux_kernels on the path, as JSON lines say.

The file of the working tree runs on both sides, so it uses only what older commits have: `ops.linear` and the formats.
"""

from __future__ import annotations

import json
import os
import sys
import time

import torch

# What an older commit may raise: this side's result. Anything else ends the process, which the parent reports as well.
FAILURES = (ImportError, AttributeError, LookupError, TypeError, ValueError, RuntimeError)


class Side:
    """Hold the call that is being compared."""

    def prepare(self, problem: str, format: str, compute: str, device: str, rows: list[int], out: str) -> dict:
        """Load a problem, run it once (which compiles), and write the outputs that the parent checks."""
        from flux_kernels import ops
        from flux_kernels.formats import FORMATS

        stored = torch.load(problem, weights_only=True)
        self.device, fmt = torch.device(device), FORMATS[format]
        planes = fmt.planes and self.device.type != "cpu"
        data = fmt.layout.to_planes(stored["data"]) if planes else stored["data"]
        data, x, bias = (tensor.to(self.device) for tensor in (data, stored["x"], stored["bias"]))
        if self.device.type == "cpu" and hasattr(os, "sched_setaffinity"):
            # Both sides on the same cores: they never run together, and a side on a busier core would look slower.
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: torch.get_num_threads()])
        backend = "torch" if self.device.type == "cpu" else "triton"
        self.call = lambda: ops.linear(x, data, format, bias, backend=backend, compute=compute, planes=planes)
        self.flush = _flusher(self.device)
        torch.save(self.call()[rows].cpu(), out)
        return {}

    def time(self, runs: int) -> dict:
        """Time some runs, in milliseconds."""
        return dict(times=[self._once() for _ in range(runs)])

    def _once(self) -> float:
        self.flush()
        if self.device.type != "cuda":
            start = time.perf_counter()
            self.call()
            return 1e3 * (time.perf_counter() - start)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def _flusher(device: torch.device):
    if device.type != "cuda":
        return lambda: None
    size = max(2 * torch.cuda.get_device_properties(device).L2_cache_size, 1 << 26)
    return torch.empty(size, dtype=torch.uint8, device=device).zero_


def main() -> None:
    """Answer each line with a line, until the input ends; a failure is an answer too."""
    side, answers = Side(), sys.stdout
    # What a library prints must not become an answer.
    sys.stdout = sys.stderr
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = getattr(side, order.pop("do"))(**order)
        except FAILURES as error:
            answer = dict(failure=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
