"""Wan 2.2 and 2.1: videos from text, from a picture, from a first and a last picture.

Source: diffusers' WanTransformer3DModel and its conversion of single files; stable-diffusion.cpp's wan.hpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from ..architecture import WITH_DIFFUSERS, Architecture, Link, Mark, Variant, parameter
from ..stored_shapes import StoredShapes

# Norms span all heads, so that no tensor shows a head.
_HEAD = 128
# (frames, height, width) that become a token, where a file holds the convolution as a matrix.
_PATCH = (1, 2, 2)
_EMBED, _IMAGE = "condition_embedder", "condition_embedder.image_embedder"


def _attention(original: str, diffusers: str) -> tuple[Link, ...]:
    ours, theirs = f"blocks.{{i}}.{original}", f"blocks.{{i}}.{diffusers}"
    names = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
    return tuple(Link(f"{ours}.{name}", (f"{theirs}.{name_there}",)) for name, name_there in names.items())


def _config(stored: StoredShapes) -> dict[str, Any]:
    _, text_dim = stored.matrix(f"{_EMBED}.text_embedder.linear_1.weight")
    width, freq_dim = stored.matrix(f"{_EMBED}.time_embedder.linear_1.weight")
    rows, _ = stored.matrix("proj_out.weight")
    ffn_dim, _ = stored.matrix("blocks.0.ffn.net.0.proj.weight")
    convolution = stored.sizes("patch_embedding.weight")
    whole = len(convolution) == 2 + len(_PATCH)
    patch = convolution[2:] if whole else _PATCH
    norm, added, positions = f"{_IMAGE}.norm1.weight", "blocks.0.attn2.add_k_proj.weight", f"{_IMAGE}.pos_embed"
    image_dim = stored.length(norm) if stored.has(norm) else None
    return {
        "patch_size": patch,
        "num_attention_heads": stored.heads(width, _HEAD),
        "in_channels": convolution[1] if whole else prod(convolution) // (width * prod(patch)),
        "out_channels": rows // prod(patch),
        "text_dim": text_dim,
        "freq_dim": freq_dim,
        "ffn_dim": ffn_dim,
        "num_layers": stored.blocks("blocks"),
        "cross_attn_norm": stored.has("blocks.0.norm2.weight"),
        "image_dim": image_dim,
        "added_kv_proj_dim": stored.matrix(added)[1] if stored.has(added) else None,
        "pos_embed_seq_len": prod(stored.sizes(positions)) // image_dim if image_dim and stored.has(positions) else None,
    }


def _heads(config: Mapping[str, Any]) -> int:
    return config["num_attention_heads"] * config["attention_head_dim"] // _HEAD


def _sizes(
    layers: int, heads: int, ffn: int, channels: int, out: int = 16, image: int | None = None, positions: int | None = None
) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": ffn,
        "in_channels": channels,
        "out_channels": out,
        "image_dim": image,
        "added_kv_proj_dim": None if image is None else heads * _HEAD,
        "pos_embed_seq_len": positions,
    }


_FROM_PICTURE = ("WanImageToVideoPipeline",)

WAN = Architecture(
    name="Wan",
    covers="2.2 T2V A14B, I2V A14B, TI2V 5B; 2.1 T2V 1.3B and 14B, I2V, FLF2V",
    gguf_name="wan",
    mark=r"head\.modulation|blocks\.[0-9]{1,6}\.self_attn\.q\.weight|condition_embedder\.time_proj\.weight",
    relatives=(
        Mark("Wan VACE", r"vace_(blocks|patch_embedding)\..*", WITH_DIFFUSERS),
        Mark("Wan Animate", r"(motion_encoder|face_adapter|face_encoder|pose_patch_embedding)\..*", WITH_DIFFUSERS),
        Mark("Wan S2V", r"(casual_audio_encoder|audio_injector|trainable_cond_mask|cond_encoder)\..*"),
        Mark("Wan Fun-Control", r"(control_adapter|ref_conv)\..*"),
    ),
    model_class="WanTransformer3DModel",
    pipelines=("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline"),
    blocks=(("blocks", "blocks"),),
    counts={"blocks": "num_layers"},
    links=(
        Link("text_embedding.0", (f"{_EMBED}.text_embedder.linear_1",)),
        Link("text_embedding.2", (f"{_EMBED}.text_embedder.linear_2",)),
        Link("time_embedding.0", (f"{_EMBED}.time_embedder.linear_1",)),
        Link("time_embedding.2", (f"{_EMBED}.time_embedder.linear_2",)),
        Link("time_projection.1", (f"{_EMBED}.time_proj",)),
        parameter("img_emb.emb_pos", f"{_IMAGE}.pos_embed"),
        Link("img_emb.proj.0", (f"{_IMAGE}.norm1",)),
        Link("img_emb.proj.1", (f"{_IMAGE}.ff.net.0.proj",)),
        Link("img_emb.proj.3", (f"{_IMAGE}.ff.net.2",)),
        Link("img_emb.proj.4", (f"{_IMAGE}.norm2",)),
        parameter("blocks.{i}.modulation", "blocks.{i}.scale_shift_table"),
        *_attention("self_attn", "attn1"),
        *_attention("cross_attn", "attn2"),
        Link("blocks.{i}.cross_attn.k_img", ("blocks.{i}.attn2.add_k_proj",)),
        Link("blocks.{i}.cross_attn.v_img", ("blocks.{i}.attn2.add_v_proj",)),
        Link("blocks.{i}.cross_attn.norm_k_img", ("blocks.{i}.attn2.norm_added_k",)),
        # The original numbers the norms as they were added, diffusers as they run.
        Link("blocks.{i}.norm3", ("blocks.{i}.norm2",)),
        Link("blocks.{i}.ffn.0", ("blocks.{i}.ffn.net.0.proj",)),
        Link("blocks.{i}.ffn.2", ("blocks.{i}.ffn.net.2",)),
        parameter("head.modulation", "scale_shift_table"),
        Link("head.head", ("proj_out",)),
    ),
    read_config=_config,
    untold={
        "attention_head_dim": _HEAD,
        "num_attention_heads": _heads,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "rope_max_seq_len": 1024,
    },
    # Files of 2.1 T2V 14B and of both experts of 2.2 T2V A14B (high and low noise) have the same tensors. Steps, guidance and
    # size were not compared with the model cards; those of the pipelines are 50, 5 and 832 x 480.
    variants=(
        Variant(
            "Wan2.2-T2V-A14B",
            _sizes(40, 40, 13824, 16),
            steps=40,
            guidance=4.0,
            size=(1280, 720),
            latent_frames=21,
            transformers=2,
        ),
        Variant(
            "Wan2.2-I2V-A14B",
            _sizes(40, 40, 13824, 36),
            steps=40,
            guidance=3.5,
            size=(1280, 720),
            latent_frames=21,
            pipelines=_FROM_PICTURE,
            transformers=2,
        ),
        Variant(
            "Wan2.2-TI2V-5B",
            _sizes(30, 24, 14336, 48, out=48),
            steps=50,
            guidance=5.0,
            size=(1280, 704),
            latent_frames=31,
            patch=32,
            pipelines=("WanPipeline", *_FROM_PICTURE),
        ),
        Variant("Wan2.1-T2V-1.3B", _sizes(30, 12, 8960, 16), steps=50, guidance=5.0, size=(832, 480), latent_frames=21),
        Variant(
            "Wan2.1-I2V-14B",
            _sizes(40, 40, 13824, 36, image=1280),
            steps=50,
            guidance=5.0,
            size=(832, 480),
            latent_frames=21,
            pipelines=_FROM_PICTURE,
        ),
        Variant(
            "Wan2.1-FLF2V-14B",
            _sizes(40, 40, 13824, 36, image=1280, positions=514),
            steps=50,
            guidance=5.5,
            size=(1280, 720),
            latent_frames=21,
            pipelines=_FROM_PICTURE,
        ),
    ),
    plain=("patch_embedding.", "text_embedding.", "time_embedding.", "time_projection.", "img_emb.", "head."),
    # ComfyUI decodes none of them: the tables are no layer's weight, and its convolution is not GGUF's.
    precise=r"(.*\.)?(modulation|emb_pos)|patch_embedding\.weight",
    # Also of the picture that a video begins with, whose 257 tokens stand for text here.
    tokens={"*.attn2.to_[kv]": "text", "*.attn2.add_[kv]_proj": "text"},
)
