"""FLUX.1: dev, schnell, Kontext, Krea, Fill, Canny, Depth, and the smaller Flex and Flux-Lite.

Source: the tensor table of FLUX.1-dev, and the modules of diffusers' FluxTransformer2DModel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import GGUFError
from ..architecture import Architecture, Link, Variant
from ..stored_shapes import StoredShapes
from ._flux_links import BLOCKS, COUNTS, IMAGE_STREAM, SINGLE_BLOCK, TEXT_STREAM, TOKENS, flux_config

# The halves of a rotary axis are pairs, so every axis is even; the index axis has an eighth of a head, the two image axes
# the rest: (16, 56, 56) of 128.
_ROPE_INDEX_SHARE = 8
_ROPE_HEAD_STEP = 32
_WIDTH = 3072
# By in_channels.
_BY_INPUT = {384: "FLUX.1-Fill", 128: "FLUX.1-Canny or -Depth", 196: "Flex.2"}
_BY_BLOCKS_AND_GUIDANCE = {
    (19, 38, True): "FLUX.1-dev, -Kontext or -Krea",
    (19, 38, False): "FLUX.1-schnell",
    (8, 38, True): "Flex.1 or Flux-Lite",
}


def _embedder(original: str, diffusers: str) -> tuple[Link, Link]:
    diffusers = f"time_text_embed.{diffusers}"
    return Link(f"{original}.in_layer", (f"{diffusers}.linear_1",)), Link(f"{original}.out_layer", (f"{diffusers}.linear_2",))


def _config(stored: StoredShapes) -> dict[str, Any]:
    return {
        **flux_config(stored),
        "pooled_projection_dim": stored.matrix("time_text_embed.text_embedder.linear_1.weight")[1],
        "guidance_embeds": stored.has("time_text_embed.guidance_embedder.linear_1.weight"),
    }


def default_rope(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Scale FLUX.1's rotary axes (16, 56, 56) to another head size.

    Raises:
        GGUFError: where that gives odd axes.
    """
    head_dim = config["attention_head_dim"]
    if head_dim % _ROPE_HEAD_STEP:
        raise GGUFError(
            f"The file has heads of {head_dim}; how they split into rotary axes is not in the tensors, and (16, 56, 56) scales "
            f"only to multiples of {_ROPE_HEAD_STEP}. Pass config={{'axes_dims_rope': (a, b, c)}} with a + b + c = {head_dim}."
        )
    index = head_dim // _ROPE_INDEX_SHARE
    image = (head_dim - index) // 2
    return index, image, image


def _describe(config: Mapping[str, Any]) -> str:
    """Name a FLUX.1; where variants share all shapes, all of them."""
    blocks = (config["num_layers"], config["num_single_layers"])
    width = config["num_attention_heads"] * config["attention_head_dim"]
    size = f"with {blocks[0]} double and {blocks[1]} single blocks"
    if width != _WIDTH:
        return f"FLUX.1 architecture {size}, width {width}"
    guidance = bool(config["guidance_embeds"])
    known = _BY_BLOCKS_AND_GUIDANCE.get((*blocks, guidance))
    name = _BY_INPUT.get(config["in_channels"]) or known or _BY_BLOCKS_AND_GUIDANCE[19, 38, guidance]
    return name if known else f"{name}, {size}"


def _sizes(guidance: bool) -> dict[str, Any]:
    return {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24, "guidance_embeds": guidance}


FLUX1 = Architecture(
    name="FLUX.1",
    covers="dev, schnell, Kontext, Krea, Fill, Canny, Depth, Flex, Flux-Lite",
    gguf_name="flux",
    mark=r"(double_blocks|single_blocks|transformer_blocks|single_transformer_blocks)\.[0-9]{1,6}\..*",
    mark_needs=("img_in.weight", "x_embedder.weight"),
    model_class="FluxTransformer2DModel",
    pipelines=("FluxPipeline", "FluxImg2ImgPipeline", "FluxKontextPipeline", "FluxFillPipeline", "FluxControlPipeline"),
    blocks=BLOCKS,
    counts=COUNTS,
    links=(
        Link("img_in", ("x_embedder",)),
        *_embedder("time_in", "timestep_embedder"),
        *_embedder("vector_in", "text_embedder"),
        *_embedder("guidance_in", "guidance_embedder"),
        Link("txt_in", ("context_embedder",)),
        Link("double_blocks.{i}.img_mod.lin", ("transformer_blocks.{i}.norm1.linear",)),
        *IMAGE_STREAM,
        Link("double_blocks.{i}.txt_mod.lin", ("transformer_blocks.{i}.norm1_context.linear",)),
        *TEXT_STREAM,
        *SINGLE_BLOCK,
        Link("single_blocks.{i}.modulation.lin", ("single_transformer_blocks.{i}.norm.linear",)),
        Link("final_layer.linear", ("proj_out",)),
        Link("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap_halves=True),
    ),
    read_config=_config,
    untold={"axes_dims_rope": default_rope},
    # Files of dev and of its relatives have the same tensors; the settings of the relatives stand with the tasks (generation/tasks.py).
    variants=(
        Variant("FLUX.1-dev", _sizes(guidance=True), steps=28, guidance=3.5),
        Variant("FLUX.1-schnell", _sizes(guidance=False), steps=4, guidance=0.0, text_tokens=256),
    ),
    # Flex.1, Flex.2 and Flux-Lite.
    pruned=({"num_layers": 8, "num_single_layers": 38},),
    describe=_describe,
    plain=("img_in.", "txt_in.", "time_in.", "vector_in.", "guidance_in.", "final_layer."),
    narrow=r"(img_in|\w+_in\.in_layer|final_layer\.linear)\.weight",
    # In BF16, diffusers takes its bytes for columns, and the file for FLUX.1-Depth.
    never_bf16=("img_in.weight",),
    original="bfl",
    tokens=TOKENS,
)
