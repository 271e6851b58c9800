"""Tensors that files hold with other dimensions than torch.

They are convolutions over frames, and tables whose first dimension is 1.
"""

from __future__ import annotations

from math import prod

import gguf
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from safetensors.torch import save_file

from flux_kernels import load_transformer, save_gguf
from flux_kernels.convert.choose_types import Request
from flux_kernels.convert.convert import prepare
from flux_kernels.errors import GGUFError
from flux_kernels.gguf.file import read_gguf
from flux_kernels.mixed.file_layout import layout_of_shapes, shapes_of_variant
from flux_kernels.models.architectures.flux1 import FLUX1
from flux_kernels.models.stored import used_shapes

from ..flux_files import FluxFile
from .cases import CASES
from .test_architectures import oracle, run, small_file, write

WAN, SD3 = CASES["Wan"], CASES["Stable Diffusion 3"]
CONVOLUTION = "patch_embedding.weight"
MODULATION = "blocks.0.modulation"


def reshaped(name: str, shape: tuple[int, ...]) -> FluxFile:
    file = FluxFile(dict(small_file("Wan").tensors))
    data, kind, _ = file.tensors[name]
    file.tensors[name] = (data.reshape(shape), kind, shape)
    return file


@pytest.mark.parametrize(
    ("name", "shape", "keyed"),
    [
        (CONVOLUTION, (256, 36, 1, 2, 2), False),
        (CONVOLUTION, (256, 36 * 4), True),
        (CONVOLUTION, (256, 36 * 4), False),
        (CONVOLUTION, (256 * 36, 1, 2, 2), False),
        (MODULATION, (6, 256), False),
        (MODULATION, (1, 6, 256), False),
        (MODULATION, (6 * 256,), False),
        ("head.modulation", (2, 256), False),
        ("img_emb.emb_pos", (6, 128), False),
        ("img_emb.emb_pos", (6 * 128,), False),
    ],
    ids=["gguf-py", "matrix with its shape", "matrix", "stable-diffusion.cpp", *["table"] * 6],
)
def test_every_way_to_store_a_tensor_gives_one_model(tmp_path, name, shape, keyed):
    keys = [("add_array", f"comfy.gguf.orig_shape.{name}", [256, 36, 1, 2, 2])] if keyed else []
    path = reshaped(name, shape).write(tmp_path / "small.gguf", architecture="wan", keys=keys)
    model = load_transformer(path, dtype=torch.float32, backend="torch")
    torch.testing.assert_close(run(model, WAN), run(oracle(WAN, small_file("Wan")), WAN), rtol=0, atol=0)


def test_other_shapes_are_refused(tmp_path):
    for shape in ((36, 256, 1, 2, 2), (36, 256 * 4), (256 * 4, 36)):
        with pytest.raises(GGUFError, match=CONVOLUTION):
            load_transformer(reshaped(CONVOLUTION, shape).write(tmp_path / "small.gguf"))


def test_a_file_without_the_convolution_says_so(tmp_path):
    """ComfyUI-GGUF's converter leaves it out, for another script to put it back."""
    tensors = {name: value for name, value in small_file("Wan").tensors.items() if name != CONVOLUTION}
    with pytest.raises(GGUFError, match=f"lacks '{CONVOLUTION}', which every Wan file holds"):
        load_transformer(FluxFile(tensors).write(tmp_path / "small.gguf"))


def test_a_matrix_is_no_other_matrix_of_as_many_weights():
    """Dimensions are merged only where a file has no room for them."""
    assert used_shapes(FLUX1, {"x": (8, 6)}, {"x": (4, 2, 6)}) == {"x": (8, 6)}
    assert used_shapes(FLUX1, {"x": (8, 6)}, {"x": (4, 2, 1, 3, 2)}) == {"x": (4, 2, 1, 3, 2)}
    assert used_shapes(FLUX1, {"x": (6, 8)}, {"x": (4, 2, 1, 3, 2)}) == {"x": (6, 8)}


