"""The decisions inside `generate`: LoRA arguments, defaults by model, offload by memory, what a base folder must hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from flux_kernels import GGUFError
from flux_kernels.base_pipeline import PARTS, check_base, check_fit
from flux_kernels.embedded import PIPELINE_KWARGS, embedded_model_path
from flux_kernels.generate import Lora, Request, call_settings, choose_offload
from flux_kernels.inspect_file import FileFacts

GIB = 2**30


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


@pytest.mark.parametrize(
    ("free", "chosen"),
    [(30, "none"), (24.5, "none"), (24.4, "model"), (12.5, "model"), (12.4, "sequential"), (2, "sequential")],
)
def test_offload_by_free_memory(free, chosen):
    sizes = [12 * GIB, 10 * GIB, 2 * GIB]  # transformer, T5, the rest; half a GiB of overhead
    assert choose_offload(sizes, GIB // 2, int(free * GIB)) == chosen


def request(**changes) -> Request:
    return Request(**{"gguf": Path("x.gguf"), "base": Path("elsewhere"), "prompt": "a fox", **changes})


def facts(guidance: bool) -> FileFacts:
    return FileFacts("x.gguf", 0, config={"guidance_embeds": guidance})


def test_defaults_follow_the_model():
    dev, schnell = call_settings(request(), facts(True)), call_settings(request(), facts(False))
    assert (dev["num_inference_steps"], dev["guidance_scale"], dev["max_sequence_length"]) == (28, 3.5, 512)
    assert (schnell["num_inference_steps"], schnell["guidance_scale"], schnell["max_sequence_length"]) == (4, 0.0, 256)
    assert call_settings(request(base=embedded_model_path()), facts(True)) == PIPELINE_KWARGS


def test_what_is_asked_for_wins():
    settings = call_settings(request(width=512, steps=9, guidance=0.0, negative="rain", true_cfg=2.0), facts(True))
    asked = {"width": 512, "num_inference_steps": 9, "guidance_scale": 0.0, "negative_prompt": "rain", "true_cfg_scale": 2.0}
    assert settings.items() >= asked.items() and settings["height"] == 1024
    assert "true_cfg_scale" not in call_settings(request(true_cfg=2.0), facts(True))


@pytest.fixture
def base(tmp_path):
    copy = tmp_path / "base"
    shutil.copytree(embedded_model_path(), copy, ignore=shutil.ignore_patterns("*.safetensors"))
    return copy


def test_base_needs_no_transformer(base):
    shutil.rmtree(base / "transformer")
    check_base(base)


@pytest.mark.parametrize("part", PARTS)
def test_base_that_lacks_a_part_is_named(base, part):
    shutil.rmtree(base / part)
    with pytest.raises(FileNotFoundError, match=rf"lacks {part}\. --base is a folder in the diffusers layout.*hf download"):
        check_base(base)


def test_base_of_another_pipeline_is_named(base):
    (base / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(FileNotFoundError, match="is a StableDiffusionPipeline, not a FLUX.1 pipeline"):
        check_base(base)


def test_parts_that_do_not_fit_are_named():
    pipeline = SimpleNamespace(
        text_encoder=SimpleNamespace(config=SimpleNamespace(hidden_size=256)),
        text_encoder_2=SimpleNamespace(config=SimpleNamespace(d_model=256)),
        vae=SimpleNamespace(config=SimpleNamespace(latent_channels=16)),
    )
    check_fit(pipeline, {"joint_attention_dim": 256, "pooled_projection_dim": 256, "in_channels": 64})
    with pytest.raises(
        GGUFError, match="text_encoder_2 gives 256, the file's joint_attention_dim is 4096; .*in_channels is 384"
    ):
        check_fit(pipeline, {"joint_attention_dim": 4096, "pooled_projection_dim": 256, "in_channels": 384})
