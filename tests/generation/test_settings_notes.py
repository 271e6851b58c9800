"""`generate` and `inspect` say whose settings are taken where a file's title leaves its model open."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from flux_kernels.cli import app
from flux_kernels.generation.file_model import settings_note
from flux_kernels.generation.generate import generate

from ..models.cases import CASES
from ..models.test_architectures import write_true_size
from .tiny_drawing import ROWS, STEPS, request

Z_IMAGE = ROWS["Z-Image"].variants[0].config
OPEN = (
    "z_image-Q8_0.gguf is Z-Image-Turbo or Z-Image, which share all tensors; taken for Z-Image-Turbo: 8 steps, guidance 0. "
    "Give --steps and --guidance for the other (50, 5)."
)


@pytest.mark.parametrize(
    ("name", "variant", "title", "said"),
    [
        ("Z-Image", 0, "z_image-Q8_0.gguf", OPEN),
        ("Z-Image", 0, "z-image-de-turbo.gguf", OPEN.replace("z_image-Q8_0", "z-image-de-turbo")),
        ("Z-Image", 0, "z-image-turbo-Q8_0.gguf", None),
        ("Z-Image", 0, "z-image-base-Q8_0.gguf", None),
        (
            "Stable Diffusion 3",
            0,
            "m.gguf",
            (
                "m.gguf is SD3.5-large or SD3.5-large-turbo, which share all tensors; taken for SD3.5-large: 28 steps, guidance 3.5. "
                "Give --steps and --guidance for the other (4, 0)."
            ),
        ),
        ("Stable Diffusion 3", 0, "sd3.5_large-Q4_0.gguf", None),
        ("Stable Diffusion 3", 0, "sd3.5_large_turbo-Q4_0.gguf", None),
        (
            "Krea 2",
            0,
            "m.gguf",
            (
                "m.gguf is Krea 2 Turbo or Krea 2 Raw, which share all tensors; the --base folder tells `generate` which: 8 steps, "
                "guidance 0 for Krea 2 Turbo; 28 steps, guidance 4.5 for Krea 2 Raw."
            ),
        ),
        (
            "Chroma",
            0,
            "Chroma1-Flash-Q8_0.gguf",
            (
                'Chroma1-Flash-Q8_0.gguf has the word "flash" in its name. The settings of that model are not known here, and those of '
                "Chroma1 are taken: 40 steps, guidance 3. Give --steps and --guidance for its own."
            ),
        ),
        ("Chroma", 0, "Chroma1-HD-Q8_0.gguf", None),
        # Its two models have the same settings.
        ("Qwen-Image", -1, "m.gguf", None),
    ],
)
def test_a_title_that_leaves_the_model_open(name, variant, title, said):
    row = ROWS[name]
    assert settings_note(row, row.variants[variant].config, title, None) == said


@pytest.mark.parametrize(("distilled", "steps"), [(True, 8), (False, 28)])
def test_a_folder_that_tells_the_model_leaves_nothing_open(tmp_path, distilled, steps):
    row = ROWS["Krea 2"]
    (tmp_path / "model_index.json").write_text(json.dumps({"is_distilled": distilled}))
    assert settings_note(row, row.variants[0].config, "m.gguf", tmp_path) is None


def test_a_model_of_another_size_is_of_the_kind():
    said = settings_note(ROWS["Z-Image"], {**Z_IMAGE, "n_layers": 7}, "m.gguf", None)
    assert said.startswith(
        "m.gguf is of the kind of Z-Image-Turbo or Z-Image, which share all tensors; taken for Z-Image-Turbo"
    )


@pytest.mark.parametrize(("guidance", "noted"), [(None, True), (1.0, False)])
def test_generate_says_it_where_not_both_are_given(made, tmp_path, guidance, noted):
    said = []
    drawing = generate(request(made("ZImagePipeline"), guidance=guidance), status=said.append)
    assert bool(drawing.notes) is noted and [line for line in said if "taken for" in line] == [*drawing.notes]


def test_the_command_says_it(made, tmp_path, monkeypatch):
    files, row = made("ChromaPipeline"), ROWS["Chroma"]
    flash = shutil.copy(files.gguf, tmp_path / "chroma-flash.gguf")
    monkeypatch.setitem(vars(row), "variants", tuple(replace(one, config={}) for one in row.variants))
    arguments = ["generate", "--gguf", flash, "--base", files.base, "-p", "a fox", "--dtype", "float32", "--width", 64]
    arguments += ["--height", 48, "--steps", STEPS, "--out", tmp_path / "out.png", "--json"]
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == 0, done.output
    (note,) = json.loads(done.stdout)["notes"]
    assert note.startswith('chroma-flash.gguf has the word "flash" in its name.') and f"Note: {note}" in done.stderr


def test_inspect_says_it(tmp_path):
    case = CASES["Z-Image"]
    path = write_true_size(case, case.published["Z-Image"].shapes, tmp_path / "z_image-Q8_0.gguf")
    shown = CliRunner().invoke(app, ["inspect", str(path)])
    assert shown.exit_code == 0 and f"Note: {OPEN}" in shown.stdout
    told = path.rename(tmp_path / "z_image_turbo-Q8_0.gguf")
    assert "Note:" not in CliRunner().invoke(app, ["inspect", str(told)]).stdout
