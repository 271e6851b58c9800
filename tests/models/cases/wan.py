"""Wan, from the tensors that stable-diffusion.cpp's wan.hpp creates."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from torch import Tensor

from .case import Case, Published, Shapes


def _linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _shapes(dim: int, ffn: int, layers: int, channels: int, out: int, text: int, image: int = 0, positions: int = 0) -> Shapes:
    shapes: Shapes = {"patch_embedding.weight": (dim, channels, 1, 2, 2), "patch_embedding.bias": (dim,)}
    shapes |= _linear("text_embedding.0", dim, text) | _linear("text_embedding.2", dim, dim)
    shapes |= _linear("time_embedding.0", dim, 256) | _linear("time_embedding.2", dim, dim)
    shapes |= _linear("time_projection.1", 6 * dim, dim)
    for i in range(layers):
        block = f"blocks.{i}"
        for attention in (f"{block}.self_attn", f"{block}.cross_attn"):
            for name in ("q", "k", "v", "o"):
                shapes |= _linear(f"{attention}.{name}", dim, dim)
            shapes |= {f"{attention}.norm_q.weight": (dim,), f"{attention}.norm_k.weight": (dim,)}
        if image:
            shapes |= _linear(f"{block}.cross_attn.k_img", dim, dim) | _linear(f"{block}.cross_attn.v_img", dim, dim)
            shapes[f"{block}.cross_attn.norm_k_img.weight"] = (dim,)
        shapes |= {f"{block}.norm3.weight": (dim,), f"{block}.norm3.bias": (dim,)}
        shapes |= _linear(f"{block}.ffn.0", ffn, dim) | _linear(f"{block}.ffn.2", dim, ffn)
        shapes[f"{block}.modulation"] = (1, 6, dim)
    shapes |= _linear("head.head", 4 * out, dim) | {"head.modulation": (1, 2, dim)}
    if image:
        for norm, size in (("img_emb.proj.0", image), ("img_emb.proj.4", dim)):
            shapes |= {f"{norm}.weight": (size,), f"{norm}.bias": (size,)}
        shapes |= _linear("img_emb.proj.1", image, image) | _linear("img_emb.proj.3", dim, image)
    if positions:
        shapes["img_emb.emb_pos"] = (1, positions, image)
    return shapes


def _config(dim: int, ffn: int, layers: int, channels: int, out: int, text: int, image: int, positions: int) -> dict[str, Any]:
    return {
        "patch_size": (1, 2, 2),
        "num_attention_heads": dim // 128,
        "attention_head_dim": 128,
        "in_channels": channels,
        "out_channels": out,
        "text_dim": text,
        "freq_dim": 256,
        "ffn_dim": ffn,
        "num_layers": layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": image or None,
        "added_kv_proj_dim": dim if image else None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": positions or None,
    }


def _convert(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Diffusers converts all but the positions of a first and a last picture."""
    converted = convert_wan_transformer_to_diffusers(values)
    positions = converted.pop("img_emb.emb_pos", None)
    return converted if positions is None else converted | {"condition_embedder.image_embedder.pos_embed": positions}


def _inputs(generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 36, 2, 4, 6, generator=generator),
        "timestep": torch.tensor([700]),
        "encoder_hidden_states": torch.randn(1, 5, 512, generator=generator),
        # Of a first and a last picture.
        "encoder_hidden_states_image": torch.randn(2, 3, 128, generator=generator),
    }


def _published(
    tensors: int, parameters: int, dim: int, ffn: int, layers: int, channels: int, out: int, image: int = 0, positions: int = 0
) -> Published:
    sizes = (dim, ffn, layers, channels, out, 4096, image, positions)
    return Published(_shapes(*sizes), _config(*sizes), tensors, parameters)


_SMALL = (256, 512, 2, 36, 16, 512, 128, 6)

WAN = Case(
    name="Wan",
    gguf_name="wan",
    model_class="WanTransformer3DModel",
    shapes=_shapes(*_SMALL),
    config=_config(*_SMALL),
    convert=_convert,
    inputs=_inputs,
    # Tensors: 27 a block, 5 more with pictures, and 15, 23 or 24 outside. Parameters: half the bytes that are
    # quoted of 16-bit files (28.6, 32.8, 10.0 and 2.84 GB); none was at hand.
    published={
        "Wan2.2-T2V-A14B": _published(40 * 27 + 15, 14_290_000_000, 5120, 13824, 40, 16, 16),
        "Wan2.2-I2V-A14B": _published(40 * 27 + 15, 14_290_000_000, 5120, 13824, 40, 36, 16),
        "Wan2.2-TI2V-5B": _published(30 * 27 + 15, 5_000_000_000, 3072, 14336, 30, 48, 48),
        "Wan2.1-T2V-1.3B": _published(30 * 27 + 15, 1_420_000_000, 1536, 8960, 30, 16, 16),
        "Wan2.1-I2V-14B": _published(40 * 32 + 23, 16_400_000_000, 5120, 13824, 40, 36, 16, 1280),
        "Wan2.1-FLF2V-14B": _published(40 * 32 + 24, 16_400_000_000, 5120, 13824, 40, 36, 16, 1280, 514),
    },
    plain=frozenset(
        f"{name}.weight"
        for name in (
            *("text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2", "time_projection.1", "head.head"),
            *("img_emb.proj.1", "img_emb.proj.3"),
        )
    ),
)
