"""FLUX.2: dev, and klein in 9B and 4B. No biases; one modulation serves all blocks of a kind.

Source: diffusers' Flux2Transformer2DModel and its conversion of single files; stable-diffusion.cpp's flux.hpp.
"""

from __future__ import annotations

from typing import Any

from ...errors import GGUFError
from ..architecture import Architecture, Link, Variant, norm
from ..stored_shapes import StoredShapes
from ._flux_links import BLOCKS, TOKENS

_DOUBLE, _SINGLE = "transformer_blocks.{i}", "single_transformer_blocks.{i}"
_EMBED = "time_guidance_embed"


def _stream(original: str, context: str, q: str, k: str, v: str, out: str, scale: str) -> tuple[Link, ...]:
    stem = f"double_blocks.{{i}}.{original}"
    return (
        Link(f"{stem}_attn.qkv", (f"{_DOUBLE}.attn.{q}", f"{_DOUBLE}.attn.{k}", f"{_DOUBLE}.attn.{v}")),
        norm(f"{stem}_attn.norm.query_norm", f"{_DOUBLE}.attn.{scale}q"),
        norm(f"{stem}_attn.norm.key_norm", f"{_DOUBLE}.attn.{scale}k"),
        Link(f"{stem}_attn.proj", (f"{_DOUBLE}.attn.{out}",)),
        Link(f"{stem}_mlp.0", (f"{_DOUBLE}.ff{context}.linear_in",)),
        Link(f"{stem}_mlp.2", (f"{_DOUBLE}.ff{context}.linear_out",)),
    )


def _config(stored: StoredShapes) -> dict[str, Any]:
    num_layers, num_single_layers = stored.blocks("transformer_blocks"), stored.blocks("single_transformer_blocks")
    first = "transformer_blocks.0" if num_layers else "single_transformer_blocks.0"
    head_dim = stored.length(f"{first}.attn.norm_q.weight")
    width, in_channels = stored.matrix("x_embedder.weight")
    _, joint_dim = stored.matrix("context_embedder.weight")
    _, timestep_channels = stored.matrix(f"{_EMBED}.timestep_embedder.linear_1.weight")
    out_channels, _ = stored.matrix("proj_out.weight")
    feed_forward = "transformer_blocks.0.ff.linear_out.weight"
    mlp = stored.matrix(feed_forward)[1] if num_layers else stored.matrix(f"{first}.attn.to_out.weight")[1] - width
    return {
        "patch_size": 1,
        "in_channels": in_channels,
        "out_channels": None if out_channels == in_channels else out_channels,
        "num_layers": num_layers,
        "num_single_layers": num_single_layers,
        "attention_head_dim": head_dim,
        "num_attention_heads": stored.heads(width, head_dim),
        "joint_attention_dim": joint_dim,
        "timestep_guidance_channels": timestep_channels,
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


FLUX2 = Architecture(
    name="FLUX.2",
    covers="dev, klein-9B, klein-4B and their bases",
    gguf_name="flux",
    mark=r"(single_stream_modulation|double_stream_modulation_(img|txt))\..*",
    model_class="Flux2Transformer2DModel",
    pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
    blocks=BLOCKS,
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
        *_stream("img", "", "to_q", "to_k", "to_v", "to_out.0", "norm_"),
        *_stream("txt", "_context", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_"),
        Link("single_blocks.{i}.linear1", (f"{_SINGLE}.attn.to_qkv_mlp_proj",)),
        Link("single_blocks.{i}.linear2", (f"{_SINGLE}.attn.to_out",)),
        norm("single_blocks.{i}.norm.query_norm", f"{_SINGLE}.attn.norm_q"),
        norm("single_blocks.{i}.norm.key_norm", f"{_SINGLE}.attn.norm_k"),
        Link("final_layer.linear", ("proj_out",)),
        Link("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap_halves=True),
    ),
    read_config=_config,
    untold={"axes_dims_rope": _rope, "rope_theta": 2000, "eps": 1e-6},
    # ControlNets.
    unlike=r"(controlnet_|control_).*",
    # Files of the distilled klein models and of their bases have the same tensors; the bases take 50 steps and a guidance of 4.
    variants=(
        Variant("FLUX.2-dev", _sizes(8, 48, 48, 15360, True), steps=50, guidance=4.0),
        Variant("FLUX.2-klein-9B", _sizes(8, 24, 32, 12288, False), steps=4, guidance=1.0),
        Variant("FLUX.2-klein-4B", _sizes(5, 20, 24, 7680, False), steps=4, guidance=1.0),
    ),
    plain=("img_in.", "txt_in.", "time_in.", "guidance_in.", "final_layer."),
    original="bfl",
    tokens=TOKENS,
)
