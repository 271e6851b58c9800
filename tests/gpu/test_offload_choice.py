"""On a GPU: every offload draws the same picture, and takes no more memory than the plan says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="pipelines are diffusers' own")

from flux_kernels import load_flux, load_t5, swap_linear
from flux_kernels.generation.base_pipeline import load_pipeline
from flux_kernels.generation.demo import Variant, write_variant
from flux_kernels.generation.embedded import PIPELINE_KWARGS, embedded_model_path
from flux_kernels.generation.memory_plan import MODES
from flux_kernels.generation.placement import STREAMED, measured_parts, place

from ..task_files import write_embedded_t5

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU in this machine"),
]
# Workspaces of cuBLAS and cuDNN, which stay allocated and do not grow with a model
LIBRARIES = 128 * 2**20
SIDE = PIPELINE_KWARGS["width"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offload")
    write_variant(Variant("Q8_0", "Q8_0"), folder / "flux.gguf")
    write_embedded_t5(folder / "t5.gguf")
    return folder


def pipeline(files):
    transformer = load_flux(files / "flux.gguf", dtype=torch.float32)
    t5 = load_t5(files / "t5.gguf", dtype=torch.float32)
    for model in (transformer, t5):
        swap_linear(model)
    return load_pipeline(embedded_model_path(), transformer, torch.float32, text_encoder_2=t5)


def draw(pipe) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a red seven", generator=torch.Generator().manual_seed(0), **PIPELINE_KWARGS).images[0]
    return np.asarray(picture, dtype=np.float64)


@pytest.fixture(scope="module")
def expected(files):
    return draw(pipeline(files))


@pytest.mark.parametrize("pin", [False, True])
@pytest.mark.parametrize("offload", ["auto", *MODES])
def test_every_offload_draws_the_same_within_the_plan(files, expected, offload, pin):
    if pin and offload not in STREAMED:
        pytest.skip("nothing is copied at every step there")
    pipe = pipeline(files)
    parts = measured_parts(pipe, SIDE, SIDE, 0, PIPELINE_KWARGS["max_sequence_length"])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    plan = place(pipe, offload, parts, SIDE, SIDE, pin=pin)
    picture = draw(pipe)
    assert torch.cuda.max_memory_allocated() - before <= plan.needs[plan.offload] + LIBRARIES
    assert offload != "auto" or plan.offload == "none"  # any GPU holds the embedded model
    # float32 on both sides, sums in another order: a step or two of 255 at the edges of the strokes
    assert np.abs(picture - expected).max() <= 4
