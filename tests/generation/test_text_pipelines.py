"""Drawing from text with every architecture: file and folder give the picture of diffusers."""

from __future__ import annotations

import copy
import inspect
import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from flux_kernels import FormatError, GGUFError
from flux_kernels.cli import app
from flux_kernels.generation import generate as work
from flux_kernels.generation.base_pipeline import load_pipeline
from flux_kernels.generation.generate import generate
from flux_kernels.generation.inspect_file import FileFacts
from flux_kernels.generation.job import Job, call_settings
from flux_kernels.generation.placement import measured_parts
from flux_kernels.generation.request import Lora
from flux_kernels.generation.text_pipelines import TEXT_PIPELINES, drawing_classes
from flux_kernels.models.architectures import ARCHITECTURES

from ..models.cases import CASES
from ..t5_files import decoded_twin, write_t5
from .tiny_drawing import CALLS, ROWS, STEPS, all_kinds, by_diffusers, drawn, request
from .tiny_pipelines import TINY, WIDTH

STEPS_OF = dict(zip(CALLS, (50, 4, 40, 8, 8, 50, 28)))


@all_kinds
def test_a_packed_file_draws_what_diffusers_draws_with_its_values(made, kind):
    files = made(kind)
    done = []
    drawing = generate(request(files), step=lambda *counts: done.append(counts))
    assert drawing.image.tobytes() == by_diffusers(kind, files, **CALLS[kind]).tobytes()
    assert len(drawing.image.getcolors(10**6)) > 100 and drawing.image.size == (64, 48)
    assert done == [(1, STEPS), (2, STEPS)]
    assert drawing.parameters["model"] == ROWS[TINY[kind].case].variant_name(files.twin.config)
    assert drawing.parameters["task"] == "text to image" and CALLS[kind].items() <= drawing.parameters.items()


def test_every_architecture_that_draws_pictures_is_here():
    drawing = {kind: row for row in ARCHITECTURES for kind in drawing_classes(row)}
    assert drawing.keys() == TEXT_PIPELINES.keys() == {*TINY, "FluxPipeline"} and STEPS_OF.keys() == {*TINY}
    assert [row.name for row in ARCHITECTURES if not drawing_classes(row)] == ["Wan"]
    for kind, row in drawing.items():
        assert {*TEXT_PIPELINES[kind].twins} <= {*row.pipelines}


@pytest.mark.parametrize("kind", TEXT_PIPELINES)
def test_no_argument_is_given_that_the_class_does_not_take(kind):
    row = TEXT_PIPELINES[kind]
    taken = {*inspect.signature(getattr(diffusers, kind).__call__).parameters}
    assert {
        "prompt",
        "width",
        "height",
        "num_inference_steps",
        "max_sequence_length",
        "generator",
        "callback_on_step_end",
    } <= taken
    assert row.guidance in taken and (row.negative is None) == ("negative_prompt" not in taken)
    assert row.negative is None or row.negative in taken
    parts = {*inspect.signature(getattr(diffusers, kind).__init__).parameters}
    assert {part for fit in row.fits for part in fit.parts} | {row.t5} - {None} <= parts


def settings_of(kind: str, config=None, **more) -> dict:
    """Return the call's arguments for the published model; one that says nothing of being distilled."""
    facts = FileFacts("x.gguf", 0, architecture=TINY[kind].case, config=config or ROWS[TINY[kind].case].variants[0].config)
    return call_settings(request(SimpleNamespace(gguf="x", base=None), **more), Job(facts, kind=kind))


@all_kinds
def test_defaults_are_those_of_the_model(made, kind):
    config = {"guidance_embeds": False, "num_layers": 5} if kind == "Flux2KleinPipeline" else CASES[TINY[kind].case].config
    settings = settings_of(kind, config, base=made(kind).base, width=None, height=None, steps=None)
    assert settings == {"width": 1024, "height": 1024, "num_inference_steps": STEPS_OF[kind], **CALLS[kind]}


@pytest.mark.parametrize(("kind", "steps", "guidance"), [("Flux2KleinPipeline", 50, 4.0), ("Krea2Pipeline", 28, 4.5)])
def test_a_folder_that_is_not_distilled_has_its_own_defaults(tmp_path, kind, steps, guidance):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind, "is_distilled": False}))
    config = {"guidance_embeds": False} if "Klein" in kind else {}
    settings = settings_of(kind, {**ROWS[TINY[kind].case].variants[-1].config, **config}, base=tmp_path, steps=None)
    assert (settings["num_inference_steps"], settings["guidance_scale"]) == (steps, guidance)
    assert settings_of(kind, base=tmp_path, steps=9, guidance=2.0)["guidance_scale"] == 2.0


