"""Chroma, from stable-diffusion.cpp's flux.hpp and the listing in diffusers' issue 11010."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_chroma_transformer_checkpoint_to_diffusers
from torch import Tensor

from .case import Case, Published, Shapes


def _shapes(h: int, head: int, double: int, single: int, text: int, wide: int, layers: int) -> Shapes:
    shapes: Shapes = {}

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        shapes[f"{name}.bias"] = (rows,)

    linear("img_in", h, 64)
    linear("txt_in", h, text)
    linear("distilled_guidance_layer.in_proj", wide, 64)
    for i in range(layers):
        linear(f"distilled_guidance_layer.layers.{i}.in_layer", wide, wide)
        linear(f"distilled_guidance_layer.layers.{i}.out_layer", wide, wide)
        shapes[f"distilled_guidance_layer.norms.{i}.scale"] = (wide,)
    linear("distilled_guidance_layer.out_proj", h, wide)
    for i in range(double):
        for stream in (f"double_blocks.{i}.img", f"double_blocks.{i}.txt"):
            linear(f"{stream}_attn.qkv", 3 * h, h)
            shapes |= {f"{stream}_attn.norm.{kind}_norm.scale": (head,) for kind in ("query", "key")}
            linear(f"{stream}_attn.proj", h, h)
            linear(f"{stream}_mlp.0", 4 * h, h)
            linear(f"{stream}_mlp.2", h, 4 * h)
    for i in range(single):
        linear(f"single_blocks.{i}.linear1", 7 * h, h)
        linear(f"single_blocks.{i}.linear2", h, 5 * h)
        shapes |= {f"single_blocks.{i}.norm.{kind}_norm.scale": (head,) for kind in ("query", "key")}
    linear("final_layer.linear", 64, h)
    return shapes


def _config(heads: int, head: int, double: int, single: int, text: int, wide: int, layers: int) -> dict[str, Any]:
    return {
        "patch_size": 1,
        "in_channels": 64,
        "out_channels": None,
        "num_layers": double,
        "num_single_layers": single,
        "attention_head_dim": head,
        "num_attention_heads": heads,
        "joint_attention_dim": text,
        "axes_dims_rope": {128: (16, 56, 56), 64: (8, 28, 28)}[head],
        "approximator_num_channels": 64,
        "approximator_hidden_dim": wide,
        "approximator_layers": layers,
    }


@cache
def _conversion(width: int):
    """Return diffusers' conversion for another width than the one it has hard-coded."""
    source = inspect.getsource(convert_chroma_transformer_checkpoint_to_diffusers)
    assert source.count("inner_dim = 3072") == 1
    namespace = {"torch": torch}
    exec(source.replace("inner_dim = 3072", f"inner_dim = {width}"), namespace)  # noqa: S102 (the source is diffusers' own)
    return namespace["convert_chroma_transformer_checkpoint_to_diffusers"]


def _convert(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    return _conversion(checkpoint["img_in.weight"].shape[0])(checkpoint)


def _inputs(generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 6, 64, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, 512, generator=generator),
        "timestep": torch.tensor([0.7]),
        "img_ids": torch.tensor([[0.0, i // 3, i % 3] for i in range(6)]),
        "txt_ids": torch.zeros(5, 3),
        # The pipeline always passes a mask: one padding token of the prompt stays seen.
        "attention_mask": torch.tensor([[True] * 4 + [False] + [True] * 6]),
    }


CHROMA = Case(
    name="Chroma",
    gguf_name="flux",
    model_class="ChromaTransformer2DModel",
    shapes=_shapes(256, 64, 1, 2, 512, 256, 2),
    config=_config(4, 64, 1, 2, 512, 256, 2),
    convert=_convert,
    inputs=_inputs,
    # The model card: 8.9 billion parameters; 643 tensors are those of FLUX.1-schnell's 776 less 19 x 4 + 38 x 2 of modulation and
    # 4 + 4 + 2 of embedders and final layer, and 29 of the approximator more.
    published={
        "Chroma1": Published(
            _shapes(3072, 128, 19, 38, 4096, 5120, 5), _config(24, 128, 19, 38, 4096, 5120, 5), 643, 8_900_000_000
        )
    },
    plain=frozenset(
        f"{name}.weight" for name in ("img_in", "txt_in", "final_layer.linear", "distilled_guidance_layer.in_proj")
    ),
)
