"""What FLUX.1, FLUX.2 and Chroma share: names of blocks of one and two streams, and most of a config."""

from __future__ import annotations

from typing import Any

from ..architecture import Link, norm
from ..stored_shapes import StoredShapes

BLOCKS = (("double_blocks", "transformer_blocks"), ("single_blocks", "single_transformer_blocks"))
COUNTS = {"double_blocks": "num_layers", "single_blocks": "num_single_layers"}
_SINGLE = "single_transformer_blocks.{i}"


def streams(wide: str, narrow: str) -> tuple[tuple[Link, ...], tuple[Link, ...]]:
    """List the links of the image and the text stream of a double block, their modulation left out.

    Args:
        wide: diffusers' name of the first layer of a feed-forward network.
        narrow: of its second.
    """
    image = ("img", "", "to_q", "to_k", "to_v", "to_out.0", "norm_")
    text = ("txt", "_context", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_")
    return _stream(*image, wide, narrow), _stream(*text, wide, narrow)


def _stream(
    original: str, context: str, q: str, k: str, v: str, out: str, scale: str, wide: str, narrow: str
) -> tuple[Link, ...]:
    stem, block = f"double_blocks.{{i}}.{original}", "transformer_blocks.{i}"
    return (
        Link(f"{stem}_attn.qkv", (f"{block}.attn.{q}", f"{block}.attn.{k}", f"{block}.attn.{v}")),
        norm(f"{stem}_attn.norm.query_norm", f"{block}.attn.{scale}q"),
        norm(f"{stem}_attn.norm.key_norm", f"{block}.attn.{scale}k"),
        Link(f"{stem}_attn.proj", (f"{block}.attn.{out}",)),
        Link(f"{stem}_mlp.0", (f"{block}.ff{context}.{wide}",)),
        Link(f"{stem}_mlp.2", (f"{block}.ff{context}.{narrow}",)),
    )


TOKENS = {
    "single_*.norm.linear": "batch",
    "single_*": "both",
    "*.norm1*.linear": "batch",
    "*.attn.add_*_proj": "text",
    "*.attn.to_add_out": "text",
    "*.ff_context.*": "text",
}
IMAGE_STREAM, TEXT_STREAM = streams("net.0.proj", "net.2")
SINGLE_BLOCK = (
    Link(
        "single_blocks.{i}.linear1",
        (f"{_SINGLE}.attn.to_q", f"{_SINGLE}.attn.to_k", f"{_SINGLE}.attn.to_v", f"{_SINGLE}.proj_mlp"),
    ),
    Link("single_blocks.{i}.linear2", (f"{_SINGLE}.proj_out",)),
    norm("single_blocks.{i}.norm.query_norm", f"{_SINGLE}.attn.norm_q"),
    norm("single_blocks.{i}.norm.key_norm", f"{_SINGLE}.attn.norm_k"),
)


def flux_config(stored: StoredShapes) -> dict[str, Any]:
    """Return the arguments that the model classes of the family share."""
    num_layers, num_single_layers = stored.blocks("transformer_blocks"), stored.blocks("single_transformer_blocks")
    first = "transformer_blocks.0" if num_layers else "single_transformer_blocks.0"
    head_dim = stored.length(f"{first}.attn.norm_q.weight")
    width, in_channels = stored.matrix("x_embedder.weight")
    _, joint_dim = stored.matrix("context_embedder.weight")
    out_channels, _ = stored.matrix("proj_out.weight")
    return {
        "patch_size": 1,
        "in_channels": in_channels,
        "out_channels": None if out_channels == in_channels else out_channels,
        "num_layers": num_layers,
        "num_single_layers": num_single_layers,
        "attention_head_dim": head_dim,
        "num_attention_heads": stored.heads(width, head_dim),
        "joint_attention_dim": joint_dim,
    }
