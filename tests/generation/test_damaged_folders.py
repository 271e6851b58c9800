"""Pipeline folders that lack files or whose index is damaged: refused before anything is loaded."""

from __future__ import annotations

import json
import shutil

import pytest

from flux_kernels import GGUFError
from flux_kernels.generation.base_pipeline import base_sizes, check_base, load_pipeline
from flux_kernels.generation.text_pipelines import TEXT_PIPELINES

from .tiny_drawing import ROWS, all_kinds
from .tiny_pipelines import TINY

KIND = "ZImagePipeline"


@pytest.fixture
def base(made, tmp_path):
    return shutil.copytree(made(KIND).base, tmp_path / "base")


def check(base, kind=KIND):
    return check_base(base, ROWS[TINY[kind].case])


def write_index(base, **changes):
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps({**index, **changes}))


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("tokenizer/tokenizer.json", r"the vocabulary of tokenizer \(such as tokenizer/tokenizer\.json\)"),
        ("scheduler/scheduler_config.json", r"scheduler/scheduler_config\.json"),
        ("text_encoder/config.json", r"text_encoder/config\.json"),
        ("text_encoder/model.safetensors", r"the weights of text_encoder \(a \.safetensors file\)"),
        ("vae/diffusion_pytorch_model.safetensors", r"the weights of vae \(a \.safetensors file\)"),
    ],
)
def test_a_file_that_is_missing_is_named(base, file, named):
    check(base)
    (base / file).unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks {named}\. --base is a folder in the diffusers layout"):
        check(base)


def test_all_shards_of_an_index_are_there(base):
    folder = base / "text_encoder"
    weights = (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": weights.name, "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(FileNotFoundError, match=r"lacks text_encoder/model-00002-of-00002\.safetensors\."):
        check(base)
    shutil.copy(weights, folder / shards["b"])
    assert check(base) == KIND


@all_kinds
def test_parts_that_a_class_needs_may_not_be_null(made, tmp_path, kind):
    base = shutil.copytree(made(kind).base, tmp_path / "base")
    whole = json.loads((base / "model_index.json").read_text())
    for part in (*TINY[kind].parts, "vae", "scheduler"):
        for changed in ({**whole, part: [None, None]}, {name: whole[name] for name in whole if name != part}):
            (base / "model_index.json").write_text(json.dumps(changed))
            if part in TEXT_PIPELINES[kind].optional and part in changed:
                assert check(base, kind) == kind
                continue
            with pytest.raises(FileNotFoundError, match=rf"lacks {part}\."):
                check(base, kind)


@pytest.mark.parametrize(
    ("part", "entry"),
    [
        ("vae", ["diffusers"]),
        ("vae", "AutoencoderKL"),
        ("vae", ["diffusers", None]),
        ("vae", ["diffusers", "utils"]),
        ("vae", ["diffusers", "UNet2DModel"]),
        ("vae", ["os", "system"]),
        ("scheduler", ["diffusers", "AutoencoderKL"]),
        ("tokenizer", ["transformers", "Qwen3ForCausalLM"]),
        ("text_encoder", ["transformers", "Qwen2Tokenizer"]),
    ],
)
def test_an_entry_that_is_no_such_part_is_named(base, part, entry):
    write_index(base, **{part: entry})
    with pytest.raises(GGUFError, match=rf"model_index\.json is damaged: its {part} is .* Get the --base folder again\."):
        check(base)


@pytest.mark.parametrize(
    ("name", "value"), [("is_distilled", 15), ("patch_size", "two"), ("text_encoder_select_layers", ["first"])]
)
def test_a_setting_of_another_type_is_named(made, tmp_path, name, value):
    kind = "Krea2Pipeline"
    base = shutil.copytree(made(kind).base, tmp_path / "base")
    assert check(base, kind) == kind
    write_index(base, **{name: value})
    with pytest.raises(GGUFError, match=rf"model_index\.json is damaged: its {name} is "):
        check(base, kind)


@pytest.mark.parametrize("text", ["[" * 200_000, "[]", "{", "7"])
def test_an_index_that_is_no_object_is_damaged(base, text):
    (base / "model_index.json").write_text(text)
    with pytest.raises(FileNotFoundError, match=r"model_index\.json is .* Get the --base folder again\."):
        check(base)


@pytest.mark.parametrize(
    ("text", "error", "sentence"),
    [("[]", FileNotFoundError, "is damaged: it is no JSON object"), ("{}", GGUFError, "it gives no number as latent_channels")],
)
def test_a_config_without_the_size_is_named(base, text, error, sentence):
    (base / "vae" / "config.json").write_text(text)
    with pytest.raises(error, match=rf"config\.json .*{sentence}.* Get the --base folder again\."):
        base_sizes(base, KIND)


def test_what_diffusers_raises_names_the_folder(made, base):
    (base / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(GGUFError, match=f"{base} does not load as a {KIND}: "):
        load_pipeline(base, None, made(KIND).twin.dtype, kind=KIND)
