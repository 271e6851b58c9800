"""Files that hold more than a transformer, or only a part of it."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flux_kernels import load_t5, load_transformer
from flux_kernels.errors import GGUFError
from flux_kernels.generation.inspect_file import inspect_file
from flux_kernels.models.architectures import ARCHITECTURES
from flux_kernels.models.recognise import COMPANIONS as COMPANION_PREFIXES
from flux_kernels.source.source import understand_source

from ..flux_files import FluxFile
from .cases import CASES
from .test_architectures import packed, small_file

PREFIX = "model.diffusion_model."
COMPANIONS = (
    *("first_stage_model.decoder.conv_in.weight", "vae.decoder.conv_in.weight"),
    *("cond_stage_model.transformer.text_model.final_layer_norm.weight", "conditioner.embedders.0.model.ln_final.weight"),
    *(
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight",
        "text_encoders.qwen3.model.norm.weight",
    ),
)
all_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def whole_checkpoint(case, drop=(), prefix=PREFIX) -> FluxFile:
    tensors = {prefix + name: value for name, value in small_file(case.name).tensors.items() if name not in drop}
    return FluxFile(tensors | {name: (np.zeros((4, 4), np.float16), "F16", (4, 4)) for name in COMPANIONS})


@pytest.mark.parametrize("prefix", [PREFIX, "", "transformer."])
@all_cases
def test_the_transformer_of_a_whole_checkpoint_loads(tmp_path, case, prefix):
    path = whole_checkpoint(case, prefix=prefix).write(tmp_path / "all.gguf")
    alone = small_file(case.name).write(tmp_path / "alone.gguf")
    assert packed(load_transformer(path)) == packed(load_transformer(alone))
    facts = inspect_file(path)
    assert facts.refused is None and facts.notes == ("6 tensors of other parts (text encoders, VAE) are left out.",)
    assert facts.resident_bytes == inspect_file(alone).resident_bytes
    source = understand_source(path)
    assert source.tensors.keys() == case.shapes.keys() and source.notes == facts.notes


@all_cases
def test_safetensors_whole_checkpoints_are_sources(tmp_path, case):
    tensors = {name: torch.zeros(shape) for name, shape in case.shapes.items()}
    save_file(tensors | {name: torch.zeros(4, 4) for name in COMPANIONS}, tmp_path / "all.safetensors")
    source = understand_source(tmp_path / "all.safetensors")
    assert source.tensors.keys() == case.shapes.keys() and "6 tensors of other parts" in source.notes[0]


@all_cases
def test_what_has_no_known_name_is_not_left_out(tmp_path, case):
    """Names that are those of companions beside a prefix alone are not among the known."""
    for name in ("t5xxl.shared.weight", "vae_decoder.weight", "nobody.knows.weight"):
        tensors = small_file(case.name).tensors | {name: (np.zeros((4, 4), np.float16), "F16", (4, 4))}
        with pytest.raises(
            GGUFError, match=rf"1 tensor superfluous: {name}\. .*relative of {case.name} that is not known here"
        ):
            load_transformer(FluxFile(tensors).write(tmp_path / "more.gguf"))


def test_advice_is_about_what_is_wrong(tmp_path):
    tensors = small_file("Wan").tensors
    lost = FluxFile({name: value for name, value in tensors.items() if name != "head.head.bias"})
    with pytest.raises(
        GGUFError, match="This file is incomplete, changed or made for another config. Get it again, or"
    ) as error:
        load_transformer(lost.write(tmp_path / "lost.gguf"))
    assert "relative" not in str(error.value)


@pytest.mark.parametrize("name", COMPANIONS)
def test_companions_alone_are_still_named(tmp_path, name):
    file = FluxFile({name: (np.zeros((4, 4), np.float16), "F16", (4, 4))})
    with pytest.raises(GGUFError) as error:
        load_transformer(file.write(tmp_path / "part.gguf"))
    assert "holds no tensors" not in str(error.value) and (name in str(error.value))


@pytest.mark.parametrize("row", ARCHITECTURES, ids=lambda row: row.name)
def test_no_transformer_has_a_companion_s_name(row):
    with torch.device("meta"):
        model = getattr(diffusers, row.model_class)(**row.variants[0].config)
    names = {*model.state_dict(), *map(row.original_of, model.state_dict())}
    assert not [name for name in names if name.startswith(COMPANION_PREFIXES)]


@all_cases
def test_what_a_whole_checkpoint_lacks_is_named(tmp_path, case):
    lost = case.quantized[0]
    with pytest.raises(GGUFError, match=lost.replace(".", r"\.")):
        load_transformer(whole_checkpoint(case, drop=[lost]).write(tmp_path / "all.gguf"))


@all_cases
def test_a_model_in_parts(tmp_path, case):
    """Two parts, as gguf-split writes them; without the second, the first says what is missing."""
    tensors = list(small_file(case.name).tensors.items())
    half = len(tensors) // 2
    paths = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    for number, (path, part) in enumerate(zip(paths, (tensors[:half], tensors[half:]), strict=True)):
        keys = [("add_uint16", "split.no", number), ("add_uint16", "split.count", 2)]
        FluxFile(dict(part)).write(path, keys=[*keys, ("add_int32", "split.tensors.count", len(tensors))])
    whole = packed(load_transformer(small_file(case.name).write(tmp_path / "whole.gguf")))
    assert packed(load_transformer(paths[0])) == packed(load_transformer(paths[1])) == whole
    assert understand_source(paths[1]).tensors.keys() == case.shapes.keys()
    paths[1].unlink()
    with pytest.raises(GGUFError, match="one of 2 parts; m-00002-of-00002.gguf is not beside it"):
        load_transformer(paths[0])


@pytest.mark.parametrize("half", [0, 1])
@all_cases
def test_a_part_whose_keys_do_not_say_so_is_known_by_its_name(tmp_path, case, half):
    tensors = list(small_file(case.name).tensors.items())
    kept = dict(tensors[: len(tensors) // 2] if half == 0 else tensors[len(tensors) // 2 :])
    path = FluxFile(kept).write(tmp_path / f"m-0000{half + 1}-of-00002.gguf")
    hint = f"By its name it is part {half + 1} of 2, but it lacks the key 'split.count'"
    with pytest.raises(GGUFError, match=hint):
        load_transformer(path)
    assert hint in inspect_file(path).refused
    path.rename(tmp_path / "m.gguf")
    with pytest.raises(GGUFError) as error:
        load_transformer(tmp_path / "m.gguf")
    assert "By its name" not in str(error.value)


def test_a_whole_file_with_the_name_of_a_part_loads(tmp_path):
    file = small_file("Krea 2")
    assert packed(load_transformer(file.write(tmp_path / "m-00001-of-00001.gguf")))
    assert packed(load_transformer(file.write(tmp_path / "m-00001-of-00003.gguf")))


def test_a_part_as_a_source_and_a_part_of_a_t5_are_known_by_their_names(tmp_path):
    tensors = small_file("Krea 2").tensors
    path = FluxFile(dict(list(tensors.items())[:-1])).write(tmp_path / "m-00001-of-00003.gguf")
    with pytest.raises(GGUFError, match="missing: last.linear.bias.* By its name it is part 1 of 3"):
        understand_source(path)
    norm = {"enc.blk.0.attn_norm.weight": (np.zeros(4, np.float32), "F32", (4,))}
    with pytest.raises(GGUFError, match="By its name it is part 2 of 3"):
        load_t5(FluxFile(norm).write(tmp_path / "t5-00002-of-00003.gguf"))
