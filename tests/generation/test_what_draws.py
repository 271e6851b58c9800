"""Models that draw no picture from text are refused by name, with the class that runs them."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import diffusers
import pytest

from flux_kernels import GGUFError
from flux_kernels.generation.generate import generate
from flux_kernels.generation.text_pipelines import check_draws

from .tiny_drawing import ROWS, request

# Of each variant that is refused: what its file is, and how it is loaded.
REFUSED = {
    "Wan2.2-T2V-A14B": "makes videos.* Load each of its files in Python: .* for diffusers' WanPipeline.",
    "Wan2.2-I2V-A14B": "makes videos.* Load each of its files in Python: .* for diffusers' WanImageToVideoPipeline.",
    "Wan2.2-TI2V-5B": "makes videos.* Load it in Python: .* for diffusers' WanPipeline or WanImageToVideoPipeline.",
    "Wan2.1-T2V-1.3B": "makes videos.* Load it in Python: .* for diffusers' WanPipeline.",
    "Wan2.1-I2V-14B": "makes videos.* Load it in Python: .* for diffusers' WanImageToVideoPipeline.",
    "Wan2.1-FLF2V-14B": "makes videos.* Load it in Python: .* for diffusers' WanImageToVideoPipeline.",
    "Qwen-Image-Layered": "does not draw from text alone.* Load it in Python: .* for diffusers' QwenImageLayeredPipeline.",
    "Qwen-Image-Edit-2511": "does not draw from text alone.* Load it in Python: .* for diffusers' QwenImageEditPlusPipeline.",
    "Qwen-Image-Edit": "does not draw from text alone.* Load it .* QwenImageEditPipeline or QwenImageEditPlusPipeline.",
}
VARIANTS = {variant.name: (row, variant) for row in ROWS.values() for variant in row.variants}


@pytest.mark.parametrize("name", VARIANTS)
def test_what_draws_no_picture_from_text_is_named(name):
    row, variant = VARIANTS[name]
    if name not in REFUSED:
        check_draws(row, variant.config, name)
        return
    with pytest.raises(GGUFError, match=rf"^This is a {re.escape(name)}, which {REFUSED[name][:-1]}\.$"):
        check_draws(row, variant.config, name)


def test_the_classes_of_variants_are_diffusers_own_and_in_the_row():
    for row, variant in VARIANTS.values():
        assert {*variant.pipelines} <= {*row.pipelines} and all(hasattr(diffusers, name) for name in variant.pipelines)


def test_a_pruned_model_is_of_the_kind_of_its_variant():
    row, edit = VARIANTS["Qwen-Image-Edit-2511"]
    with pytest.raises(
        GGUFError,
        match=r"a model of the kind of Qwen-Image-Edit-2511 \(Qwen-Image architecture with 40 blocks\), which does not",
    ):
        check_draws(row, {**edit.config, "num_layers": 40})


def test_a_file_that_is_named_as_an_editing_model_is_not_drawn_from_text(made, tmp_path, monkeypatch):
    files, row = made("QwenImagePipeline"), ROWS["Qwen-Image"]
    tiny = {name: files.twin.config[name] for name in ("num_layers", "num_attention_heads")}
    variants = [replace(one, config=tiny) for one in row.variants if one.name in ("Qwen-Image", "Qwen-Image-Edit")]
    monkeypatch.setitem(vars(row), "variants", tuple(variants))
    edit = tmp_path / "Qwen-Image-Edit-2509-Q8_0.gguf"
    edit.write_bytes(files.gguf.read_bytes())
    assert json.loads((files.base / "model_index.json").read_text())["_class_name"] == "QwenImagePipeline"
    with pytest.raises(GGUFError, match=r"This is a Qwen-Image-Edit, which does not draw from text alone.*EditPlusPipeline\."):
        generate(request(files, gguf=edit))
    assert generate(request(files, gguf=edit.rename(tmp_path / "qwen-image-2512-Q8_0.gguf"))).image.size == (64, 48)
