"""Qwen-Image, from the table of its tensors in stable-diffusion.cpp's qwen_image.hpp."""

from __future__ import annotations

from typing import Any

import torch

from .case import Case, Published, Shapes


def _shapes(h: int, head: int, layers: int, text: int) -> Shapes:
    shapes: Shapes = {"txt_norm.weight": (text,)}

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        shapes[f"{name}.bias"] = (rows,)

    linear("time_text_embed.timestep_embedder.linear_1", h, 256)
    linear("time_text_embed.timestep_embedder.linear_2", h, h)
    linear("img_in", h, 64)
    linear("txt_in", h, text)
    for i in range(layers):
        block = f"transformer_blocks.{i}"
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            linear(f"{block}.attn.{name}", h, h)
        shapes |= {f"{block}.attn.{name}.weight": (head,) for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")}
        for stream in ("img", "txt"):
            linear(f"{block}.{stream}_mod.1", 6 * h, h)
            linear(f"{block}.{stream}_mlp.net.0.proj", 4 * h, h)
            linear(f"{block}.{stream}_mlp.net.2", h, 4 * h)
    linear("norm_out.linear", 2 * h, h)
    linear("proj_out", 64, h)
    return shapes


def _config(heads: int, head: int, layers: int, text: int) -> dict[str, Any]:
    return {
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": layers,
        "attention_head_dim": head,
        "num_attention_heads": heads,
        "joint_attention_dim": text,
        "guidance_embeds": False,
        "axes_dims_rope": (head // 8, head // 16 * 7, head // 16 * 7),
        "zero_cond_t": False,
        "use_additional_t_cond": False,
        "use_layer3d_rope": False,
    }


def _inputs(generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 12, 64, generator=generator),
        "encoder_hidden_states": torch.randn(1, 6, 256, generator=generator),
        "encoder_hidden_states_mask": torch.tensor([[True] * 5 + [False]]),
        "timestep": torch.tensor([0.7]),
        "img_shapes": [[(1, 4, 3)]],
    }


_FULL = _shapes(3072, 128, 60, 3584), _config(24, 128, 60, 3584)
_LAYERED = {"use_additional_t_cond": True, "use_layer3d_rope": True}

QWEN_IMAGE = Case(
    name="Qwen-Image",
    gguf_name="qwen_image",
    model_class="QwenImageTransformer2DModel",
    shapes=_shapes(256, 64, 2, 256),
    config=_config(4, 64, 2, 256),
    # The makers' names are diffusers' own.
    convert=dict,
    inputs=_inputs,
    # Tensors of Edit-2511: a listing of unsloth's GGUF file. The other counts and the parameters are sums of the table.
    published={
        "Qwen-Image": Published(*_FULL, 1933, 20_430_000_000, "qwen-image-2512-Q4_K"),
        "Qwen-Image-Edit": Published(*_FULL, 1933, 20_430_000_000, "Qwen-Image-Edit-2509-Q4_K_M"),
        "Qwen-Image-Edit-2511": Published(
            _FULL[0] | {"__index_timestep_zero__": (0,)}, _FULL[1] | {"zero_cond_t": True}, 1934, 20_430_000_000
        ),
        "Qwen-Image-Layered": Published(
            _FULL[0] | {"time_text_embed.addition_t_embedding.weight": (2, 3072)}, _FULL[1] | _LAYERED, 1934, 20_430_000_000
        ),
    },
    plain=frozenset(
        f"{name}.weight"
        for name in (
            *("img_in", "txt_in", "norm_out.linear", "proj_out", "time_text_embed.addition_t_embedding"),
            *(f"time_text_embed.timestep_embedder.linear_{number}" for number in (1, 2)),
        )
    ),
)
