"""FLUX.2, from the table of its tensors in stable-diffusion.cpp's flux.hpp."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers

from .case import Case, Published, Shapes


def _shapes(h: int, head: int, double: int, single: int, text: int, guidance: bool, channels: int = 128) -> Shapes:
    shapes: Shapes = {"img_in.weight": (h, channels), "txt_in.weight": (h, text)}
    for embedder in ("time_in", "guidance_in") if guidance else ("time_in",):
        shapes |= {f"{embedder}.in_layer.weight": (h, 256), f"{embedder}.out_layer.weight": (h, h)}
    for stream in ("img", "txt"):
        shapes[f"double_stream_modulation_{stream}.lin.weight"] = (6 * h, h)
    shapes["single_stream_modulation.lin.weight"] = (3 * h, h)
    for i in range(double):
        for stream in (f"double_blocks.{i}.img", f"double_blocks.{i}.txt"):
            shapes[f"{stream}_attn.qkv.weight"] = (3 * h, h)
            shapes |= {f"{stream}_attn.norm.{kind}_norm.scale": (head,) for kind in ("query", "key")}
            shapes[f"{stream}_attn.proj.weight"] = (h, h)
            shapes[f"{stream}_mlp.0.weight"] = (6 * h, h)
            shapes[f"{stream}_mlp.2.weight"] = (h, 3 * h)
    for i in range(single):
        block = f"single_blocks.{i}"
        shapes |= {f"{block}.linear1.weight": (9 * h, h), f"{block}.linear2.weight": (h, 4 * h)}
        shapes |= {f"{block}.norm.{kind}_norm.scale": (head,) for kind in ("query", "key")}
    return shapes | {"final_layer.adaLN_modulation.1.weight": (2 * h, h), "final_layer.linear.weight": (channels, h)}


def _config(heads: int, head: int, double: int, single: int, text: int, guidance: bool) -> dict[str, Any]:
    return {
        "patch_size": 1,
        "in_channels": 128,
        "out_channels": None,
        "num_layers": double,
        "num_single_layers": single,
        "attention_head_dim": head,
        "num_attention_heads": heads,
        "joint_attention_dim": text,
        "timestep_guidance_channels": 256,
        "mlp_ratio": 3.0,
        "axes_dims_rope": (head // 4,) * 4,
        "rope_theta": 2000,
        "eps": 1e-6,
        "guidance_embeds": guidance,
    }


def _inputs(generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 6, 128, generator=generator),
        "encoder_hidden_states": torch.randn(1, 4, 512, generator=generator),
        "timestep": torch.tensor([0.7]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.tensor([[[0.0, i // 3, i % 3, 0] for i in range(6)]]),
        "txt_ids": torch.tensor([[[0.0, 0, 0, i] for i in range(4)]]),
    }


def _published(
    heads: int, double: int, single: int, text: int, guidance: bool, tensors: int, parameters: int, title: str = "true"
) -> Published:
    shapes = _shapes(128 * heads, 128, double, single, text, guidance)
    return Published(shapes, _config(heads, 128, double, single, text, guidance), tensors, parameters, title)


_KLEIN_9B = (32, 8, 24, 12288, False, 201, 9_080_000_000)
_KLEIN_4B = (24, 5, 20, 7680, False, 149, 3_870_000_000)


FLUX2 = Case(
    name="FLUX.2",
    gguf_name="flux",
    model_class="Flux2Transformer2DModel",
    shapes=_shapes(256, 64, 1, 2, 512, guidance=True),
    config=_config(4, 64, 1, 2, 512, True),
    convert=convert_flux2_transformer_checkpoint_to_diffusers,
    inputs=_inputs,
    # Parameters in billions as their makers state them, to the digits that they give.
    published={
        "FLUX.2-dev": _published(48, 8, 48, 15360, True, 299, 32_200_000_000),
        "FLUX.2-klein-9B": _published(*_KLEIN_9B, "flux-2-klein-9b-distilled-Q4_K"),
        "FLUX.2-klein-base-9B": _published(*_KLEIN_9B, "flux-2-klein-base-9b-Q4_K"),
        "FLUX.2-klein-4B": _published(*_KLEIN_4B, "flux-2-klein-4b-distilled-Q4_K"),
        "FLUX.2-klein-base-4B": _published(*_KLEIN_4B, "FLUX.2-klein-base-4B-Q4_K"),
    },
    plain=frozenset(
        f"{name}.weight"
        for name in (
            *("img_in", "txt_in", "time_in.in_layer", "time_in.out_layer", "guidance_in.in_layer", "guidance_in.out_layer"),
            *("final_layer.linear", "final_layer.adaLN_modulation.1"),
        )
    ),
)
