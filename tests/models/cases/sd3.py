"""Stable Diffusion 3 and 3.5, from the tensors that stable-diffusion.cpp's mmdit.hpp creates."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

from .case import Case, Published, Shapes


def _linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norms(attention: str, head: int) -> Shapes:
    return {f"{attention}.ln_{name}.weight": (head,) for name in ("q", "k")} if head else {}


def _shapes(h: int, head: int, depth: int, dual: int, side: int, text: int, pooled: int) -> Shapes:
    """`head` is 0 without norms of q and k; the first `dual` blocks have a second attention."""
    shapes: Shapes = {"pos_embed": (1, side * side, h), "x_embedder.proj.weight": (h, 16, 2, 2), "x_embedder.proj.bias": (h,)}
    shapes |= _linear("t_embedder.mlp.0", h, 256) | _linear("t_embedder.mlp.2", h, h)
    shapes |= _linear("y_embedder.mlp.0", h, pooled) | _linear("y_embedder.mlp.2", h, h)
    shapes |= _linear("context_embedder", h, text)
    for i in range(depth):
        context, x, last = f"joint_blocks.{i}.context_block", f"joint_blocks.{i}.x_block", i == depth - 1
        shapes |= _linear(f"{context}.attn.qkv", 3 * h, h) | _norms(f"{context}.attn", head)
        shapes |= _linear(f"{context}.adaLN_modulation.1", (2 if last else 6) * h, h)
        if not last:
            shapes |= _linear(f"{context}.attn.proj", h, h)
            shapes |= _linear(f"{context}.mlp.fc1", 4 * h, h) | _linear(f"{context}.mlp.fc2", h, 4 * h)
        for attention in (f"{x}.attn", f"{x}.attn2") if i < dual else (f"{x}.attn",):
            shapes |= _linear(f"{attention}.qkv", 3 * h, h) | _linear(f"{attention}.proj", h, h) | _norms(attention, head)
        shapes |= _linear(f"{x}.adaLN_modulation.1", (9 if i < dual else 6) * h, h)
        shapes |= _linear(f"{x}.mlp.fc1", 4 * h, h) | _linear(f"{x}.mlp.fc2", h, 4 * h)
    return shapes | _linear("final_layer.linear", 64, h) | _linear("final_layer.adaLN_modulation.1", 2 * h, h)


def _config(h: int, head: int, depth: int, dual: int, side: int, text: int, pooled: int) -> dict[str, Any]:
    return {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "num_layers": depth,
        "attention_head_dim": 64,
        "num_attention_heads": h // 64,
        "joint_attention_dim": text,
        "caption_projection_dim": h,
        "pooled_projection_dim": pooled,
        "out_channels": 16,
        "pos_embed_max_size": side,
        "dual_attention_layers": tuple(range(dual)),
        "qk_norm": "rms_norm" if head else None,
    }


def _inputs(generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 16, 8, 12, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, 512, generator=generator),
        "pooled_projections": torch.randn(1, 256, generator=generator),
        "timestep": torch.tensor([700.0]),
    }


def _published(
    tensors: int, parameters: int, h: int, head: int, depth: int, dual: int, side: int, title: str = "true"
) -> Published:
    sizes = (h, head, depth, dual, side, 4096, 2048)
    return Published(_shapes(*sizes), _config(*sizes), tensors, parameters, title)


_LARGE = (38 * 24 - 6 + 17, 8_060_000_000 + 192**2 * 2432, 2432, 64, 38, 0, 192)
_SMALL = (256, 64, 3, 2, 8, 512, 256)

SD3 = Case(
    name="Stable Diffusion 3",
    gguf_name="sd3",
    model_class="SD3Transformer2DModel",
    shapes=_shapes(*_SMALL),
    config=_config(*_SMALL),
    convert=convert_sd3_transformer_checkpoint_to_diffusers,
    inputs=_inputs,
    # Tensors: 24 a block with norms, 20 without, 6 more with a second attention, 6 fewer in the last; 17 outside. Parameters:
    # those that are quoted of them (8.06, 2.24 and 2.03 billion), and the table of positions, which they do not count.
    published={
        "SD3.5-large": _published(*_LARGE, "sd3.5_large-Q4_0"),
        "SD3.5-large-turbo": _published(*_LARGE, "sd3.5_large_turbo-Q4_0"),
        "SD3.5-medium": _published(24 * 24 + 13 * 6 - 6 + 17, 2_240_000_000 + 384**2 * 1536, 1536, 64, 24, 13, 384),
        "SD3-medium": _published(24 * 20 - 6 + 17, 2_030_000_000 + 192**2 * 1536, 1536, 0, 24, 0, 192),
    },
    plain=frozenset(
        f"{name}.weight"
        for name in (
            *("t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.mlp.0", "y_embedder.mlp.2", "context_embedder"),
            *("final_layer.linear", "final_layer.adaLN_modulation.1"),
        )
    ),
)
