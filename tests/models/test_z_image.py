"""Z-Image's relatives, and what its files have in common with no other architecture's."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers

from flux_kernels import load_transformer
from flux_kernels.errors import GGUFError
from flux_kernels.models.types import tensor_types

from ..flux_files import FluxFile, random_tensor
from .cases.z_image import Z_IMAGE

# The siglip tensors of an Omni model: its text width, its features' width, blocks as those of the text.
OMNI = {"siglip_embedder.0.weight": (96,), "siglip_embedder.1.weight": (96, 96), "siglip_embedder.1.bias": (96,)}
PADS = ("x_pad_token", "cap_pad_token")


def tiny(**changes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a file of width 96, with heads of 48."""
    sizes = {768: 96, 3 * 768: 288, 4 * 768: 384, 2048: 256, 128: 48}
    inner = {name: tuple(sizes.get(size, size) for size in shape) for name, shape in Z_IMAGE.shapes.items()}
    for name in inner:
        # These have 256 of something else.
        if name.startswith("t_embedder."):
            inner[name] = Z_IMAGE.shapes[name]
        elif ".adaLN_modulation." in name and name.endswith("weight"):
            inner[name] = (inner[name][0], 96)
    inner["t_embedder.mlp.2.weight"], inner["t_embedder.mlp.2.bias"] = (96, 1024), (96,)
    return inner | changes


def written(path, shapes):
    rng, file = np.random.default_rng(3), FluxFile()
    for name, shape in shapes.items():
        kind = "Q8_0" if len(shape) == 2 and shape[-1] % 32 == 0 and not name.endswith("pad_token") else "F32"
        norm = "norm" in name or name == "cap_embedder.0.weight"
        file.tensors[name] = (random_tensor(rng, shape, kind, 0.1, 1.0 if norm else 0.0), kind, shape)
    return file, file.write(path)


def oracle(file, **config):
    sizes = dict(dim=96, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=256, axes_dims=[12, 18, 18])
    model = diffusers.ZImageTransformer2DModel(**sizes, **config).eval()
    values = {name: torch.from_numpy(value) for name, value in file.values().items()}
    values |= {name: values[name].reshape(1, -1) for name in values if name.endswith("pad_token")}
    model.load_state_dict(convert_z_image_transformer_checkpoint_to_diffusers(values), strict=True)
    return model


def pictures(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


@torch.inference_mode()
def test_files_of_other_converters(tmp_path):
    """Some drop the pad tokens' leading 1, as stable-diffusion.cpp; the makers' hold an unused norm."""
    file, path = written(tmp_path / "x.gguf", tiny(x_pad_token=(96,), cap_pad_token=(96,)) | {"norm_final.weight": (96,)})
    model, expected = load_transformer(path, dtype=torch.float32, backend="torch"), oracle(file)
    inputs = dict(x=pictures((16, 1, 8, 6)), t=torch.tensor([0.3]), cap_feats=pictures((7, 256)), return_dict=False)
    assert model.x_pad_token.shape == (1, 96)
    torch.testing.assert_close(model(**inputs)[0], expected(**inputs)[0], rtol=0, atol=0)


@torch.inference_mode()
def test_omni_draws_from_pictures_too(tmp_path):
    shapes = tiny() | OMNI | {"siglip_pad_token": (1, 96)}
    shapes |= {name.replace("context", "siglip"): shape for name, shape in shapes.items() if name.startswith("context_")}
    file, path = written(tmp_path / "omni.gguf", shapes)
    model = load_transformer(path, dtype=torch.float32, backend="torch")
    assert model.config.siglip_feat_dim == 96
    latents = pictures((16, 1, 8, 6), (16, 1, 8, 6))
    inputs = dict(
        x=[latents],
        t=torch.tensor([0.3]),
        cap_feats=[pictures((7, 256), (4, 256), (3, 256))],
        siglip_feats=[[*pictures((2, 2, 96)), None]],
        image_noise_mask=[[0, 1]],
        return_dict=False,
    )
    expected = oracle(file, siglip_feat_dim=96)
    torch.testing.assert_close(model(**inputs)[0], expected(**inputs)[0], rtol=0, atol=0)


def test_pad_tokens_stay_in_32_bit():
    """ComfyUI-GGUF decodes layers alone: it takes the bytes of a BF16 pad token for numbers."""
    types = tensor_types("new", "Q4_K_M", Z_IMAGE.shapes)
    assert {types[name] for name in PADS} == {"F32"}
    assert types["noise_refiner.0.attention.qkv.weight"] == "BF16"
    assert types["layers.0.attention.qkv.weight"] == "Q5_K" and types["layers.0.feed_forward.w2.weight"] == "Q6_K"


def test_fewer_key_heads_are_refused(tmp_path):
    """Files can say so by shapes alone, and diffusers' class has none."""
    _, path = written(tmp_path / "x.gguf", tiny() | {"layers.0.attention.qkv.weight": (192, 96)})
    with pytest.raises(GGUFError, match=r"layers.0.attention.qkv.weight is 192 x 96, should be 288 x 96"):
        load_transformer(path)
