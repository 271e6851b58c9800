"""Recognise the model of a file: which FLUX.1, in which naming and layout.

A file of another model is refused with that model's name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import GGUFError
from .names import BFL, DIFFUSERS, block_of, strip_prefix, tensor_class
from .types import BLOCK, LEFTOVER, RULES, SMALL_LEFTOVER, VECTOR, tensor_kind

_FLUX_1 = "flux_kernels loads FLUX.1 transformers (dev, schnell, Kontext, Krea, Fill, Canny, Depth, Flex, Flux-Lite)."


@dataclass(frozen=True)
class Mark:
    """Name a model that is not FLUX.1's transformer by a tensor name that only it has.

    The name is a regular expression, matched against the whole.
    """

    model: str
    tensor: str
    advice: str = ""


_DIFFUSERS_GGUF = "Load it with the diffusers class of that model and GGUFQuantizationConfig, then call swap_linear on it."
_TEXT_ENCODER = "It belongs to the pipeline's text encoder, not its transformer."
_T5 = "Load it with flux_kernels.load_t5(path), or give it to `flux-kernels generate` as --t5."
LORA = Mark(
    "a LoRA",
    r".*(lora_[AB]\b|lora_(up|down)\b|hada_w[12]_|lokr_w[12]\b).*",
    "Load the base model, then pipeline.load_lora_weights(...).",
)
# First match wins: the finer marks stand before the coarser ones.
OTHER_TRANSFORMERS: tuple[Mark, ...] = (
    LORA,
    Mark("Chroma", r"distilled_guidance_layer\..*", _DIFFUSERS_GGUF),
    Mark("FLUX.2", r"(single_stream_modulation|double_stream_modulation_(img|txt))\..*", _DIFFUSERS_GGUF),
    Mark("FLUX.3", r"early_stream_modulations\..*", _DIFFUSERS_GGUF),
    Mark("a FLUX.1 ControlNet", r"(controlnet_(x_embedder|blocks|single_blocks)|controlnet_mode_embedder)\..*"),
    Mark("FLUX.1 Redux (an image encoder)", r"redux_(up|down)\..*"),
    Mark("HunyuanVideo", r"(txt_in\.individual_token_refiner|context_embedder\.token_refiner)\..*", _DIFFUSERS_GGUF),
    Mark("HunyuanVideo or HunyuanImage", r"double_blocks\.\d+\.img_attn_qkv\..*", _DIFFUSERS_GGUF),
    Mark("Stable Diffusion 3 / 3.5", r"joint_blocks\.\d+\..*", _DIFFUSERS_GGUF),
    Mark("Stable Diffusion 3 / 3.5", r"pos_embed\.proj\.weight", _DIFFUSERS_GGUF),
    Mark("Qwen-Image", r"(transformer_blocks\.\d+\.img_mod\..*|txt_norm\.weight)", _DIFFUSERS_GGUF),
    Mark("Wan", r"(head\.modulation|blocks\.\d+\.self_attn\.q\.weight|vace_blocks\..*)", _DIFFUSERS_GGUF),
    Mark("Wan", r"blocks\.\d+\.attn2\.add_k_proj\.weight|condition_embedder\.time_proj\.weight", _DIFFUSERS_GGUF),
    Mark("HiDream", r"double_stream_blocks\..*", _DIFFUSERS_GGUF),
    Mark("AuraFlow", r"(double_layers\..*|cond_seq_linear\.weight|joint_transformer_blocks\..*)", _DIFFUSERS_GGUF),
    Mark("LTX-Video", r"(patchify_proj\.weight|transformer_blocks\.\d+\.scale_shift_table)", _DIFFUSERS_GGUF),
    Mark("Lumina 2 or Z-Image", r"(cap_embedder|noise_refiner|context_refiner)\..*", _DIFFUSERS_GGUF),
    Mark("Mochi", r"blocks\.\d+\.attn\.qkv_x\.weight", _DIFFUSERS_GGUF),
    Mark("Cosmos", r"net\.blocks\..*", _DIFFUSERS_GGUF),
    Mark("Stable Diffusion 1, 2 or XL (a UNet)", r"(input_blocks|down_blocks)\..*", _DIFFUSERS_GGUF),
)
# What may also lie beside FLUX.1's transformer in one file, and is only asked about where no such transformer is found.
OTHER_PARTS: tuple[Mark, ...] = (
    Mark("a T5 encoder", r"(enc\.blk\.\d+\..*|encoder\.block\.\d+\.layer\.\d+\..*)", _T5),
    Mark("a CLIP model", r"(text_model\..*|v\.blk\.\d+\..*|vision_model\..*)", _TEXT_ENCODER),
    Mark("a language model", r"(blk\.\d+\..*|token_embd\.weight|model\.layers\.\d+\..*)", _TEXT_ENCODER),
    Mark("a VAE", r"(decoder|encoder|first_stage_model)\..*", "It belongs to the pipeline's vae, not its transformer."),
)

# FLUX.2's sizes by hidden width.
_FLUX_2 = {6144: "FLUX.2-dev", 4096: "FLUX.2-klein-9B", 3072: "FLUX.2-klein-4B"}


def canonical_names(names: Collection[str]) -> dict[str, str]:
    """Map names without prefix to the names in the file; raise GGUFError where two become one."""
    canonical: dict[str, str] = {}
    for name in names:
        bare = strip_prefix(name)
        if bare in canonical:
            raise GGUFError(f"Tensors {canonical[bare]!r} and {name!r} are both {bare!r}. A file must hold each tensor once.")
        canonical[bare] = name
    return canonical


def naming_of(shapes: Mapping[str, tuple[int, ...]], architecture: str | None) -> str:
    """Return the naming ("bfl" or "diffusers") of a FLUX.1 file.

    Args:
        shapes: tensor name without prefix -> shape in torch order.
        architecture: the file's `general.architecture`. Tensors decide; it only helps to name what is refused.

    Raises:
        GGUFError: for any other file, saying what it is.
    """
    refusal = refusal_of(shapes, architecture)
    if refusal:
        raise GGUFError(refusal)
    return BFL if any(name.startswith(("double_blocks.", "single_blocks.")) for name in shapes) else DIFFUSERS


def refusal_of(shapes: Mapping[str, tuple[int, ...]], architecture: str | None) -> str | None:
    """Say what a file that is not FLUX.1 holds, and what to do; None for FLUX.1."""
    if not shapes:
        return f"The file holds no tensors. {_FLUX_1}"
    blocks = any(block_of(name) for name in shapes)
    is_flux = blocks and bool({"img_in.weight", "x_embedder.weight"} & shapes.keys())
    for mark in OTHER_TRANSFORMERS if is_flux else OTHER_TRANSFORMERS + OTHER_PARTS:
        pattern = re.compile(mark.tensor)
        tensor = next((name for name in shapes if pattern.fullmatch(name)), None)
        if tensor is not None:
            return f"This is {_model_name(mark, shapes)}, not FLUX.1 (it holds {tensor!r}). {_advice(mark.advice)}"
    if is_flux:
        return None
    declared = f"its architecture key says {architecture!r}" if architecture else "it has no architecture key"
    examples = ", ".join(sorted(shapes)[:3])
    return f"This is no FLUX.1 transformer: {declared}, its tensors are called {examples}, ... {_FLUX_1}"


def lora_tensor(names: Collection[str]) -> str | None:
    """Return a name that only a LoRA's tensors have, or None."""
    pattern = re.compile(LORA.tensor)
    return next((name for name in names if pattern.fullmatch(name)), None)


