"""Every task of `generate` through the whole command line, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from flux_kernels import GGUFError
from flux_kernels.cli import app
from flux_kernels.generation import generate as work
from flux_kernels.generation.base_pipeline import load_pipeline
from flux_kernels.generation.demo import Variant, write_variant
from flux_kernels.generation.embedded import PIPELINE_KWARGS, embedded_model_path
from flux_kernels.generation.request import Request
from flux_kernels.generation.tasks import DEPTH, choose_task
from flux_kernels.models import load_flux

from ..t5_files import decoded_twin
from ..task_files import write_embedded_t5, write_picture, write_transformer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Hold a transformer for each task, T5 files and pictures."""
    folder = tmp_path_factory.mktemp("tasks")
    for name in ("dev", "schnell", "canny", "fill", "kontext"):
        write_transformer(folder, name)
    write_embedded_t5(folder / "t5.gguf")
    write_variant(Variant("Q8_0", "Q8_0"), folder / "digits.gguf")
    write_picture(folder / "red.png")
    write_picture(folder / "blue.png", colour="blue")
    write_picture(folder / "wide.png", (96, 48))
    write_picture(folder / "mask.png", colour="white", part=0.25)
    (folder / "text.png").write_text("no picture")
    return folder


def run(files, gguf, *options):
    filled = [str(option).replace("@", f"{files}/") for option in options]
    arguments = ["--gguf", str(files / f"{gguf}.gguf"), "-p", "a red seven", "--steps", "2", "--dtype", "float32"]
    return CliRunner().invoke(app, ["generate", *arguments, "--out", str(files / "out.png"), "--force", "--json", *filled])


def drawn(files, gguf, *options):
    """Return (picture, facts)."""
    result = run(files, gguf, *options)
    assert result.exit_code == 0, result.output
    return Image.open(files / "out.png").copy(), json.loads(result.stdout)


def test_a_t5_file_replaces_the_text_encoder(files, tmp_path):
    """The pixels equal those of a pipeline whose T5 holds the decoded values.

    The folder's own encoder is not needed.
    """
    base = tmp_path / "base"
    shutil.copytree(embedded_model_path(), base, ignore=shutil.ignore_patterns("text_encoder_2", "transformer"))
    image, facts = drawn(files, "digits", "--t5", "@t5.gguf", "--base", base, "--width", 64, "--height", 64, "--guidance", 2.5)
    assert facts["t5"] == "t5.gguf" and facts["task"] == "text to image"
    pipeline = load_pipeline(embedded_model_path(), load_flux(files / "digits.gguf", dtype=torch.float32), torch.float32)
    decoded_twin(pipeline.text_encoder_2, write_embedded_t5(tmp_path / "again.gguf"))
    settings = {**PIPELINE_KWARGS, "num_inference_steps": 2, "max_sequence_length": 512}
    expected = pipeline("a red seven", generator=torch.Generator().manual_seed(0), **settings).images[0]
    assert image.tobytes() == expected.tobytes()


# What it is called -> transformer, options, and one option whose picture must matter.
TASKS = {
    "fill": ("fill", ("--image", "@red.png", "--mask", "@mask.png"), "@red.png"),
    "control": ("canny", ("--control-image", "@red.png"), "@red.png"),
    "edit": ("kontext", ("--image", "@red.png"), "@red.png"),
    "image to image": ("dev", ("--image", "@red.png", "--strength", "0.5"), "@red.png"),
}


@pytest.mark.parametrize("task", TASKS)
def test_tasks_draw_from_their_picture(files, task):
    gguf, options, picture = TASKS[task]
    image, facts = drawn(files, gguf, *options)
    assert facts["task"] == task and image.size == (64, 64)
    assert facts["num_inference_steps"] == 2 and facts["guidance_scale"] == PIPELINE_KWARGS["guidance_scale"]
    stored = json.loads(Image.open(files / "out.png").text["flux_kernels"])
    assert {"red.png"} <= {stored.get(name) for name in ("image", "control_image")}
    other = [option if option != picture else "@blue.png" for option in options]
    assert drawn(files, gguf, *other)[0].tobytes() != image.tobytes()


def test_the_flag_makes_any_dev_file_a_kontext(files):
    shutil.copy(files / "kontext.gguf", files / "renamed.gguf")
    named, facts = drawn(files, "kontext", "--image", "@wide.png")
    flagged, _ = drawn(files, "renamed", "--image", "@wide.png", "--kontext")
    assert named.tobytes() == flagged.tobytes() and facts["task"] == "edit"
    # The embedded model's 64 x 64 pixels in the picture's proportions, in steps of 16.
    assert named.size == (96, 48)


