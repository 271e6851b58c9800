"""Title and folder of a file choose how its states are drawn, and what is counted of memory."""

from __future__ import annotations

import json
import shutil
from functools import cache

import pytest
import torch

from flux_kernels.errors import GGUFError
from flux_kernels.measure.measured_model import base_of, find_source, open_pipeline
from flux_kernels.measure.memory import memory_needs
from flux_kernels.models import save_gguf

from ..generation.tiny_pipelines import tiny_transformer, write_base

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """Return a function that opens a tiny file of a class under a name, with its base folder."""

    @cache
    def folder_of(kind: str):
        folder = tmp_path_factory.mktemp(kind)
        save_gguf(tiny_transformer(kind), folder / "model.gguf")
        write_base(kind, folder / "base")
        return folder

    def source(kind: str, name: str):
        folder = folder_of(kind)
        if name != "model.gguf":
            shutil.copy(folder / "model.gguf", folder / name)
        return find_source(gguf=folder / name, base=folder / "base")

    return source


@pytest.mark.parametrize(
    ("name", "steps", "scale", "batch"),
    [("z_image_turbo.gguf", 8, 0.0, 1), ("z-image-base.gguf", 50, 5.0, 2), ("model.gguf", 8, 0.0, 1)],
)
def test_the_title_s_settings_are_drawn_with_and_counted(named, name, steps, scale, batch):
    source = named("ZImagePipeline", name)
    _, settings = open_pipeline(source, tiny_transformer("ZImagePipeline"))
    assert (settings["num_inference_steps"], settings["guidance_scale"], settings["height"]) == (steps, scale, 1024)
    needs = memory_needs(source, source.config, CPU, torch.float32, [(64, 48)], capturing=False)
    # Three hidden states of 12 picture and 512 text tokens.
    assert needs["hidden states of 1 pictures"] == batch * 3 * 524 * 384 * 4


def test_a_title_and_a_folder_of_two_models_are_refused(named):
    source = named("Krea2Pipeline", "krea-2-raw.gguf")
    assert json.loads((source.base / "model_index.json").read_text())["is_distilled"]
    with pytest.raises(
        GGUFError, match=r"By its name krea-2-raw\.gguf is Krea 2 Raw, and .* says that its model is distilled\."
    ):
        base_of(source)
    assert base_of(named("Krea2Pipeline", "krea-2-turbo.gguf"))[1] == "Krea2Pipeline"
