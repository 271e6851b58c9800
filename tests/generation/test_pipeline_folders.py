"""Pipeline folders: whole by their own index, of the file's model, usable with what is installed."""

from __future__ import annotations

import json
import re
import shutil

import diffusers
import pytest
import torch
import transformers

from flux_kernels import BackendUnavailable, GGUFError
from flux_kernels.generation.base_pipeline import base_sizes, check_base, check_classes, check_fit
from flux_kernels.generation.generate import generate
from flux_kernels.generation.text_pipelines import TEXT_PIPELINES

from .tiny_drawing import CALLS, ROWS, all_kinds, drawn, request
from .tiny_pipelines import WIDTH


@all_kinds
def test_parts_of_another_width_are_named(made, kind):
    files, row = made(kind), TEXT_PIPELINES[kind]
    sizes = base_sizes(files.base, kind)
    config = {**files.twin.config}
    check_fit(sizes, config)
    assert sizes.keys() == {fit.argument for fit in row.fits}
    for fit in row.fits:
        wanted, given = config[fit.argument], sizes[fit.argument][1]
        with pytest.raises(
            GGUFError, match=f"its {' and '.join(fit.parts)} gives {given}, the file's {fit.argument} is {wanted + 1}"
        ):
            check_fit(sizes, {**config, fit.argument: wanted + 1})


def test_a_file_and_a_folder_of_different_sizes_are_refused(made, tmp_path):
    files = made("QwenImagePipeline")
    base = tmp_path / "base"
    shutil.copytree(files.base, base)
    config = json.loads((base / "text_encoder" / "config.json").read_text())
    config["text_config"]["hidden_size"] = 2 * WIDTH
    (base / "text_encoder" / "config.json").write_text(json.dumps(config))
    with pytest.raises(GGUFError, match=f"its text_encoder gives {2 * WIDTH}, the file's joint_attention_dim is {WIDTH}"):
        generate(request(files, base=base))


def test_folders_are_whole_by_their_own_index(made, tmp_path):
    files, row = made("StableDiffusion3Pipeline"), ROWS["Stable Diffusion 3"]
    base = tmp_path / "base"
    shutil.copytree(files.base, base, ignore=shutil.ignore_patterns("tokenizer_2", "text_encoder_3"))
    with pytest.raises(FileNotFoundError, match=r"lacks text_encoder_3, tokenizer_2\. --base is a folder .* of a StableDiff"):
        check_base(base, row)
    index = json.loads((base / "model_index.json").read_text())
    shutil.copytree(files.base / "tokenizer_2", base / "tokenizer_2")
    # As diffusers writes a pipeline without its T5 encoder.
    without = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (base / "model_index.json").write_text(json.dumps({**index, **without}))
    assert check_base(base, row) == "StableDiffusion3Pipeline"
    assert base_sizes(base, "StableDiffusion3Pipeline").keys() == {"pooled_projection_dim", "in_channels"}
    for kind in TEXT_PIPELINES["StableDiffusion3Pipeline"].twins:
        (base / "model_index.json").write_text(json.dumps({**index, **without, "_class_name": kind}))
        assert check_base(base, row) == "StableDiffusion3Pipeline"
    # One that lists no VAE at all cannot decode.
    (base / "model_index.json").write_text(json.dumps({**{name: index[name] for name in index if name != "vae"}, **without}))
    shutil.rmtree(base / "vae")
    with pytest.raises(FileNotFoundError, match=r"lacks vae\."):
        check_base(base, row)


def test_a_folder_may_say_that_it_goes_without_t5(made, tmp_path):
    kind, files = "StableDiffusion3Pipeline", made("StableDiffusion3Pipeline")
    base = tmp_path / "base"
    shutil.copytree(files.base, base, ignore=shutil.ignore_patterns("text_encoder_3", "tokenizer_3"))
    index = json.loads((base / "model_index.json").read_text())
    none = {"text_encoder_3": None, "tokenizer_3": None}
    (base / "model_index.json").write_text(json.dumps({**index, **{name: [None, None] for name in none}}))
    pipeline = getattr(diffusers, kind).from_pretrained(files.base, transformer=files.twin, dtype=torch.float32, **none)
    expected = drawn(pipeline, **CALLS[kind])
    assert generate(request(files, base=base)).image.tobytes() == expected.tobytes()
    with pytest.raises(FileNotFoundError, match=r"lacks tokenizer_3\."):
        generate(request(files, base=base, t5=files.gguf))


def test_a_part_whose_class_cannot_be_used_here_is_named(made, tmp_path, monkeypatch):
    """Published folders of FLUX.2-dev have a PixtralProcessor, which needs torchvision."""
    base = tmp_path / "base"
    shutil.copytree(made("Flux2Pipeline").base, base)
    check_classes(base)
    index = json.loads((base / "model_index.json").read_text())

    class DummyObject(type):
        pass

    monkeypatch.setattr(transformers, "PixtralProcessor", DummyObject("PixtralProcessor", (), {"_backends": ["torchvision"]}))
    for name, sentence in (
        ("PixtralProcessor", "is a PixtralProcessor, which needs torchvision. Install it: pip install torchvision."),
        ("NoSuchTokenizer", "is a NoSuchTokenizer, which the installed transformers does not have. Update transformers."),
    ):
        (base / "model_index.json").write_text(json.dumps({**index, "tokenizer": ["transformers", name]}))
        with pytest.raises(BackendUnavailable, match=re.escape(f"The tokenizer of {base} {sentence}")):
            generate(request(made("Flux2Pipeline"), base=base))


def test_pipelines_that_edit_do_not_stand_in(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "QwenImageEditPipeline"}))
    with pytest.raises(
        FileNotFoundError, match=r"is a QwenImageEditPipeline, which generate does not draw with\. Give a QwenImageP"
    ):
        check_base(tmp_path, ROWS["Qwen-Image"])
