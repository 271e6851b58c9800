"""Names that FLUX.1 and Chroma share: blocks of two streams, blocks with a wide input projection."""

from __future__ import annotations

from ..architecture import Link, norm

BLOCKS = (("double_blocks", "transformer_blocks"), ("single_blocks", "single_transformer_blocks"))
_SINGLE = "single_transformer_blocks.{i}"


def stream(original: str, context: str, q: str, k: str, v: str, out: str, scale: str) -> tuple[Link, ...]:
    """List the links of the image or the text stream of a double block, its modulation left out."""
    stem, block = f"double_blocks.{{i}}.{original}", "transformer_blocks.{i}"
    return (
        Link(f"{stem}_attn.qkv", (f"{block}.attn.{q}", f"{block}.attn.{k}", f"{block}.attn.{v}")),
        norm(f"{stem}_attn.norm.query_norm", f"{block}.attn.{scale}q"),
        norm(f"{stem}_attn.norm.key_norm", f"{block}.attn.{scale}k"),
        Link(f"{stem}_attn.proj", (f"{block}.attn.{out}",)),
        Link(f"{stem}_mlp.0", (f"{block}.ff{context}.net.0.proj",)),
        Link(f"{stem}_mlp.2", (f"{block}.ff{context}.net.2",)),
    )


TOKENS = {
    "single_*.norm.linear": "batch",
    "single_*": "both",
    "*.norm1*.linear": "batch",
    "*.attn.add_*_proj": "text",
    "*.attn.to_add_out": "text",
    "*.ff_context.*": "text",
}
IMAGE_STREAM = stream("img", "", "to_q", "to_k", "to_v", "to_out.0", "norm_")
TEXT_STREAM = stream("txt", "_context", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_")
SINGLE_BLOCK = (
    Link(
        "single_blocks.{i}.linear1",
        (f"{_SINGLE}.attn.to_q", f"{_SINGLE}.attn.to_k", f"{_SINGLE}.attn.to_v", f"{_SINGLE}.proj_mlp"),
    ),
    Link("single_blocks.{i}.linear2", (f"{_SINGLE}.proj_out",)),
    norm("single_blocks.{i}.norm.query_norm", f"{_SINGLE}.attn.norm_q"),
    norm("single_blocks.{i}.norm.key_norm", f"{_SINGLE}.attn.norm_k"),
)