def test_a_file_named_as_the_other_of_two_models_is_refused(made, tmp_path):
    # Turbo by its folder.
    files, raw = made("Krea2Pipeline"), tmp_path / "krea-2-raw-Q8_0.gguf"
    tiny = {name: files.twin.config[name] for name in ("num_layers", "num_attention_heads")}
    turbo, other = (replace(row, config=tiny) for row in ROWS["Krea 2"].variants)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(vars(ROWS["Krea 2"]), "variants", (turbo, other))
        shutil.copy(files.gguf, raw)
        with pytest.raises(
            GGUFError, match=r"By its name .*raw-Q8_0.gguf is Krea 2 Raw, and .* says that its model is distilled\."
        ):
            generate(request(files, gguf=raw))
        assert generate(request(files, gguf=raw.rename(tmp_path / "krea-2-turbo.gguf"))).parameters["guidance_scale"] == 0.0


def test_the_title_decides_where_the_folder_says_nothing(made):
    config = ROWS["Z-Image"].variants[0].config
    facts = FileFacts("z-image-base-Q4_K.gguf", 0, architecture="Z-Image", config=config)
    job = Job(facts, kind="ZImagePipeline")
    settings = call_settings(request(made("ZImagePipeline"), steps=None), job)
    assert (settings["num_inference_steps"], settings["guidance_scale"]) == (50, 5.0)


@pytest.mark.parametrize(("kind", "guidance"), [("QwenImagePipeline", None), ("ZImagePipeline", 2.0)])
def test_a_negative_prompt_reaches_the_pipeline(made, kind, guidance):
    files = made(kind)
    strength = {TEXT_PIPELINES[kind].guidance: guidance} if guidance else {}
    expected = by_diffusers(kind, files, **{**CALLS[kind], **strength, "negative_prompt": "rain"})
    drawing = generate(request(files, negative="rain", guidance=guidance))
    assert drawing.image.tobytes() == expected.tobytes()
    assert drawing.parameters["negative_prompt"] == "rain"


def test_a_negative_prompt_that_would_not_count_is_refused(made):
    with pytest.raises(FormatError, match="counts with a guidance above 0, and it is 0. Give --guidance too"):
        settings_of("ZImagePipeline", base=made("ZImagePipeline").base, negative="rain")
    with pytest.raises(FormatError, match="counts with a guidance above 1, and it is 1"):
        settings_of("QwenImagePipeline", base=made("QwenImagePipeline").base, negative="rain", guidance=1.0)
    # Nothing is guided, so no empty prompt is given either.
    assert "negative_prompt" not in settings_of("QwenImagePipeline", base=made("QwenImagePipeline").base, guidance=1.0)


def test_guidance_that_would_be_ignored_is_refused(made, tmp_path):
    kind, config = "Flux2KleinPipeline", {"guidance_embeds": False}
    with pytest.raises(FormatError, match="--guidance 4 would be ignored: .* says that its model is distilled"):
        settings_of(kind, config, base=made(kind).base, guidance=4.0)
    assert settings_of(kind, config, base=made(kind).base, guidance=1.0)["guidance_scale"] == 1.0
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    assert settings_of(kind, config, base=tmp_path, guidance=3.0)["guidance_scale"] == 3.0


def test_sides_are_whole_tokens(made):
    base = made("StableDiffusion3Pipeline").base
    settings = settings_of("StableDiffusion3Pipeline", base=base, width=79, height=64)
    assert (settings["width"], settings["height"]) == (64, 64)
    with pytest.raises(FormatError, match="--height is 8; a picture has at least 16 pixels a side"):
        settings_of("StableDiffusion3Pipeline", base=base, height=8)


@pytest.mark.parametrize("kind", ["ChromaPipeline", "StableDiffusion3Pipeline"])
def test_a_t5_file_replaces_the_encoder_of_its_part(made, tmp_path, kind):
    files, part = made(kind), TEXT_PIPELINES[kind].t5
    encoder = transformers.T5EncoderModel.from_pretrained(files.base / part, dtype=torch.float32)
    values = write_t5(encoder, tmp_path / "t5.gguf")
    pipeline = load_pipeline(files.base, files.twin, torch.float32, kind=kind, **{part: decoded_twin(encoder, values)})
    expected = drawn(pipeline, **CALLS[kind])
    without = tmp_path / "base"
    shutil.copytree(files.base, without, ignore=shutil.ignore_patterns(part))
    with pytest.raises(FileNotFoundError, match=rf"lacks {part}\..* Or give the T5 encoder as a GGUF file with --t5\.$"):
        generate(request(files, base=without))
    drawing = generate(request(files, base=without, t5=tmp_path / "t5.gguf"))
    assert drawing.image.tobytes() == expected.tobytes() and drawing.parameters["t5"] == "t5.gguf"


