"""FLUX.2: dev, and klein in 9B and 4B. No biases; one modulation serves all blocks of a kind.

Source: diffusers' Flux2Transformer2DModel and its conversion of single files; stable-diffusion.cpp's flux.hpp.
"""

from __future__ import annotations

from typing import Any

from ...errors import GGUFError
from ..architecture import Architecture, Link, Mark, Variant, norm
from ..stored_shapes import StoredShapes
from ._flux_links import BLOCKS, COUNTS, TOKENS, flux_config, streams

_SINGLE = "single_transformer_blocks.{i}"
_IMAGE_STREAM, _TEXT_STREAM = streams("linear_in", "linear_out")
_EMBED = "time_guidance_embed"


def _config(stored: StoredShapes) -> dict[str, Any]:
    config = flux_config(stored)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    if config["num_layers"]:
        mlp = stored.matrix("transformer_blocks.0.ff.linear_out.weight")[1]
    else:
        mlp = stored.matrix("single_transformer_blocks.0.attn.to_out.weight")[1] - width
    return {
        **config,
        "timestep_guidance_channels": stored.matrix(f"{_EMBED}.timestep_embedder.linear_1.weight")[1],
        "mlp_ratio": mlp / width,
        "guidance_embeds": stored.has(f"{_EMBED}.guidance_embedder.linear_1.weight"),
    }


def _rope(config: dict[str, Any]) -> tuple[int, ...]:
    """Give each of the four axes a quarter of a head, (32, 32, 32, 32) of 128."""
    if config["attention_head_dim"] % 8:
        raise GGUFError(
            f"The file has heads of {config['attention_head_dim']}; how they split into four rotary axes is not in the tensors, and equal "
            "even axes need a multiple of 8. Pass config={'axes_dims_rope': (a, b, c, d)}."
        )
    return (config["attention_head_dim"] // 4,) * 4


def _sizes(double: int, single: int, heads: int, text: int, guidance: bool) -> dict[str, Any]:
    return {
        "num_layers": double,
        "num_single_layers": single,
        "num_attention_heads": heads,
        "joint_attention_dim": text,
        "guidance_embeds": guidance,
    }


_KLEIN_9B = _sizes(8, 24, 32, 12288, False)
_KLEIN_4B = _sizes(5, 20, 24, 7680, False)

FLUX2 = Architecture(
    name="FLUX.2",
    covers="dev, klein-9B, klein-4B and their bases",
    gguf_name="flux",
    mark=r"(single_stream_modulation|double_stream_modulation_(img|txt))\..*",
    model_class="Flux2Transformer2DModel",
    pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
    blocks=BLOCKS,
    counts=COUNTS,
    links=(
        Link("img_in", ("x_embedder",)),
        Link("time_in.in_layer", (f"{_EMBED}.timestep_embedder.linear_1",)),
        Link("time_in.out_layer", (f"{_EMBED}.timestep_embedder.linear_2",)),
        Link("guidance_in.in_layer", (f"{_EMBED}.guidance_embedder.linear_1",)),
        Link("guidance_in.out_layer", (f"{_EMBED}.guidance_embedder.linear_2",)),
        Link("txt_in", ("context_embedder",)),
        Link("double_stream_modulation_img.lin", ("double_stream_modulation_img.linear",)),
        Link("double_stream_modulation_txt.lin", ("double_stream_modulation_txt.linear",)),
        Link("single_stream_modulation.lin", ("single_stream_modulation.linear",)),
        *_IMAGE_STREAM,
        *_TEXT_STREAM,
        Link("single_blocks.{i}.linear1", (f"{_SINGLE}.attn.to_qkv_mlp_proj",)),
        Link("single_blocks.{i}.linear2", (f"{_SINGLE}.attn.to_out",)),
        norm("single_blocks.{i}.norm.query_norm", f"{_SINGLE}.attn.norm_q"),
        norm("single_blocks.{i}.norm.key_norm", f"{_SINGLE}.attn.norm_k"),
        Link("final_layer.linear", ("proj_out",)),
        Link("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap_halves=True),
    ),
    read_config=_config,
    untold={"axes_dims_rope": _rope, "rope_theta": 2000, "eps": 1e-6},
    relatives=(Mark("a FLUX.2 ControlNet", r"(controlnet_|control_).*"),),
    # Files of the distilled klein models and of their bases have the same tensors. Source of the bases' settings: the example and
    # the defaults of diffusers' Flux2KleinPipeline.
    variants=(
        Variant("FLUX.2-dev", _sizes(8, 48, 48, 15360, True), steps=50, guidance=4.0),
        Variant("FLUX.2-klein-9B", _KLEIN_9B, steps=4, guidance=1.0, word="distilled", distilled=True),
        Variant("FLUX.2-klein-base-9B", _KLEIN_9B, steps=50, guidance=4.0, word="base", distilled=False),
        Variant("FLUX.2-klein-4B", _KLEIN_4B, steps=4, guidance=1.0, word="distilled", distilled=True),
        Variant("FLUX.2-klein-base-4B", _KLEIN_4B, steps=50, guidance=4.0, word="base", distilled=False),
    ),
    plain=("img_in.", "txt_in.", "time_in.", "guidance_in.", "final_layer."),
    original="bfl",
    tokens=TOKENS,
)
