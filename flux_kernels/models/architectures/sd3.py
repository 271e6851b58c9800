"""Stable Diffusion 3.5 (large, large-turbo, medium with its second attention) and 3 (medium).

Source: diffusers' SD3Transformer2DModel and its conversion of single files; stable-diffusion.cpp's mmdit.hpp.
"""

from __future__ import annotations

from math import isqrt, prod
from typing import Any

from ...errors import GGUFError
from ..architecture import WITH_DIFFUSERS, Architecture, Link, Mark, Variant, parameter
from ..stored_shapes import StoredShapes

# Where no norm shows it.
_HEAD = 64
# Numbers in a table of positions; medium's has 2^27.8.
_MOST_POSITIONS = 2**30
_EMBED, _BLOCK = "time_text_embed", "transformer_blocks.{i}"
# Medium's first blocks attend to the picture twice.
_DUAL = tuple(range(13))


def _attention(original: str, diffusers: str, q: str, k: str, v: str, out: str, scale: str) -> tuple[Link, ...]:
    ours, theirs = f"joint_blocks.{{i}}.{original}", f"{_BLOCK}.{diffusers}"
    return (
        Link(f"{ours}.qkv", (f"{theirs}.{q}", f"{theirs}.{k}", f"{theirs}.{v}")),
        Link(f"{ours}.ln_q", (f"{theirs}.{scale}q",)),
        Link(f"{ours}.ln_k", (f"{theirs}.{scale}k",)),
        Link(f"{ours}.proj", (f"{theirs}.{out}",)),
    )


def _rest_of_stream(original: str, context: str, swap_halves: bool | str) -> tuple[Link, ...]:
    ours = f"joint_blocks.{{i}}.{original}"
    return (
        Link(f"{ours}.adaLN_modulation.1", (f"{_BLOCK}.norm1{context}.linear",), swap_halves=swap_halves),
        Link(f"{ours}.mlp.fc1", (f"{_BLOCK}.ff{context}.net.0.proj",)),
        Link(f"{ours}.mlp.fc2", (f"{_BLOCK}.ff{context}.net.2",)),
    )


def _config(stored: StoredShapes) -> dict[str, Any]:
    width, in_channels, patch, _ = stored.shape("pos_embed.proj.weight", 4)
    rows, _ = stored.matrix("proj_out.weight")
    caption_dim, joint_dim = stored.matrix("context_embedder.weight")
    _, pooled_dim = stored.matrix(f"{_EMBED}.text_embedder.linear_1.weight")
    num_layers = stored.blocks("transformer_blocks")
    norm = "transformer_blocks.0.attn.norm_q.weight"
    head_dim = stored.length(norm) if stored.has(norm) else _HEAD
    second = (f"transformer_blocks.{index}.attn2.to_out.0.weight" for index in range(num_layers))
    return {
        "patch_size": patch,
        "in_channels": in_channels,
        "num_layers": num_layers,
        "attention_head_dim": head_dim,
        "num_attention_heads": stored.heads(width, head_dim),
        "joint_attention_dim": joint_dim,
        "caption_projection_dim": caption_dim,
        "pooled_projection_dim": pooled_dim,
        "out_channels": rows // patch**2,
        "pos_embed_max_size": _side(stored, width),
        "dual_attention_layers": tuple(index for index, name in enumerate(second) if stored.has(name)),
        "qk_norm": "rms_norm" if stored.has(norm) else None,
    }


def _side(stored: StoredShapes, width: int) -> int:
    """Return the side of the square of positions.

    The model computes them before the file's take their place.

    Raises:
        GGUFError: where it is no square, or far larger than any model's.
    """
    numbers = prod(stored.sizes("pos_embed.pos_embed"))
    side = isqrt(numbers // width)
    if side * side * width != numbers or numbers > _MOST_POSITIONS:
        raise GGUFError(
            f"The file's pos_embed holds {numbers} numbers; at width {width} it is a square of positions, of at most "
            f"{_MOST_POSITIONS} numbers. The file is damaged."
        )
    return side


def _sizes(layers: int, heads: int, qk_norm: str | None, positions: int, dual: tuple[int, ...] = ()) -> dict[str, Any]:
    sizes = {"num_layers": layers, "num_attention_heads": heads, "caption_projection_dim": heads * _HEAD}
    return sizes | {"qk_norm": qk_norm, "pos_embed_max_size": positions, "dual_attention_layers": dual}


_LARGE = _sizes(38, 38, "rms_norm", 192)

SD3 = Architecture(
    name="Stable Diffusion 3",
    covers="3.5 large, large-turbo and medium; 3 medium",
    gguf_name="sd3",
    mark=r"joint_blocks\.[0-9]{1,6}\..*|pos_embed\.proj\.(weight|bias)",
    relatives=(
        Mark("a Stable Diffusion 3 ControlNet", r"(pos_embed_input|controlnet_blocks)\..*"),
        Mark("AuraFlow", r"joint_transformer_blocks\..*", WITH_DIFFUSERS),
    ),
    model_class="SD3Transformer2DModel",
    pipelines=("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    blocks=(("joint_blocks", "transformer_blocks"),),
    counts={"joint_blocks": "num_layers"},
    links=(
        parameter("pos_embed", "pos_embed.pos_embed"),
        Link("x_embedder.proj", ("pos_embed.proj",)),
        Link("t_embedder.mlp.0", (f"{_EMBED}.timestep_embedder.linear_1",)),
        Link("t_embedder.mlp.2", (f"{_EMBED}.timestep_embedder.linear_2",)),
        Link("y_embedder.mlp.0", (f"{_EMBED}.text_embedder.linear_1",)),
        Link("y_embedder.mlp.2", (f"{_EMBED}.text_embedder.linear_2",)),
        *_attention("context_block.attn", "attn", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_"),
        # The last block computes no text: it lacks the rest of its stream, and its modulation is that of a final layer.
        *_rest_of_stream("context_block", "_context", swap_halves="last"),
        *_attention("x_block.attn", "attn", "to_q", "to_k", "to_v", "to_out.0", "norm_"),
        *_attention("x_block.attn2", "attn2", "to_q", "to_k", "to_v", "to_out.0", "norm_"),
        *_rest_of_stream("x_block", "", swap_halves=False),
        Link("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap_halves=True),
        Link("final_layer.linear", ("proj_out",)),
    ),
    read_config=_config,
    untold={"sample_size": 128},
    # Files of large and large-turbo have the same tensors; turbo takes 4 steps and a guidance of 0. Steps and guidance were
    # not compared with the model cards; a prompt is 77 tokens of CLIP and 256 of T5.
    variants=(
        Variant("SD3.5-large", _LARGE, steps=28, guidance=3.5, text_tokens=333, word=r"large(?!.*turbo)"),
        Variant("SD3.5-large-turbo", _LARGE, steps=4, guidance=0.0, text_tokens=333, word="turbo"),
        Variant("SD3.5-medium", _sizes(24, 24, "rms_norm", 384, _DUAL), steps=40, guidance=4.5, text_tokens=333),
        Variant("SD3-medium", _sizes(24, 24, None, 192), steps=28, guidance=7.0, text_tokens=333),
    ),
    plain=("x_embedder.", "t_embedder.", "y_embedder.", "context_embedder.", "final_layer."),
    # ComfyUI adds it to the tokens as it lies.
    undecoded="pos_embed",
    tokens={
        "*.norm1*.linear": "batch",
        "*.attn.add_*_proj": "text",
        "*.attn.to_add_out": "text",
        "*.ff_context.*": "text",
    },
    side_tokens=lambda config: config["pos_embed_max_size"],
)
