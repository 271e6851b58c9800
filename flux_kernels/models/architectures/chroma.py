"""Chroma: Base, HD and Flash. FLUX.1-schnell with modulation from a network, the approximator.

Source: diffusers' ChromaTransformer2DModel and its conversion of single files; stable-diffusion.cpp's flux.hpp.
"""

from __future__ import annotations

from typing import Any

from ..architecture import Architecture, Link, Mark, Variant, norm
from ..stored_shapes import StoredShapes
from ._flux_links import BLOCKS, COUNTS, IMAGE_STREAM, SINGLE_BLOCK, TEXT_STREAM, TOKENS, flux_config
from .flux1 import default_rope

_APPROXIMATOR = "distilled_guidance_layer"


def _config(stored: StoredShapes) -> dict[str, Any]:
    width, channels = stored.matrix(f"{_APPROXIMATOR}.in_proj.weight")
    return {
        **flux_config(stored),
        "approximator_num_channels": channels,
        "approximator_hidden_dim": width,
        "approximator_layers": stored.blocks(f"{_APPROXIMATOR}.layers"),
    }


CHROMA = Architecture(
    name="Chroma",
    covers="Base, HD, Flash",
    gguf_name="flux",
    mark=rf"{_APPROXIMATOR}\..*",
    relatives=(Mark("Chroma Radiance", r"(nerf_(blocks|image_embedder|final_layer|final_layer_conv)|img_in_patch)\..*"),),
    model_class="ChromaTransformer2DModel",
    pipelines=("ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline"),
    blocks=BLOCKS,
    counts={**COUNTS, f"{_APPROXIMATOR}.layers": "approximator_layers"},
    links=(
        Link("img_in", ("x_embedder",)),
        Link("txt_in", ("context_embedder",)),
        Link(f"{_APPROXIMATOR}.layers.{{i}}.in_layer", (f"{_APPROXIMATOR}.layers.{{i}}.linear_1",)),
        Link(f"{_APPROXIMATOR}.layers.{{i}}.out_layer", (f"{_APPROXIMATOR}.layers.{{i}}.linear_2",)),
        norm(f"{_APPROXIMATOR}.norms.{{i}}", f"{_APPROXIMATOR}.norms.{{i}}"),
        *IMAGE_STREAM,
        *TEXT_STREAM,
        *SINGLE_BLOCK,
        Link("final_layer.linear", ("proj_out",)),
    ),
    read_config=_config,
    untold={"axes_dims_rope": default_rope},
    # Files of Base, HD and Flash have the same tensors. The settings are those of diffusers' documentation, for HD; for
    # Flash, which is distilled, it gives none.
    variants=(
        Variant(
            "Chroma1",
            {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24},
            steps=40,
            guidance=3.0,
            unsourced="flash",
        ),
    ),
    # Tools know no Chroma: they quantize it as FLUX.1, the approximator with it. Its first matrix has rows of 64, which K-quants
    # cannot hold, so that it stays plain in theirs too.
    plain=("img_in.", "txt_in.", "final_layer.", f"{_APPROXIMATOR}.in_proj."),
    original="bfl",
    tokens=TOKENS,
)
