"""Qwen-Image's variants, which differ by a tensor: Edit-2511 by an empty one, Layered by an embedding."""

from __future__ import annotations

import json

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flux_kernels import load_transformer, save_gguf
from flux_kernels.convert.choose_types import Request
from flux_kernels.convert.convert import prepare
from flux_kernels.errors import GGUFError
from flux_kernels.gguf.file import read_gguf

from ..flux_files import FluxFile, random_tensor
from .cases.qwen_image import QWEN_IMAGE
from .test_architectures import ENGINE

FLAG = "__index_timestep_zero__"
ADDITION = "time_text_embed.addition_t_embedding.weight"
EDIT = QWEN_IMAGE.config | {"zero_cond_t": True}
LAYERED = QWEN_IMAGE.config | {"use_additional_t_cond": True, "use_layer3d_rope": True}


def written(path, shapes):
    rng, file = np.random.default_rng(5), FluxFile()
    for name, shape in shapes.items():
        kind = "Q8_0" if len(shape) == 2 and name not in QWEN_IMAGE.plain else "F32"
        data = (
            random_tensor(rng, shape, kind, 0.1, 1.0 if "norm" in name and len(shape) == 1 else 0.0) if np.prod(shape) else None
        )
        file.tensors[name] = (np.zeros(shape, np.float32) if data is None else data, kind, shape)
    return file, file.write(path)


def oracle(file, config):
    model = diffusers.QwenImageTransformer2DModel(**config).eval()
    values = {name: torch.from_numpy(value) for name, value in file.values().items() if name != FLAG}
    model.load_state_dict(values, strict=True)
    return model


@pytest.mark.parametrize("shape", [(0,), (1,)])
@torch.inference_mode()
def test_edit_2511_takes_reference_pictures_as_of_time_0(tmp_path, shape):
    """Its mark is an empty tensor, which comes back when the model is saved."""
    file, path = written(tmp_path / "edit.gguf", QWEN_IMAGE.shapes | {FLAG: shape})
    model = load_transformer(path, dtype=torch.float32, backend="torch")
    inputs = QWEN_IMAGE.inputs(torch.Generator().manual_seed(1)) | {"img_shapes": [[(1, 2, 3), (1, 2, 3)]]}
    result = model(**inputs, return_dict=False)[0]
    torch.testing.assert_close(result, oracle(file, EDIT)(**inputs, return_dict=False)[0], rtol=0, atol=0)
    assert not torch.equal(result, oracle(file, QWEN_IMAGE.config)(**inputs, return_dict=False)[0])
    save_gguf(model, tmp_path / "again.gguf")
    assert read_gguf(tmp_path / "again.gguf").tensors[FLAG].shape == (0,)
    assert load_transformer(tmp_path / "again.gguf").config.zero_cond_t


@torch.inference_mode()
def test_layered(tmp_path):
    file, path = written(tmp_path / "layered.gguf", QWEN_IMAGE.shapes | {ADDITION: (2, 256)})
    model = load_transformer(path, dtype=torch.float32, backend="torch")
    inputs = QWEN_IMAGE.inputs(torch.Generator().manual_seed(1))
    inputs |= {"img_shapes": [[(1, 2, 3), (1, 2, 3)]], "additional_t_cond": torch.tensor([1])}
    expected = oracle(file, LAYERED)(**inputs, return_dict=False)[0]
    torch.testing.assert_close(model(**inputs, return_dict=False)[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("folder", [False, True], ids=["ComfyUI's file", "a folder of diffusers"])
def test_the_mark_of_edit_2511_is_written(tmp_path, folder):
    """ComfyUI knows the model by it alone, so a file made from diffusers' folder gets it too."""
    values = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in QWEN_IMAGE.shapes.items()}
    values |= {} if folder else {FLAG: torch.empty(0)}
    save_file(values, tmp_path / "diffusion_pytorch_model.safetensors")
    if folder:
        config = {"_class_name": QWEN_IMAGE.model_class, **EDIT}
        (tmp_path / "config.json").write_text(json.dumps(config))
    source = tmp_path if folder else tmp_path / "diffusion_pytorch_model.safetensors"
    prepare(source, Request(type="Q8_0"), provenance=False, device="cpu", engine=ENGINE).write(tmp_path / "made.gguf")
    made = read_gguf(tmp_path / "made.gguf")
    assert made.tensors.keys() == QWEN_IMAGE.shapes.keys() | {FLAG}
    assert load_transformer(tmp_path / "made.gguf").config.zero_cond_t


def test_mage_flow_is_refused_by_name(tmp_path):
    """It has Qwen-Image's tensors, and diffusers no class for it."""
    shapes = QWEN_IMAGE.shapes | {"img_in.weight": (256, 128), "proj_out.weight": (128, 256), "proj_out.bias": (128,)}
    _, path = written(tmp_path / "x.gguf", shapes)
    with pytest.raises(GGUFError, match="this is Mage-Flow"):
        load_transformer(path)
