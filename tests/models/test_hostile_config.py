"""Values that no tensor shows come from strangers: nonsense ends in an error of ours."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest

from flux_kernels import load_t5, load_transformer
from flux_kernels.errors import GGUFError
from flux_kernels.generation.inspect_file import inspect_file
from flux_kernels.models.architectures import ARCHITECTURES
from flux_kernels.models.variant_calls import VARIANTS

from ..flux_files import FluxFile
from .cases import CASES
from .test_architectures import small_file, write

ROWS = {row.name: row for row in ARCHITECTURES}
UNTOLD = [(case.name, value) for case in CASES.values() for value in ROWS[case.name].untold]
NONSENSE = ["x", -5, 0, math.nan, [], [[1]], {"a": 1}, [10**9] * 3, [3, 5], 10**30]


@pytest.mark.parametrize(("name", "value"), UNTOLD)
def test_nonsense_in_the_files_key_is_refused(tmp_path, name, value):
    case = CASES[name]
    held = {untold: case.config[untold] for untold in ROWS[name].untold}
    for nonsense in NONSENSE:
        text = json.dumps(held | {value: nonsense})
        path = write(case, tmp_path / "small.gguf", keys=[("add_string", "flux_kernels.config", text)])
        assert value in (inspect_file(path).refused or ""), nonsense
    with pytest.raises(GGUFError, match=value):
        load_transformer(path)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("config", [{"num_layers": "x"}, {"attention_head_dim": 0}, {"n_heads": 0}, {"n_layers": -1.5}])
def test_a_config_that_does_not_hold_together_is_refused(tmp_path, name, config):
    with pytest.raises(GGUFError):
        load_transformer(write(CASES[name], tmp_path / "small.gguf"), config=config)


@pytest.mark.parametrize("name", CASES)
def test_a_broken_config_file_is_named(tmp_path, name):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(GGUFError, match=r"config.json is no JSON"):
        load_transformer(write(CASES[name], tmp_path / "small.gguf"), config=tmp_path / "config.json")


def test_negative_original_shapes_are_refused(tmp_path):
    case = CASES["FLUX.2"]
    key = ("add_array", "comfy.gguf.orig_shape.img_in.weight", [-size for size in case.shapes["img_in.weight"]])
    with pytest.raises(GGUFError, match="orig_shape"):
        load_transformer(write(case, tmp_path / "small.gguf", keys=[key]))


def test_sizes_beyond_any_model_are_refused_before_a_model_is_built(tmp_path):
    file = small_file("FLUX.2")
    wide = (2, 2**20)
    file = type(file)({**file.tensors, "txt_in.weight": (np.zeros(wide, np.float16), "F16", wide)})
    with pytest.raises(GGUFError, match="more than 262144 is not read"):
        load_transformer(file.write(tmp_path / "wide.gguf"))


def test_names_for_options_are_unique_and_readable():
    assert len(VARIANTS) == sum(len(row.variants) for row in ARCHITECTURES)
    assert {"flux1-dev", "flux2-klein-4b", "z-image-turbo", "qwen-image", "wan2.1-t2v-1.3b", "sd3.5-large"} <= VARIANTS.keys()


ARABIC = "\u0660\u0661\u0662\u0663\u0664\u0665\u0666\u0667\u0668\u0669"
_INDEX = re.compile(r"(?<=\.)[0-9]+(?=\.)")


def with_arabic_index(name: str) -> str:
    return _INDEX.sub(lambda number: number[0].translate(str.maketrans("0123456789", ARABIC)), name, count=1)


@pytest.mark.parametrize("name", CASES)
def test_digits_of_other_scripts_are_no_indices(tmp_path, name):
    row, tensors = ROWS[name], small_file(name).tensors
    numbered = {tensor: with_arabic_index(tensor) for tensor in tensors if with_arabic_index(tensor) != tensor}
    assert numbered and all(row.original_of(foreign) == foreign for foreign in numbered.values())
    assert not any(re.fullmatch(row.mark, foreign) for foreign in numbered.values() if "[0-9]" in row.mark)
    foreign = next(iter(numbered.values()))
    added = FluxFile(tensors | {foreign: (np.zeros(4, np.float32), "F32", (4,))})
    with pytest.raises(GGUFError, match=f"1 tensor superfluous: {foreign}"):
        load_transformer(added.write(tmp_path / "added.gguf"))
    alone = FluxFile({numbered.get(tensor, tensor): value for tensor, value in tensors.items()})
    with pytest.raises(GGUFError):
        load_transformer(alone.write(tmp_path / "alone.gguf"))


def test_a_t5_s_digits_of_other_scripts_are_no_indices(tmp_path):
    for name in (
        "enc.blk.\u0660.attn_q.weight",
        "encoder.block.\u0660.layer.0.SelfAttention.q.weight",
        "enc.blk.9999999.attn_q.weight",
    ):
        file = FluxFile({name: (np.zeros((4, 4), np.float32), "F32", (4, 4))})
        with pytest.raises(GGUFError, match="This is no T5 encoder"):
            load_t5(file.write(tmp_path / "t5.gguf"))
