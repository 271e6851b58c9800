"""Drawing with the tiny pipelines: one request, and the same call as a user of diffusers writes it."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from flux_kernels.generation.request import Request
from flux_kernels.models.architectures import ARCHITECTURES

from .tiny_pipelines import TINY

ROWS = {row.name: row for row in ARCHITECTURES}
all_kinds = pytest.mark.parametrize("kind", TINY)
STEPS = 2
# What a user of diffusers writes, by hand: the model's own settings.
CALLS = {
    "Flux2Pipeline": {"guidance_scale": 4.0, "max_sequence_length": 512},
    "Flux2KleinPipeline": {"guidance_scale": 1.0, "max_sequence_length": 512},
    "ChromaPipeline": {"guidance_scale": 3.0, "max_sequence_length": 512},
    "Krea2Pipeline": {"guidance_scale": 0.0, "max_sequence_length": 512},
    "ZImagePipeline": {"guidance_scale": 0.0, "max_sequence_length": 512},
    "QwenImagePipeline": {"true_cfg_scale": 4.0, "negative_prompt": " ", "max_sequence_length": 512},
    "StableDiffusion3Pipeline": {"guidance_scale": 3.5, "max_sequence_length": 256},
}


def request(files, **more) -> Request:
    given = {"width": 64, "height": 48, "steps": STEPS, "seed": 3, "backend": "torch", "dtype": torch.float32}
    return Request(**{"gguf": files.gguf, "base": files.base, "prompt": "a fox", **given, **more})


def drawn(pipeline: Any, **call: Any) -> Image.Image:
    """Draw what `request` asks for with a pipeline of diffusers."""
    pipeline.set_progress_bar_config(disable=True)
    size = {"width": 64, "height": 48, "num_inference_steps": STEPS}
    with torch.inference_mode():
        return pipeline(prompt="a fox", generator=torch.Generator("cpu").manual_seed(3), **size, **call).images[0]


def by_diffusers(kind: str, files: Any, **call: Any) -> Image.Image:
    """Draw with diffusers alone: the folder, and the decoded weights of the file."""
    pipeline = getattr(diffusers, kind).from_pretrained(files.base, transformer=files.twin, dtype=torch.float32)
    return drawn(pipeline, **call)