def _advice(advice: str) -> str:
    return f"{_FLUX_1} {advice}".rstrip()


def _model_name(mark: Mark, shapes: Mapping[str, tuple[int, ...]]) -> str:
    if mark.model != "FLUX.2":
        return mark.model
    width = (shapes.get("img_in.weight") or shapes.get("x_embedder.weight") or (0,))[0]
    return _FLUX_2.get(width, mark.model)


_FULL_WIDTH = 3072
# By in_channels.
_BY_INPUT = {384: "FLUX.1-Fill", 128: "FLUX.1-Canny or -Depth", 196: "Flex.2"}
_BY_BLOCKS_AND_GUIDANCE = {
    (19, 38, True): "FLUX.1-dev, -Kontext or -Krea",
    (19, 38, False): "FLUX.1-schnell",
    (8, 38, True): "Flex.1 or Flux-Lite",
}


def variant_name(config: Mapping[str, Any]) -> str:
    """Name the FLUX.1 variant of a config; where variants share all shapes, all of them."""
    blocks = (config["num_layers"], config["num_single_layers"])
    width = config["num_attention_heads"] * config["attention_head_dim"]
    size = f"with {blocks[0]} double and {blocks[1]} single blocks"
    if width != _FULL_WIDTH:
        return f"FLUX.1 architecture {size}, width {width}"
    guidance = bool(config["guidance_embeds"])
    known = _BY_BLOCKS_AND_GUIDANCE.get((*blocks, guidance))
    name = _BY_INPUT.get(config["in_channels"]) or known or _BY_BLOCKS_AND_GUIDANCE[19, 38, guidance]
    return name if known else f"{name}, {size}"


def layout_of(types: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Name the layout of a file's types: "legacy", "old", "new", "mixed" or "other".

    A file is "mixed" where blocks differ in type, or biases are neither F32 nor F16.

    Args:
        types: tensor name without prefix -> ggml type name.
        shapes: tensor name without prefix -> shape in torch order.
    """
    seen: dict[str, set[str]] = {VECTOR: set(), LEFTOVER: set(), "small": set(), BLOCK: set()}
    by_class: dict[str, set[str]] = {}
    for name, ggml_type in types.items():
        kind = tensor_kind(name, shapes[name])
        if kind == LEFTOVER and SMALL_LEFTOVER.match(name):
            kind = "small"
        seen[kind].add(ggml_type)
        if kind == BLOCK:
            by_class.setdefault(tensor_class(name), set()).add(ggml_type)
    if any(len(kinds) > 1 for kinds in by_class.values()) or seen[VECTOR] - {"F32", "F16"}:
        return "mixed"
    for layout, rule in RULES.items():
        if layout != "new" and (seen[VECTOR], seen[LEFTOVER], seen["small"]) == (
            {rule.vector},
            {rule.leftover},
            {rule.small or rule.leftover},
        ):
            return layout
    plain = seen[LEFTOVER] | seen["small"]
    if seen[VECTOR] == {RULES["new"].vector} and plain <= {"BF16", "F16"}:
        return "new"
    return "other"
