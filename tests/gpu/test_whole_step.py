"""One step at FLUX.1's true width on a GPU, with two blocks.

Every mode passes its gate, and its memory is counted.
"""

from __future__ import annotations

import pytest
import torch

from flux_kernels.benchmark.step.inputs import StepConfig
from flux_kernels.benchmark.step.timing import StepCase, measure_format

pytestmark = [
    pytest.mark.gpu,
    # Left out of bench.gpu_session, which measures whole steps and checks them itself
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU in this machine"),
]
CASE = StepCase("step", "512x512", StepConfig(num_layers=1, num_single_layers=1), 512, 512, 1, 512)


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K"])  # in file order, and as field planes
def test_every_mode_is_timed_at_the_true_width(name):
    providers = ["torch", "dequantize", "ours exact", "ours fp16_accumulate", "ours int8"]
    rows = list(measure_format(CASE, name, providers, torch.device("cuda"), torch.bfloat16, 2, lambda _: None))
    assert [row["provider"] for row in rows] == providers
    for row in rows:
        assert row["p50_ms"], row["note"]
        assert row["peak_bytes"] > row["weight_bytes"]
    plain, decoding, exact = rows[:3]
    assert exact["peak_bytes"] < plain["peak_bytes"] and exact["weight_bytes"] == decoding["weight_bytes"]
