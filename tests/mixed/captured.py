"""A few states of the embedded model, captured once for all tests of this folder."""

from __future__ import annotations

from functools import cache

import torch

from flux_kernels.generation.base_pipeline import go_offline_quietly, load_pipeline
from flux_kernels.generation.embedded import EMBEDDED_PROMPTS, PIPELINE_KWARGS, embedded_model_path

SIZES = ((64, 64), (48, 80))
SETTINGS = {**PIPELINE_KWARGS, "num_inference_steps": 4}
COUNT = 6


@cache
def embedded_pipeline():
    """Return the embedded pipeline in float32."""
    from flux_kernels.generation.embedded import embedded_transformer

    go_offline_quietly()
    return load_pipeline(embedded_model_path(), embedded_transformer().float(), torch.float32)


@cache
def states():
    """Return COUNT states of two sizes and four steps."""
    from flux_kernels.measure.capture import capture

    return capture(embedded_pipeline(), EMBEDDED_PROMPTS, COUNT, settings=SETTINGS, sizes=SIZES, seed=3)