def test_a_negative_prompt_reaches_kontext(files):
    plain, _ = drawn(files, "kontext", "--image", "@red.png")
    assert drawn(files, "kontext", "--image", "@red.png", "--negative", "a blue one")[0].tobytes() != plain.tobytes()


# Transformer, options, the sentence.
REFUSALS = [
    ("dev", ("--image", "@red.png"), r"same tensors.*Add --kontext for a Kontext file.*or --strength 0\.6"),
    ("dev", ("--mask", "@mask.png"), r"draws from text.*--mask is not taken\. --mask is for Fill files\."),
    ("dev", ("--image", "@red.png", "--mask", "@mask.png"), r"--image and --mask are not taken.*--mask is for Fill files"),
    ("dev", ("--control-image", "@red.png"), r"--control-image is for Canny and Depth files"),
    ("dev", ("--kontext",), r"A Kontext file edits --image by the prompt; --image is missing\."),
    ("dev", ("--strength", "0.5"), r"give a picture with --image"),
    ("schnell", ("--image", "@red.png"), r"a schnell file, which draws from text alone; --image is not taken"),
    ("schnell", ("--image", "@red.png", "--kontext"), r"--image and --kontext are not taken"),
    ("fill", (), r"a Fill file: .*; --image and --mask are missing\."),
    ("fill", ("--image", "@red.png"), r"--mask is missing\."),
    ("fill", ("--image", "@red.png", "--mask", "@mask.png", "--strength", "0.5"), r"--strength is for dev files"),
    ("fill", ("--image", "@red.png", "--mask", "@mask.png", "--negative", "x"), r"--negative is for dev, schnell and Kontext"),
    ("fill", ("--image", "@red.png", "--mask", "@wide.png"), r"mask must have the size of its picture: image is 64 x 64"),
    ("canny", ("--image", "@red.png"), r"--control-image is missing, --image is not taken"),
    ("kontext", ("--image", "@none.png"), r"none\.png is no file\. --image is a picture"),
    ("kontext", ("--image", "@text.png"), r"text\.png is no picture that can be read"),
    ("digits", ("--t5", "@none.gguf"), r"none\.gguf is no file\. --t5 is a T5 encoder in a GGUF file"),
    ("digits", ("--t5", "@dev.gguf"), r"This is no T5 encoder"),
    ("t5", (), r"t5\.gguf is a T5 encoder with 1 block, width 256: give it as --t5, and a transformer as --gguf"),
]


@pytest.mark.parametrize(("gguf", "options", "sentence"), REFUSALS)
def test_what_does_not_go_together_is_refused_before_loading(files, gguf, options, sentence, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a model was loaded before the refusal")

    monkeypatch.setattr(work, "load_transformer", forbidden)
    monkeypatch.setattr(work, "load_t5", forbidden)
    (files / "out.png").unlink(missing_ok=True)
    result = run(files, gguf, *options)
    assert result.exit_code == 1 and result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1, result.output
    assert re.search(sentence, result.stderr), result.stderr
    assert not (files / "out.png").exists()


def test_a_t5_with_another_vocabulary_is_refused(files, tmp_path):
    from transformers import T5Config, T5EncoderModel

    from ..t5_files import write_t5

    few = {"vocab_size": 100, "d_model": 256, "d_kv": 64, "d_ff": 256, "num_layers": 1, "num_heads": 4}
    write_t5(T5EncoderModel(T5Config(**few)), files / "few.gguf")
    result = run(files, "digits", "--t5", "@few.gguf")
    assert result.exit_code == 1 and "a table of 100 tokens, the tokenizer_2 of" in result.stderr


def test_depth_is_told_from_canny_by_name_and_other_stacks_are_refused():
    request = Request(None, None, "", control_image="x.png")
    config = {"in_channels": 128, "out_channels": 64, "guidance_embeds": True}
    assert choose_task(config, request, "flux1-Depth-dev.gguf") is DEPTH
    assert choose_task(config, request, "flux1-canny-dev.gguf").defaults["guidance_scale"] == 30
    with pytest.raises(GGUFError, match="takes 196 input channels for 64 of the result, as Flex.2 does"):
        choose_task({**config, "in_channels": 196}, request, "")


def test_people_are_told_about_task_and_offload(files):
    arguments = ["generate", "--gguf", f"{files}/digits.gguf", "-p", "a seven", "--steps", "1"]
    arguments += ["--out", f"{files}/out.png", "--force"]
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments).stdout
    assert "text to image, seed 0" in shown
    assert torch.cuda.is_available() or "Torch sees no GPU: everything runs on the CPU, and nothing is offloaded." in shown
