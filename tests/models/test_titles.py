"""Models that share all tensors: a word in the file's title tells them apart, or both are named."""

from __future__ import annotations

import pytest

from flux_kernels.generation.inspect_file import inspect_file
from flux_kernels.gguf.conventions import file_title

from .cases import CASES
from .test_architectures import ROWS, small_file, write_true_size

SIBLINGS = {
    "FLUX.2": ("FLUX.2-klein-4B", "FLUX.2-klein-base-4B"),
    "Z-Image": ("Z-Image-Turbo", "Z-Image"),
    "Krea 2": ("Krea 2 Turbo", "Krea 2 Raw"),
}
# Steps and guidance: the docstrings of Flux2KleinPipeline, ZImagePipeline and Krea2Pipeline.
SETTINGS = {
    "FLUX.2-klein-base-4B": (50, 4.0),
    "FLUX.2-klein-base-9B": (50, 4.0),
    "Z-Image-Turbo": (8, 0.0),
    "Z-Image": (50, 5.0),
    "Krea 2 Turbo": (8, 0.0),
    "Krea 2 Raw": (28, 4.5),
    "SD3.5-large": (28, 3.5),
    "SD3.5-large-turbo": (4, 0.0),
    "Qwen-Image": (50, 4.0),
    "Qwen-Image-Edit": (50, 4.0),
}


@pytest.mark.parametrize("name", SIBLINGS)
def test_a_title_without_a_word_names_both(tmp_path, name):
    case, siblings = CASES[name], SIBLINGS[name]
    path = write_true_size(case, case.published[siblings[0]].shapes, tmp_path / "model-Q4_K_M.gguf")
    facts = inspect_file(path)
    assert facts.variant == " or ".join(siblings)
    assert ROWS[name].settings(facts.config).name == siblings[0]


@pytest.mark.parametrize("variant", SETTINGS)
def test_settings_follow_the_title(variant):
    case, published = next((case, case.published[variant]) for case in CASES.values() if variant in case.published)
    row = ROWS[case.name]
    known = row.settings(published.config, published.title)
    assert (known.name, known.steps, known.guidance) == (variant, *SETTINGS[variant])
    pruned = {**published.config, next(reversed(row.counts.values())): 3}
    assert row.settings(pruned, published.title).name == variant
    assert not row.published(pruned, published.title)


def test_a_word_is_a_word():
    config = CASES["Z-Image"].published["Z-Image"].config
    for title in ("z-image-turbo-on-base", "database-z-image", "z_image_turbos", "z-image"):
        assert [row.name for row in ROWS["Z-Image"].published(config, title)] == ["Z-Image-Turbo", "Z-Image"], title
    for title in ("Z-Image-BASE", "z_image_base.gguf", "x base"):
        assert [row.name for row in ROWS["Z-Image"].published(config, title)] == ["Z-Image"], title


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("Z-Image", "z-image-de-turbo-Q8_0"),
        ("Z-Image", "Z_Image_De_Turbo"),
        ("Z-Image", "z-image-turbo-deturbo"),
        ("FLUX.2", "klein-dedistilled"),
        ("FLUX.2", "de-distilled klein"),
        ("Stable Diffusion 3", "sd3.5_large-de-turbo"),
    ],
)
def test_a_word_that_is_taken_back_tells_nothing(name, title):
    variant = next(row for row in ROWS[name].variants if row.word != "(?!)" and len(ROWS[name].published(row.config)) > 1)
    assert len(ROWS[name].published(variant.config, title)) == 2


def test_a_word_of_a_model_without_settings_is_found():
    chroma = ROWS["Chroma"].variants[0]
    assert chroma.unsourced_word("Chroma1-Flash-Q8_0.gguf") == "flash"
    assert chroma.unsourced_word("chroma-flashy") is None
    assert all(row.unsourced_word("model-Q8_0.gguf") is None for one in ROWS.values() for row in one.variants)


def test_words_of_one_config_differ():
    for row in ROWS.values():
        for variant in row.variants:
            alike = row.published(variant.config)
            assert len({other.word for other in alike}) == len(alike), variant.name


def test_the_name_in_the_file_is_of_its_title(tmp_path):
    file = small_file("Krea 2")
    path = file.write(tmp_path / "m.gguf", keys=[("add_string", "general.name", "Krea 2 Raw")])
    assert file_title(str(path), inspect_file(path).metadata) == "m.gguf Krea 2 Raw"
    assert file_title("/a/b/Z-Image-Turbo/transformer/diffusion_pytorch_model-00001-of-00002.safetensors") == (
        "Z-Image-Turbo transformer"
    )
    assert file_title("C:\\models\\base.gguf", {"general.name": 3}) == "base.gguf"
