"""Z-Image, from the table of its tensors in stable-diffusion.cpp's z_image.hpp."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers

from .case import Case, Published, Shapes


def _shapes(h: int, mlp: int, head: int, layers: int, refiners: int, text: int) -> Shapes:
    shapes: Shapes = {"x_embedder.weight": (h, 64), "x_embedder.bias": (h,), "x_pad_token": (1, h), "cap_pad_token": (1, h)}
    shapes |= {"t_embedder.mlp.0.weight": (1024, 256), "t_embedder.mlp.0.bias": (1024,)}
    shapes |= {"t_embedder.mlp.2.weight": (256, 1024), "t_embedder.mlp.2.bias": (256,)}
    shapes |= {"cap_embedder.0.weight": (text,), "cap_embedder.1.weight": (h, text), "cap_embedder.1.bias": (h,)}
    for blocks, count in (("noise_refiner", refiners), ("context_refiner", refiners), ("layers", layers)):
        for i in range(count):
            block = f"{blocks}.{i}"
            shapes |= {f"{block}.attention.qkv.weight": (3 * h, h), f"{block}.attention.out.weight": (h, h)}
            shapes |= {f"{block}.attention.{name}_norm.weight": (head,) for name in ("q", "k")}
            shapes |= {f"{block}.feed_forward.{name}.weight": (mlp, h) for name in ("w1", "w3")}
            shapes[f"{block}.feed_forward.w2.weight"] = (h, mlp)
            shapes |= {f"{block}.{name}_norm{number}.weight": (h,) for name in ("attention", "ffn") for number in (1, 2)}
            if blocks != "context_refiner":
                shapes |= {f"{block}.adaLN_modulation.0.weight": (4 * h, 256), f"{block}.adaLN_modulation.0.bias": (4 * h,)}
    shapes |= {"final_layer.adaLN_modulation.1.weight": (h, 256), "final_layer.adaLN_modulation.1.bias": (h,)}
    return shapes | {"final_layer.linear.weight": (64, h), "final_layer.linear.bias": (64,)}


def _config(heads: int, layers: int, refiners: int, text: int) -> dict[str, Any]:
    return {
        "all_patch_size": (2,),
        "all_f_patch_size": (1,),
        "in_channels": 16,
        "dim": 128 * heads,
        "n_layers": layers,
        "n_refiner_layers": refiners,
        "n_heads": heads,
        "n_kv_heads": heads,
        "norm_eps": 1e-5,
        "qk_norm": True,
        "cap_feat_dim": text,
        "siglip_feat_dim": None,
        "rope_theta": 256.0,
        "t_scale": 1000.0,
        "axes_dims": (32, 48, 48),
        "axes_lens": (1024, 512, 512),
    }


def _inputs(generator: torch.Generator) -> dict[str, Any]:
    """Two pictures, which the model takes as a list, with prompts of two lengths."""
    return {
        "x": [torch.randn(16, 1, 8, 6, generator=generator) for _ in range(2)],
        "t": torch.tensor([0.3, 0.3]),
        "cap_feats": [torch.randn(tokens, 256, generator=generator) for tokens in (40, 7)],
    }


def _plain() -> frozenset[str]:
    outside = ("x_embedder", "t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1", "final_layer.linear")
    inside = ("attention.qkv", "attention.out", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0")
    refiners = [f"{blocks}_refiner.{i}.{name}" for blocks in ("noise", "context") for i in range(2) for name in inside]
    matrices = (*outside, "final_layer.adaLN_modulation.1", *refiners)
    return frozenset(f"{name}.weight" for name in matrices) | {"x_pad_token", "cap_pad_token"}


_FULL = _shapes(3840, 10240, 128, 30, 2, 2560), _config(30, 30, 2, 2560), 453, 6_150_000_000

Z_IMAGE = Case(
    name="Z-Image",
    gguf_name="lumina2",
    model_class="ZImageTransformer2DModel",
    # A width of which 8 thirds are whole K-quant blocks too.
    shapes=_shapes(768, 2048, 128, 1, 1, 256),
    config=_config(6, 1, 1, 256),
    convert=convert_z_image_transformer_checkpoint_to_diffusers,
    inputs=_inputs,
    # Parameters as reviews of the model state them; tensors: the sum of the table, 32 x 13 + 2 x 11 + 15, no listing was at hand.
    published={
        "Z-Image-Turbo": Published(*_FULL, "z_image_turbo-Q4_K_M"),
        "Z-Image": Published(*_FULL, "z-image-base-Q4_K_M"),
    },
    plain=_plain(),
)
