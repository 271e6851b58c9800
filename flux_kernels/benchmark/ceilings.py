"""Measure what a device can do at best: a copy's bandwidth, and the rate of torch's own product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ..compute import dtype_name
from ..machine.clock import interleaved

_COPY_BYTES = {"cuda": 1 << 29, "cpu": 1 << 26}
_SIDES = {"cuda": (4096, 8192), "cpu": (512, 1024)}  # of square products; the fastest of them depends on the machine


@dataclass(frozen=True)
class Ceilings:
    """Hold the best rates: GB/s of a copy (read plus written), TFLOP/s of torch's matmul in `dtype`.

    A call may pass them all the same: on a machine whose clock or other work changes, or whose caches hold its operands.
    """

    copy_gb_s: float
    matmul_tflops: float
    dtype: str

    def shares(self, milliseconds: float, flops: float, nbytes: float) -> dict[str, float]:
        """Return a call's shares of both ceilings: of its operations, and of the bytes it must move at least."""
        seconds = milliseconds / 1e3
        return dict(
            share_of_matmul=round(flops / seconds / 1e12 / self.matmul_tflops, 4),
            share_of_copy=round(nbytes / seconds / 1e9 / self.copy_gb_s, 4),
        )


def measure_ceilings(device: torch.device, dtype: torch.dtype, repeats: int = 9) -> Ceilings:
    """Time a large copy and square products of several sizes, both ways round; keep the best run of each.

    Medians will not do: on a busy CPU the median of one size was passed by half, by torch's own layer.
    """
    source = torch.randint(0, 256, (_COPY_BYTES[device.type],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    work: dict[str, Callable[[], object]] = dict(copy=lambda: target.copy_(source))
    for side in _SIDES[device.type]:
        a, b = (torch.randn(side, side, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
        # A linear layer has the second operand transposed.
        work |= {f"{side}": partial(torch.matmul, a, b), f"{side} transposed": partial(torch.matmul, a, b.T)}
    best = {name: min(times) for name, times in interleaved(work, repeats, device).items()}
    rates = [2 * int(name.split()[0]) ** 3 / time / 1e9 for name, time in best.items() if name != "copy"]
    return Ceilings(2 * source.numel() / best["copy"] / 1e6, max(rates), dtype_name(dtype))
