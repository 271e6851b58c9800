"""Krea 2: Raw and Turbo. One stream; the text is fused from twelve layers of its encoder.

Source: diffusers' Krea2Transformer2DModel and its conversion of single files; stable-diffusion.cpp's krea2.hpp and name_conversion.cpp.
"""

from __future__ import annotations

from typing import Any

from ..architecture import Architecture, Link, Variant, norm, parameter
from ..stored_shapes import StoredShapes

_BLOCKS = (
    ("txtfusion.layerwise_blocks", "text_fusion.layerwise_blocks"),
    ("txtfusion.refiner_blocks", "text_fusion.refiner_blocks"),
    ("blocks", "transformer_blocks"),
)
_COUNTS = ("num_layerwise_text_blocks", "num_refiner_text_blocks", "num_layers")
_SIZES = {"num_layers": 28, "num_attention_heads": 48}


def _block(original: str, diffusers: str) -> tuple[Link, ...]:
    """List the links of a block; norms are zero-centred in both namings."""
    original, diffusers = f"{original}.{{i}}", f"{diffusers}.{{i}}"
    attention = {"wq": "to_q", "wk": "to_k", "wv": "to_v", "gate": "to_gate", "wo": "to_out.0"}
    return (
        norm(f"{original}.prenorm", f"{diffusers}.norm1"),
        norm(f"{original}.postnorm", f"{diffusers}.norm2"),
        norm(f"{original}.attn.qknorm.qnorm", f"{diffusers}.attn.norm_q"),
        norm(f"{original}.attn.qknorm.knorm", f"{diffusers}.attn.norm_k"),
        *(Link(f"{original}.attn.{ours}", (f"{diffusers}.attn.{theirs}",)) for ours, theirs in attention.items()),
        *(Link(f"{original}.mlp.{layer}", (f"{diffusers}.ff.{layer}",)) for layer in ("gate", "up", "down")),
    )


def _config(stored: StoredShapes) -> dict[str, Any]:
    layerwise, refiner, num_layers = (stored.blocks(kind) for _, kind in _BLOCKS)
    block = "transformer_blocks.0"
    text = f"text_fusion.{'layerwise' if layerwise else 'refiner'}_blocks.0"
    width, in_channels = stored.matrix("img_in.weight")
    text_width, _ = stored.matrix(f"{text}.attn.to_gate.weight")
    head_dim, text_head_dim = stored.length(f"{block}.attn.norm_q.weight"), stored.length(f"{text}.attn.norm_q.weight")
    return {
        "in_channels": in_channels,
        "num_layers": num_layers,
        "attention_head_dim": head_dim,
        "num_attention_heads": stored.heads(width, head_dim),
        "num_key_value_heads": stored.heads(stored.matrix(f"{block}.attn.to_k.weight")[0], head_dim),
        "intermediate_size": stored.matrix(f"{block}.ff.gate.weight")[0],
        "timestep_embed_dim": stored.matrix("time_embed.linear_1.weight")[1],
        "text_hidden_dim": text_width,
        # The projector has a single row, whose dimension tools drop.
        "num_text_layers": stored.sizes("text_fusion.projector.weight")[-1],
        "text_num_attention_heads": stored.heads(text_width, text_head_dim),
        "text_num_key_value_heads": stored.heads(stored.matrix(f"{text}.attn.to_k.weight")[0], text_head_dim),
        "text_intermediate_size": stored.matrix(f"{text}.ff.gate.weight")[0],
        "num_layerwise_text_blocks": layerwise,
        "num_refiner_text_blocks": refiner,
    }


def _rope(config: dict[str, Any]) -> tuple[int, int, int]:
    """Split a head as stable-diffusion.cpp does: two axes of 6 sixteenths, and what is left for time."""
    head_dim = config["attention_head_dim"]
    side = 6 * (head_dim // 16)
    return head_dim - 2 * side, side, side


KREA2 = Architecture(
    name="Krea 2",
    covers="Raw, Turbo",
    # ComfyUI-GGUF refuses "krea2", which only a fork of it writes; both take this word, and go by the tensors then.
    gguf_name="flux",
    mark=r"(txtfusion|text_fusion)\.(projector|layerwise_blocks\.[0-9]{1,6}|refiner_blocks\.[0-9]{1,6})\..*",
    model_class="Krea2Transformer2DModel",
    pipelines=("Krea2Pipeline",),
    blocks=_BLOCKS,
    counts=dict(zip((original for original, _ in _BLOCKS), _COUNTS)),
    links=(
        Link("first", ("img_in",)),
        Link("tmlp.0", ("time_embed.linear_1",)),
        Link("tmlp.2", ("time_embed.linear_2",)),
        Link("tproj.1", ("time_mod_proj",)),
        Link("txtfusion.projector", ("text_fusion.projector",)),
        norm("txtmlp.0", "txt_in.norm"),
        Link("txtmlp.1", ("txt_in.linear_1",)),
        Link("txtmlp.3", ("txt_in.linear_2",)),
        *(link for pair in _BLOCKS for link in _block(*pair)),
        parameter("blocks.{i}.mod.lin", "transformer_blocks.{i}.scale_shift_table", flat=True),
        norm("last.norm", "final_layer.norm"),
        parameter("last.modulation.lin", "final_layer.scale_shift_table"),
        Link("last.linear", ("final_layer.linear",)),
    ),
    read_config=_config,
    untold={"axes_dims_rope": _rope, "rope_theta": 1000.0, "norm_eps": 1e-5},
    # Files of Turbo and Raw have the same tensors. Source of the settings: diffusers' Krea2Pipeline, which calls them the distilled
    # and the base checkpoint; it guides from 0 upwards, where others do from 1.
    variants=(
        Variant("Krea 2 Turbo", _SIZES, steps=8, guidance=0.0, word="turbo", distilled=True),
        Variant("Krea 2 Raw", _SIZES, steps=28, guidance=4.5, word="raw|base", distilled=False),
    ),
    # ComfyUI-GGUF's tools know no Krea 2; these are what its fork that does (molbal/ComfyUI-GGUF) leaves alone.
    plain=("first.", "tmlp.", "tproj.", "txtmlp.", "txtfusion.projector.", "last."),
    precise=r"last\.modulation\.lin",
    # A picture of 6144 x 6144 that packers hid in the published files, under the names of two matrices.
    unused=r"last\.(up|down)\.weight",
    # The encoder's hidden states of 12 layers, fused into one.
    tokens={"text_fusion.layerwise_blocks.*": "text*12", "text_fusion.*": "text", "*": "both"},
)
