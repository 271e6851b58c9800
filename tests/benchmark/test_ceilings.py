"""Test the limits of calls: the best of every size, with the operations and bytes that it moved."""

from __future__ import annotations

import pytest
import torch

from flux_kernels.benchmark import ceilings
from flux_kernels.benchmark.ceilings import Ceilings, measure_ceilings


def test_the_best_run_of_the_best_size_counts(monkeypatch):
    """A product of 512 in 2 ms is faster than one of 1024 in 20 ms; slow runs do not lower the limit."""
    times = {
        "copy": [9.0, 4.0],
        "512": [3.0, 2.0],
        "512 transposed": [5.0, 9.0],
        "1024": [90.0, 20.0],
        "1024 transposed": [21.0],
    }
    seen = []
    monkeypatch.setattr(ceilings, "interleaved", lambda work, repeats, device: (seen.append(work), times)[1])
    best = measure_ceilings(torch.device("cpu"), torch.bfloat16)
    assert best == Ceilings(pytest.approx(2 * 2**26 / 4e6), pytest.approx(2 * 512**3 / 2e9), "bfloat16")
    products = {name: call() for name, call in seen[0].items() if name != "copy"}
    assert {name: (tuple(y.shape), y.dtype) for name, y in products.items()} == {
        name: ((int(name.split()[0]),) * 2, torch.bfloat16) for name in times if name != "copy"
    }


def test_shares_are_of_both_limits():
    """1e9 operations and 1e6 bytes in 1 ms: 1 TFLOP/s and 1 GB/s."""
    assert Ceilings(10.0, 4.0, "float32").shares(1.0, 1e9, 1e6) == dict(share_of_matmul=0.25, share_of_copy=0.1)
