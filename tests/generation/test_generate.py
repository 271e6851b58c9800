"""The decisions inside `generate`: LoRA arguments, defaults by model, sizes by picture, base folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from flux_kernels import FormatError, GGUFError
from flux_kernels.generation.base_pipeline import base_sizes, check_base, check_fit
from flux_kernels.generation.embedded import PIPELINE_KWARGS, embedded_model_path
from flux_kernels.generation.generate import Drawing, check_out, save_png
from flux_kernels.generation.inspect_file import FileFacts
from flux_kernels.generation.job import Job, call_settings
from flux_kernels.generation.request import Lora, Request
from flux_kernels.generation.tasks import CANNY, DEPTH, FILL, IMAGE, KONTEXT
from flux_kernels.models.architectures.flux1 import FLUX1


@pytest.mark.parametrize(
    ("text", "file", "scale"),
    [
        ("style.safetensors", "style.safetensors", 1.0),
        ("style.safetensors:0.8", "style.safetensors", 0.8),
        ("a/b:c.safetensors:-1", "a/b:c.safetensors", -1.0),
        (r"C:\loras\style.safetensors", r"C:\loras\style.safetensors", 1.0),
        (r"C:\loras\style.safetensors:2", r"C:\loras\style.safetensors", 2.0),
    ],
)
def test_lora_argument(text, file, scale):
    assert Lora.parse(text) == Lora(Path(file), scale)


def request(**changes) -> Request:
    return Request(**{"gguf": Path("x.gguf"), "base": Path("elsewhere"), "prompt": "a fox", **changes})


def job(guidance: bool = True, **changes) -> Job:
    return Job(FileFacts("x.gguf", 0, architecture="FLUX.1", config={"guidance_embeds": guidance}), **changes)


def test_defaults_follow_the_model():
    dev, schnell = call_settings(request(), job()), call_settings(request(), job(guidance=False))
    assert (dev["num_inference_steps"], dev["guidance_scale"], dev["max_sequence_length"]) == (28, 3.5, 512)
    assert (schnell["num_inference_steps"], schnell["guidance_scale"], schnell["max_sequence_length"]) == (4, 0.0, 256)
    assert call_settings(request(base=embedded_model_path()), job()) == PIPELINE_KWARGS


@pytest.mark.parametrize(
    ("task", "guidance", "steps"), [(FILL, 30, 50), (CANNY, 30, 28), (DEPTH, 10, 28), (KONTEXT, 2.5, 28), (IMAGE, 3.5, 28)]
)
def test_defaults_follow_the_task(task, guidance, steps):
    settings = call_settings(request(), job(task=task))
    assert (settings["guidance_scale"], settings["num_inference_steps"]) == (guidance, steps)


# Task, size of the picture, what is asked for -> size of the result.
SIZES = [
    (FILL, (640, 480), {}, (640, 480)),
    (FILL, (4000, 3000), {}, (1184, 880)),
    (KONTEXT, (64, 64), {}, (1024, 1024)),
    (KONTEXT, (300, 200), {}, (1248, 832)),
    (FILL, (640, 480), {"width": 320}, (320, 240)),
    (FILL, (640, 480), {"height": 960}, (1280, 960)),
    (FILL, (640, 480), {"width": 512, "height": 512}, (512, 512)),
    (IMAGE, (3000, 4), {}, (3008, 16)),
]


@pytest.mark.parametrize(("task", "picture", "asked", "size"), SIZES)
def test_the_result_is_as_large_as_its_picture(task, picture, asked, size):
    settings = call_settings(request(**asked), job(task=task, pictures={"image": Image.new("L", picture)}))
    assert (settings["width"], settings["height"]) == size


def test_what_is_asked_for_wins():
    settings = call_settings(request(width=512, steps=9, guidance=0.0, negative="rain", true_cfg=2.0), job())
    asked = {"width": 512, "num_inference_steps": 9, "guidance_scale": 0.0, "negative_prompt": "rain", "true_cfg_scale": 2.0}
    assert settings.items() >= asked.items() and settings["height"] == 1024
    assert "true_cfg_scale" not in call_settings(request(true_cfg=2.0), job())


@pytest.fixture
def base(tmp_path):
    copy = tmp_path / "base"
    shutil.copytree(embedded_model_path(), copy, ignore=shutil.ignore_patterns("reader.safetensors"))
    return copy


def test_base_needs_no_transformer(base):
    shutil.rmtree(base / "transformer")
    check_base(base, FLUX1)


PARTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")


@pytest.mark.parametrize("part", PARTS)
def test_base_that_lacks_a_part_is_named(base, part):
    shutil.rmtree(base / part)
    with pytest.raises(FileNotFoundError, match=rf"lacks {part}\. --base is a folder in the diffusers layout.*hf download"):
        check_base(base, FLUX1)


def test_base_of_another_pipeline_is_named(base):
    (base / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(FileNotFoundError, match="is a StableDiffusionPipeline, not a FLUX.1 pipeline"):
        check_base(base, FLUX1)


def test_a_t5_file_stands_in_for_the_folder(base):
    shutil.rmtree(base / "text_encoder_2")
    check_base(base, FLUX1, given=("text_encoder_2",))
    with pytest.raises(FileNotFoundError, match=r"lacks text_encoder_2\..* Or give the T5 encoder as a GGUF file with --t5\.$"):
        check_base(base, FLUX1)


def test_parts_that_do_not_fit_are_named_before_they_are_read(base):
    config = {"joint_attention_dim": 256, "pooled_projection_dim": 256, "in_channels": 64, "out_channels": None}
    check_fit(base_sizes(base, "FluxPipeline"), config)
    check_fit(base_sizes(base, "FluxPipeline"), {**config, "in_channels": 384, "out_channels": 64})
    with pytest.raises(
        GGUFError, match="text_encoder_2 gives 256, the file's joint_attention_dim is 4096; .*out_channels is 16"
    ):
        check_fit(base_sizes(base, "FluxPipeline"), {**config, "joint_attention_dim": 4096, "in_channels": 16})
    with pytest.raises(GGUFError, match="its text_encoder_2 gives 4096"):
        check_fit(base_sizes(base, "FluxPipeline", t5_width=4096), config)
    (base / "vae" / "config.json").write_text("{")
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing or no JSON"):
        base_sizes(base, "FluxPipeline")


def test_where_the_picture_goes_is_checked_before_loading(tmp_path):
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"weights")
    request = Request(gguf=gguf, base=tmp_path, prompt="", loras=[Lora(gguf)])
    wrong = (
        (tmp_path, "is a folder"),
        (gguf / "out.png", "there is no folder"),
        (tmp_path / "new/x.png", "there is no folder"),
    )
    for out, sentence in wrong:
        with pytest.raises(FormatError, match=f"--out .*{sentence}"):
            check_out(out, request)
    with pytest.raises(GGUFError, match="read by this"):
        check_out(gguf, request)
    check_out(tmp_path / "out.png", request)
    check_out(Path("/dev/null"), request)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"] and gguf.read_bytes() == b"weights"


def test_a_picture_that_cannot_be_written_leaves_the_last_one(tmp_path, monkeypatch):
    out = tmp_path / "out.png"
    drawing = Drawing(Image.new("RGB", (16, 16)), {}, None, None, "", 0.0, 0.0)
    save_png(drawing, out)
    before = out.read_bytes()

    def fails(self, path, *args, **kwargs):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fails)
    with pytest.raises(OSError, match="No space"):
        save_png(drawing, out)
    assert out.read_bytes() == before and list(tmp_path.iterdir()) == [out]
