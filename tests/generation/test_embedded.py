"""The embedded model: loads offline, is small, fits every block type, and draws what it is asked for."""

import json
import subprocess
import sys

import pytest
import torch

from flux_kernels.generation.embedded import EMBEDDED_PROMPTS, PIPELINE_KWARGS, embedded_model_path, read_digits, words_note

MAX_BYTES = 16_000_000
SEEDS_PER_DIGIT = 4
# The bar, not yet a measurement: the first version of the model reaches 0.58 (demo_model/README.md).
MIN_RECOGNISED = 0.85
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def pipeline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        from diffusers import FluxPipeline

        loaded = FluxPipeline.from_pretrained(embedded_model_path(), torch_dtype=torch.float32, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipeline, prompts, seed):
    generator = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]
    return pipeline(prompt=prompts, generator=generator, **PIPELINE_KWARGS).images


def test_importing_needs_neither_torch_nor_diffusers():
    code = (
        "import importlib.util, sys; "
        "spec = importlib.util.spec_from_file_location('embedded', sys.argv[1]); "
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); "
        "assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(embedded_model_path().parent / "generation" / "embedded.py")], check=True)


def test_size_is_within_the_budget():
    assert sum(path.stat().st_size for path in embedded_model_path().rglob("*") if path.is_file()) <= MAX_BYTES


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_weights_are_stored_in_16_bit(part):
    (stored,) = (embedded_model_path() / part).glob("*.safetensors")
    raw = stored.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} <= {"F16", "BF16"}


def test_clip_is_named_as_every_release_of_transformers_5_reads_it():
    """transformers 5.0 finds no weight without the prefix, and draws random ones silently.

    Later releases take both.
    """
    raw = (embedded_model_path() / "text_encoder" / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert all(name.startswith("text_model.") for name in header if name != "__metadata__")


def test_every_linear_of_the_blocks_fits_256_weight_blocks(pipeline):
    linears = {name: m for name, m in pipeline.transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    in_blocks = {name: m for name, m in linears.items() if "transformer_blocks." in name}
    assert len(in_blocks) == 14 + 2 * 6
    assert [name for name, m in in_blocks.items() if m.in_features % 256] == []
    assert {m.in_features for m in in_blocks.values()} == {256, 1024, 1280}


def test_every_digit_is_recognised(pipeline):
    wanted = [digit for digit in range(10) for _ in range(SEEDS_PER_DIGIT)]
    read = read_digits(draw(pipeline, [f"a {WORDS[digit]}" for digit in wanted], seed=20))
    share = sum(a == b for a, b in zip(read, wanted, strict=True)) / len(wanted)
    assert share >= MIN_RECOGNISED, f"{share:.0%} of {len(wanted)} digits recognised: wanted {wanted}, read {read}"


def test_a_colour_is_drawn_as_asked(pipeline):
    import numpy as np

    for prompt, strongest in (("a red three", 0), ("a green three", 1), ("a blue three", 2)):
        (image,) = draw(pipeline, [prompt], seed=3)
        light = np.asarray(image, dtype=np.float64)
        assert (light * light.max(axis=2, keepdims=True) ** 3).sum(axis=(0, 1)).argmax() == strongest, prompt


def test_listed_prompts_consist_of_known_words(pipeline):
    for prompt in EMBEDDED_PROMPTS:
        assert len(pipeline.tokenizer(prompt).input_ids) == len(prompt.split()) + 2, prompt
        assert len(pipeline.tokenizer_2(prompt).input_ids) == len(prompt.split()) + 1, prompt
        assert len(prompt.split()) + 1 <= PIPELINE_KWARGS["max_sequence_length"]
    assert not words_note(*EMBEDDED_PROMPTS)


def test_missing_data_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr("flux_kernels.generation.embedded.files", lambda _: tmp_path)
    with pytest.raises(FileNotFoundError, match="reinstall flux_kernels"):
        embedded_model_path()