def test_a_lora_changes_the_picture_of_another_model(made, tmp_path):
    kind, layer = "Krea2Pipeline", "transformer_blocks.0.ff.up"
    files = made(kind)
    shape = files.twin.get_submodule(layer).weight.shape
    generator = torch.Generator().manual_seed(0)
    names = {f"transformer.{layer}.lora_A.weight": (4, shape[1]), f"transformer.{layer}.lora_B.weight": (shape[0], 4)}
    save_file({name: torch.randn(size, generator=generator) for name, size in names.items()}, tmp_path / "l.safetensors")
    drawing = generate(request(files, loras=[Lora(tmp_path / "l.safetensors", 0.8)]))
    pipeline = load_pipeline(files.base, copy.deepcopy(files.twin), torch.float32, kind=kind)
    pipeline.load_lora_weights(str(tmp_path), weight_name="l.safetensors", adapter_name="one")
    pipeline.set_adapters(["one"], [0.8])
    expected = drawn(pipeline, **CALLS[kind])
    assert drawing.image.tobytes() == expected.tobytes() != by_diffusers(kind, files, **CALLS[kind]).tobytes()


def test_parts_of_other_models_are_measured(made):
    kind = "StableDiffusion3Pipeline"
    pipeline = load_pipeline(made(kind).base, made(kind).twin, torch.float32, kind=kind)
    parts = {part.name: part for part in measured_parts(pipeline, 64, 48, 0, 333, batch=2)}
    assert set(parts) == {"text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae"}
    # Two pictures of 12 tokens, width 256.
    assert parts["transformer"].working == round(2 * (12 + 333) * 20 * 256 * 4 * 1.1)
    kind = "QwenImagePipeline"
    pipeline = load_pipeline(made(kind).base, made(kind).twin, torch.float32, kind=kind)
    found = {part.name: part.working for part in measured_parts(pipeline, 64, 48, 0, 512)}
    assert found["text_encoder"] == round(512 * 20 * WIDTH * 4 * 1.1) + round(2 * 512**2 * 12 * 1.1)
    # Its second finest channels, 2 x 8.
    assert found["vae"] == round(64 * 48 * 4 * 16 * 4 * 1.1)


def command(files, *options):
    arguments = ["--gguf", str(files.gguf), "-p", "a fox", "--dtype", "float32", "--json", "--force", *map(str, options)]
    return CliRunner().invoke(app, ["generate", *arguments])


def test_the_command_draws_with_another_model(made, tmp_path):
    files = made("ZImagePipeline")
    size = ("--width", 64, "--height", 48, "--steps", STEPS, "--seed", 3)
    done = command(files, "--base", files.base, "--out", tmp_path / "out.png", *size)
    assert done.exit_code == 0, done.output
    image = Image.open(tmp_path / "out.png")
    assert image.tobytes() == by_diffusers("ZImagePipeline", files, **CALLS["ZImagePipeline"]).tobytes()
    stored = json.loads(image.text["flux_kernels"])
    assert stored["model"] == json.loads(done.stdout)["model"] == "Z-Image architecture with 1 block, width 384"


# Class of the file, options, the sentence; @KIND is the base folder of a class.
REFUSALS = [
    (
        "ZImagePipeline",
        (),
        r"is a Z-Image architecture .*embedded model's text encoders.*Give --base, the folder of a ZImagePipeline\.",
    ),
    (
        "ZImagePipeline",
        ("--base", "@QwenImagePipeline"),
        r"is a QwenImagePipeline, not a Z-Image pipeline\. --base is a folder",
    ),
    ("ZImagePipeline", ("--base", "@ZImagePipeline", "--t5", "x"), r"--t5 is not taken: a ZImagePipeline has no T5 encoder"),
    (
        "ZImagePipeline",
        ("--base", "@ZImagePipeline", "--image", "x"),
        r"draws from text; --image is not taken\. --image is for .* of FLUX\.1",
    ),
    (
        "ZImagePipeline",
        ("--base", "@ZImagePipeline", "--kontext"),
        r"--kontext is not taken\. --kontext is for Kontext files of FLUX\.1",
    ),
    ("ZImagePipeline", ("--base", "@ZImagePipeline", "--true-cfg", "3"), r"--true-cfg is not taken by a ZImagePipeline"),
    (
        "ZImagePipeline",
        ("--base", "@ZImagePipeline", "--width", "9000"),
        r"the model has positions for 8192 pixels a side, and Z-Image was",
    ),
    ("Flux2KleinPipeline", ("--base", "@Flux2KleinPipeline", "--negative", "x"), r"Flux2KleinPipeline has no negative prompt"),
    ("Flux2KleinPipeline", ("--base", "@ChromaPipeline"), r"is a ChromaPipeline, not a FLUX\.2 pipeline.* of a Flux2Pipeline"),
]


@pytest.mark.parametrize(("kind", "options", "sentence"), REFUSALS)
def test_what_does_not_go_together_is_refused_before_loading(made, tmp_path, monkeypatch, kind, options, sentence):
    def forbidden(*args, **kwargs):
        raise AssertionError("a model was loaded before the refusal")

    monkeypatch.setattr(work, "load_transformer", forbidden)
    filled = [made(option[1:]).base if str(option).startswith("@") else option for option in options]
    done = command(made(kind), *filled, "--out", tmp_path / "out.png")
    assert done.exit_code == 1 and done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1, done.output
    assert re.search(sentence, done.stderr), done.stderr
    assert not (tmp_path / "out.png").exists()
