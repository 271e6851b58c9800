"""On a GPU: every model that draws from text draws diffusers' picture, whichever way it is offloaded."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="pipelines are diffusers' own")

from flux_kernels.generation.base_pipeline import load_pipeline
from flux_kernels.generation.generate import generate
from flux_kernels.generation.memory_plan import MODES
from flux_kernels.generation.request import Request

from ..generation.tiny_pipelines import TINY, write_base, write_packed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU in this machine"),
]
# Levels of 255, on average: float32 sums in another order, and convolutions in TF32 (2^-11 of values of about 1: 0.06 levels).
CLOSE = 0.5


@pytest.mark.parametrize("kind", TINY)
def test_every_offload_draws_what_diffusers_draws(tmp_path, kind):
    base, twin = write_base(kind, tmp_path / "base"), write_packed(kind, tmp_path / "file.gguf")
    size = {"width": 64, "height": 48}
    pictures = {}
    for offload in ("auto", *MODES):
        request = Request(tmp_path / "file.gguf", base, "a fox", **size, steps=2, seed=3, offload=offload, dtype=torch.float32)
        drawing = generate(request)
        pictures[offload] = np.asarray(drawing.image, dtype=np.float64)
        # Any GPU holds them.
        assert drawing.plan.offload == ("none" if offload == "auto" else offload)
    pipeline = load_pipeline(base, twin, torch.float32, kind=kind).to("cuda")
    parameters = {name: value for name, value in drawing.parameters.items() if name in _CALL}
    with torch.inference_mode():
        drawn = pipeline(generator=torch.Generator("cpu").manual_seed(3), **parameters).images[0]
    expected = np.asarray(drawn, dtype=np.float64)
    assert expected.std() > 5
    for offload, picture in pictures.items():
        assert np.abs(picture - expected).mean() < CLOSE, offload


_SIZES = ("width", "height", "num_inference_steps", "max_sequence_length")
_CALL = ("prompt", "negative_prompt", "guidance_scale", "true_cfg_scale", *_SIZES)
