"""Z-Image: Turbo, the base and Omni. Blocks of a single stream, after refiners of picture and text.

Source: diffusers' ZImageTransformer2DModel and its conversion of single files; stable-diffusion.cpp's z_image.hpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...report.amounts import counted
from ..architecture import Architecture, Link, Variant
from ..stored_shapes import StoredShapes

BLOCKS = (("noise_refiner", "noise_refiner"), ("context_refiner", "context_refiner"), ("layers", "layers"))
_SIGLIP_REFINER = "siglip_refiner"
# Of a picture's side, and of its frames: the only ones published.
_PATCH, _FRAMES = 2, 1
_EMBEDDER, _FINAL = f"all_x_embedder.{_PATCH}-{_FRAMES}", f"all_final_layer.{_PATCH}-{_FRAMES}"
# Of a head of 128, text and picture axes have 32, 48, 48.
_ROPE_PARTS = 8
_ROPE = (2, 3, 3)
_SIZES = {"dim": 3840, "n_layers": 30, "n_heads": 30}


def _attention(blocks: str) -> tuple[Link, ...]:
    stem = f"{blocks}.{{i}}.attention"
    return (
        Link(f"{stem}.qkv", (f"{stem}.to_q", f"{stem}.to_k", f"{stem}.to_v")),
        Link(f"{stem}.out", (f"{stem}.to_out.0",)),
        Link(f"{stem}.q_norm", (f"{stem}.norm_q",)),
        Link(f"{stem}.k_norm", (f"{stem}.norm_k",)),
    )


def _config(stored: StoredShapes) -> dict[str, Any]:
    head_dim = stored.length("layers.0.attention.norm_q.weight")
    width, inputs = stored.matrix(f"{_EMBEDDER}.weight")
    _, text = stored.matrix("cap_embedder.1.weight")
    heads = stored.heads(width, head_dim)
    siglip = stored.has("siglip_embedder.1.weight")
    return {
        "in_channels": inputs // (_PATCH * _PATCH * _FRAMES),
        "dim": width,
        "n_layers": stored.blocks("layers"),
        "n_refiner_layers": stored.blocks("noise_refiner"),
        "n_heads": heads,
        "n_kv_heads": heads,
        "qk_norm": True,
        "cap_feat_dim": text,
        "siglip_feat_dim": stored.matrix("siglip_embedder.1.weight")[1] if siglip else None,
    }


def _axes(config: Mapping[str, Any]) -> tuple[int, ...]:
    head_dim = config["dim"] // config["n_heads"]
    return tuple(head_dim * part // _ROPE_PARTS for part in _ROPE)


def _describe(config: Mapping[str, Any]) -> str | None:
    if not Z_IMAGE.published(config):
        return f"Z-Image architecture with {counted(config['n_layers'], 'block')}, width {config['dim']}"
    return None if config["siglip_feat_dim"] is None else "Z-Image-Omni"


Z_IMAGE = Architecture(
    name="Z-Image",
    covers="Turbo, the base and Omni",
    # ComfyUI reads both models as one, by their tensors.
    gguf_name="lumina2",
    # Lumina 2 has a function before this matrix, so its number is 1 there; ControlNets have it in control_layers.
    mark=r"layers\.[0-9]{1,6}\.adaLN_modulation\.0\.(weight|bias)",
    model_class="ZImageTransformer2DModel",
    pipelines=("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline", "ZImageOmniPipeline"),
    blocks=BLOCKS,
    counts={"noise_refiner": "n_refiner_layers", "context_refiner": "n_refiner_layers", "layers": "n_layers"},
    links=(
        Link("x_embedder", (_EMBEDDER,)),
        *(link for blocks, _ in BLOCKS for link in _attention(blocks)),
        *_attention(_SIGLIP_REFINER),
        Link("final_layer.linear", (f"{_FINAL}.linear",)),
        Link("final_layer.adaLN_modulation.1", (f"{_FINAL}.adaLN_modulation.1",)),
    ),
    read_config=_config,
    untold={
        "all_patch_size": (_PATCH,),
        "all_f_patch_size": (_FRAMES,),
        "norm_eps": 1e-5,
        "rope_theta": 256.0,
        "t_scale": 1000.0,
        "axes_dims": _axes,
        "axes_lens": (1024, 512, 512),
    },
    # Files of the distilled model and of its base have the same tensors. Source of the settings: diffusers' ZImagePipeline, its
    # example (Turbo) and its defaults.
    variants=(
        Variant("Z-Image-Turbo", _SIZES, steps=8, guidance=0.0, word="turbo"),
        Variant("Z-Image", _SIZES, steps=50, guidance=5.0, word="base"),
    ),
    describe=_describe,
    plain=("x_embedder.", "t_embedder.", "cap_embedder.", "noise_refiner.", "context_refiner.", "siglip_", "final_layer."),
    # ComfyUI-GGUF decodes BF16 in layers alone, and these are no layers.
    precise=r"(x|cap|siglip)_pad_token",
    # A norm that the makers' files hold and no forward uses.
    unused=r"norm_final\.weight",
    tokens={"*adaLN_modulation*": "batch", "noise_refiner.*": "image", "context_refiner.*": "text", "*": "both"},
    side_tokens=lambda config: min(config["axes_lens"][1:]),
)
