"""Sources: every form gives the tensors of the one BFL checkpoint, and damaged ones are refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import flux_kernels as fk
from flux_kernels.errors import GGUFError
from flux_kernels.source.source import understand_source

from ..flux_files import Architecture, flux_file, layout_types
from ..mixed.source_models import SMALL, bfl_tensors, diffusers_tensors, save_shards

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tensors():
    return bfl_tensors()


def values(model):
    return {name: tensor.read(0, tensor.rows, CPU) for name, tensor in model.tensors.items()}


def assert_same(found, tensors):
    assert found.keys() == tensors.keys()
    for name, value in found.items():
        assert torch.equal(value, tensors[name].float()), name


def single(tmp_path, tensors):
    save_file(tensors, tmp_path / "flux.safetensors")
    return tmp_path / "flux.safetensors"


def prefixed_beside_a_vae(tmp_path, tensors):
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    save_file({**whole, "vae.decoder.conv_in.weight": torch.ones(1)}, tmp_path / "flux.safetensors")
    return tmp_path / "flux.safetensors"


def shards_by_index(tmp_path, tensors):
    return save_shards(tmp_path / "shards", tensors, 3) / "model.safetensors.index.json"


def folder_of_shards(tmp_path, tensors):
    return save_shards(tmp_path / "shards", tensors, 2, index=False)


def diffusers_pipeline(tmp_path, tensors):
    folder = save_shards(tmp_path / "pipe" / "transformer", diffusers_tensors(tensors), 2, "diffusion_pytorch_model")
    (folder / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel", "axes_dims_rope": [16, 24, 24]}))
    return tmp_path / "pipe"


SOURCES = [single, prefixed_beside_a_vae, shards_by_index, folder_of_shards, diffusers_pipeline]


@pytest.mark.parametrize("write", SOURCES)
def test_every_form_of_a_checkpoint_is_the_same_model(tmp_path, tensors, write):
    model = understand_source(write(tmp_path, tensors))
    assert_same(values(model), tensors)
    assert model.config["num_attention_heads"] == 4
    assert (model.config["axes_dims_rope"] == (16, 24, 24)) is model.needs_config is (write is diffusers_pipeline)
    assert bool(model.notes) is (write is prefixed_beside_a_vae)


@pytest.mark.parametrize(
    "name",
    [
        "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
        "lora_unet_double_blocks_0_img_attn_qkv.lokr_w1",
        "lora_unet_double_blocks_0_img_attn_qkv.hada_w1_a",
    ],
)
def test_a_lora_is_no_source(tmp_path, name):
    """Its factors would become a file that nothing reads."""
    with pytest.raises(GGUFError, match=r"holds a LoRA \(.*which is no model"):
        understand_source(single(tmp_path, {name: torch.ones(16, 256)}))


def test_ranges_of_a_fused_tensor_cross_its_pieces(tmp_path, tensors):
    model = understand_source(diffusers_pipeline(tmp_path, tensors))
    for name in ("single_blocks.0.linear1.weight", "single_blocks.0.linear1.bias", "final_layer.adaLN_modulation.1.weight"):
        tensor = model.tensors[name]
        for start, stop in ((0, 1), (100, 300), (200, tensor.rows)):
            assert torch.equal(tensor.read(start, stop, CPU), tensors[name][start:stop].float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_dtypes_are_widened_or_rounded_to_float32(tmp_path, dtype):
    tensors = bfl_tensors(dtype=dtype)
    assert_same(values(understand_source(single(tmp_path, tensors))), tensors)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_without_scales(tmp_path, tensors, dtype):
    small = {name: tensor.to(dtype) if tensor.dim() == 2 else tensor for name, tensor in tensors.items()}
    assert_same(values(understand_source(single(tmp_path, small))), small)


@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("by_row", [False, True])
def test_fp8_with_scales(tmp_path, tensors, suffix, by_row):
    stored, expected = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}, {}
    for name, tensor in tensors.items():
        if tensor.dim() < 2:
            stored[name], expected[name] = tensor, tensor
            continue
        module = name.removesuffix(".weight")
        shape = (tensor.shape[0], 1) if by_row else ()
        scale = torch.rand(shape, generator=torch.Generator().manual_seed(tensor.numel())) + 0.5
        stored[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        stored[f"{module}.{suffix}"] = scale
        stored[f"{module}.scale_input"] = torch.ones(())
        expected[name] = stored[name].float() * scale
    model = understand_source(single(tmp_path, stored))
    assert_same(values(model), expected)
    qkv = model.tensors["single_blocks.0.linear1.weight"]
    assert torch.equal(qkv.read(100, 200, CPU), expected["single_blocks.0.linear1.weight"][100:200])
    assert qkv.type is None


def test_a_scale_of_another_shape_is_refused(tmp_path, tensors):
    name = "single_blocks.0.linear1.weight"
    stored = {**tensors, name: tensors[name].to(torch.float8_e4m3fn), "single_blocks.0.linear1.weight_scale": torch.ones(7)}
    with pytest.raises(GGUFError, match=r"weight_scale' has shape \[7\] beside weights \[1792, 256\]"):
        understand_source(single(tmp_path, stored))


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0"])
def test_gguf_sources_decode_as_gguf_py_does(tmp_path, kind):
    file = flux_file(SMALL, layout_types("mixed", kind))
    path = file.write(tmp_path / "flux.gguf", prefix="model.diffusion_model.")
    found = values(understand_source(path))
    for name, value in file.values().items():
        assert torch.equal(found[name], torch.from_numpy(value)), name


def test_an_incomplete_model_names_what_is_missing(tmp_path, tensors):
    del tensors["single_blocks.0.linear2.bias"]
    with pytest.raises(GGUFError, match=r"1 tensor missing: single_blocks.0.linear2.bias"):
        understand_source(single(tmp_path, tensors))


def test_another_model_is_said_to_be_one(tmp_path):
    save_file({"double_stream_blocks.0.block.ff_i.w1.weight": torch.ones(2, 2)}, tmp_path / "hidream.safetensors")
    model = understand_source(tmp_path / "hidream.safetensors")
    assert model.config is None and "This is HiDream, which flux_kernels does not load" in model.notes[0]


def test_weights_that_are_integers_are_refused(tmp_path):
    save_file({"double_blocks.0.x.weight": torch.ones(2, 2, dtype=torch.uint8)}, tmp_path / "m.safetensors")
    with pytest.raises(GGUFError, match="has type U8, which cannot be weights here. Legal: F32"):
        understand_source(tmp_path / "m.safetensors")


def edited(path, change):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


DAMAGE = [
    (lambda path: path.write_bytes(b""), "no length of a header"),
    (lambda path: path.write_bytes(b"\xff" * 100), "no length of a header"),
    (lambda path: path.write_bytes((20).to_bytes(8, "little") + b"x" * 100), "its header is no JSON"),
    (lambda path: path.write_bytes((2).to_bytes(8, "little") + b"[]"), "no JSON object"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), "ends at byte"),
    (lambda path: edited(path, lambda header: header["img_in.bias"].pop("dtype")), "entry of 'img_in.bias' is not"),
    (lambda path: edited(path, lambda header: header["img_in.bias"].update(shape=[-1])), "entry of 'img_in.bias' is not"),
    (lambda path: edited(path, lambda header: header["img_in.bias"].update(shape=[7])), r"BF16 \[7\], but takes 512 bytes"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[message for _, message in DAMAGE])
def test_damaged_safetensors_are_refused(tmp_path, tensors, damage, message):
    path = single(tmp_path, tensors)
    damage(path)
    with pytest.raises(GGUFError, match=message):
        understand_source(path)


def test_wrong_paths_are_told_apart(tmp_path, tensors):
    with pytest.raises(GGUFError, match="does not exist. Legal are"):
        understand_source(tmp_path / "none.safetensors")
    with pytest.raises(GGUFError, match="holds no model"):
        understand_source(tmp_path)
    (tmp_path / "flux.ckpt").write_bytes(b"x")
    with pytest.raises(GGUFError, match="is a pickle, which can run code"):
        understand_source(tmp_path / "flux.ckpt")
    folder = save_shards(tmp_path / "shards", tensors, 3)
    with pytest.raises(GGUFError, match="is one of several shards"):
        understand_source(folder / "model-00001-of-00003.safetensors")
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(GGUFError, match="names 'model-00002-of-00003.safetensors', not there"):
        understand_source(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(GGUFError, match="holds 2 shards of 3"):
        understand_source(folder)
    single(tmp_path, tensors)
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(GGUFError, match="several models: flux.safetensors, other.safetensors"):
        understand_source(tmp_path)


def test_the_embedded_model_is_a_source():
    from flux_kernels.generation.embedded import embedded_model_path

    model = understand_source(embedded_model_path())
    assert "width 256" in model.model and not model.needs_config
    assert fk.FORMATS and Architecture(1, 2).bfl_shapes().keys() == model.tensors.keys()