def test_written_files_have_four_dimensions_and_say_the_shape(tmp_path):
    """As ComfyUI-GGUF reads it: floats in the original shape, row after row."""
    source = write(WAN, tmp_path / "small.gguf")
    save_gguf(load_transformer(source), tmp_path / "saved.gguf")
    conversion = prepare(source, Request("Q8_0"), device="cpu")
    conversion.write(tmp_path / "made.gguf")
    values = small_file("Wan").values()
    for path in (tmp_path / "saved.gguf", tmp_path / "made.gguf"):
        reader = gguf.GGUFReader(path)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        assert max(len(tensor.shape) for tensor in tensors.values()) <= 4
        field = reader.get_field(f"comfy.gguf.orig_shape.{CONVOLUTION}")
        assert field.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]
        shape = tuple(int(field.parts[index][0]) for index in field.data)
        assert shape == (256, 36, 1, 2, 2)
        assert tensors[CONVOLUTION].tensor_type == gguf.GGMLQuantizationType.F32
        stored = tensors[CONVOLUTION].data.reshape(shape)
        expected = values[CONVOLUTION] if path.name == "made.gguf" else torch.from_numpy(values[CONVOLUTION]).bfloat16().float()
        assert np.array_equal(stored, expected)
        assert tensors[MODULATION].tensor_type == gguf.GGMLQuantizationType.F32
        assert [int(size) for size in reversed(tensors[MODULATION].shape)] == [1, 6, 256]


def test_five_dimensions_are_read_as_torch_has_them(tmp_path):
    file = read_gguf(write(WAN, tmp_path / "small.gguf"))
    tensor = file.tensors[CONVOLUTION]
    assert tensor.shape == tuple(tensor.data.shape) == (256, 36, 1, 2, 2)
    assert tensor.nbytes == 2 * prod(tensor.shape)
    assert tensor.rows(1, 3).shape == (2, 36, 1, 2, 2)


def test_a_relative_with_blocks_of_its_own_is_not_saved_as_what_it_is_not(tmp_path):
    sizes = {"num_attention_heads": 1, "attention_head_dim": 32, "ffn_dim": 32, "num_layers": 1, "text_dim": 32, "freq_dim": 32}
    vace = WanVACETransformer3DModel(**sizes, vace_layers=[0], vace_in_channels=4)
    assert vace.config.keys() >= WanTransformer3DModel(**sizes).config.keys()
    with pytest.raises(TypeError, match="save_gguf takes a transformer such as .*got WanVACETransformer3DModel"):
        save_gguf(vace, tmp_path / "vace.gguf")


def test_a_table_that_readers_take_as_it_lies_is_never_bf16(tmp_path):
    """ComfyUI adds SD3's positions to the tokens without decoding them; F32 takes 0.9 GB of medium."""
    values = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in SD3.shapes.items()}
    save_file(values, tmp_path / "source.safetensors")
    types = {
        layout: prepare(tmp_path / "source.safetensors", Request("Q4_0", layout)).choice.types for layout in ("new", "old")
    }
    assert types["new"]["pos_embed"] == "F16" and types["new"]["context_embedder.weight"] == "BF16"
    assert types["old"]["pos_embed"] == "F16"
    save_gguf(load_transformer(write(SD3, tmp_path / "small.gguf"), dtype=torch.bfloat16), tmp_path / "saved.gguf")
    assert read_gguf(tmp_path / "saved.gguf").tensors["pos_embed"].format == "F32"


@pytest.mark.parametrize("positions", [63, 65, 2**20])
def test_positions_that_are_no_square_or_far_too_many_are_refused(tmp_path, monkeypatch, positions):
    monkeypatch.setattr("flux_kernels.models.architectures.sd3._MOST_POSITIONS", 2**20)
    file = FluxFile(dict(small_file(SD3.name).tensors))
    file.tensors["pos_embed"] = (np.zeros((1, positions, 256), np.float16), "F16", (1, positions, 256))
    with pytest.raises(
        GGUFError, match=f"pos_embed holds {positions * 256} numbers; at width 256 it is a square|more than .* is not read"
    ):
        load_transformer(file.write(tmp_path / "small.gguf"))


def test_the_size_of_a_planned_file_counts_the_shape_in_its_key():
    shapes = shapes_of_variant("wan2.2-ti2v-5b")
    assert shapes[CONVOLUTION] == (3072, 48, 1, 2, 2)
    layout = layout_of_shapes(shapes, "Wan")
    assert layout.file_bytes({}) > sum(layout.option_bytes(name, option) for name, option in layout.types.items())
