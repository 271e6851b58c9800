"""Recognise the model of a file by its tensors: which architecture, in which naming.

A file of a model that no row describes is refused with that model's name. `general.architecture` recognises nothing: FLUX.1,
FLUX.2 and Chroma all say "flux", and some writers say "pig", "cow" or nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from ..errors import GGUFError
from .architecture import DIFFUSERS, WITH_DIFFUSERS, Architecture, Mark
from .architectures import ARCHITECTURES
from .names import PREFIXES, strip_prefix

_LOADS = "flux_kernels loads " + ", ".join(f"{row.name} ({row.covers})" for row in reversed(ARCHITECTURES)) + "."


# What stands next to the transformer in whole checkpoints. No transformer has tensors of these names.
COMPANIONS = (
    *("first_stage_model.", "cond_stage_model.", "conditioner.", "vae.", "text_encoders."),
    *("text_encoder.", "text_encoder_2.", "text_encoder_3."),
)
# These are only taken for parts of a whole checkpoint where the transformer has a prefix of its own.
_BESIDE_PREFIX = ("text_model.", "clip_l.", "clip_g.", "t5xxl.", "te.", "te1.", "te2.")


_TEXT_ENCODER = "It belongs to the pipeline's text encoder, not its transformer."
_ITS_LOADER = "flux_kernels.load_text_encoder(path) loads it, or says which text encoders it loads."
_T5 = "Load it with flux_kernels.load_t5(path), or give it to `flux-kernels generate` as --t5."
LORA = Mark(
    "a LoRA",
    r".*(lora_[AB]\b|lora[_.](up|down)\b|hada_w[12]_|lokr_w[12]\b).*",
    "Load the base model, then pipeline.load_lora_weights(...).",
)
# First match wins: the finer marks stand before the coarser ones.
OTHER_TRANSFORMERS: tuple[Mark, ...] = (
    Mark("FLUX.3", r"early_stream_modulations\..*", WITH_DIFFUSERS),
    Mark("Qwen-Image 2.1", r"txt_in\.text_norm\.weight", WITH_DIFFUSERS),
    Mark("a FLUX.1 ControlNet", r"(controlnet_(x_embedder|blocks|single_blocks)|controlnet_mode_embedder)\..*"),
    Mark("FLUX.1 Redux (an image encoder)", r"redux_(up|down)\..*"),
    Mark("HunyuanVideo", r"(txt_in\.individual_token_refiner|context_embedder\.token_refiner)\..*", WITH_DIFFUSERS),
    Mark("HunyuanVideo or HunyuanImage", r"double_blocks\.[0-9]+\.img_attn_qkv\..*", WITH_DIFFUSERS),
    Mark("HiDream", r"double_stream_blocks\..*", WITH_DIFFUSERS),
    Mark("AuraFlow", r"(double_layers\..*|cond_seq_linear\.weight|joint_transformer_blocks\..*)", WITH_DIFFUSERS),
    Mark("LTX-Video", r"(patchify_proj\.weight|transformer_blocks\.[0-9]+\.scale_shift_table)", WITH_DIFFUSERS),
    Mark("a Z-Image ControlNet", r"control_(all_x_embedder|layers|noise_refiner)\..*"),
    Mark("OmniGen 2 or Boogu", r"ref_image_(refiner|patch_embedder)\..*"),
    Mark("Lumina 2", r"(cap_embedder|noise_refiner|context_refiner)\..*", WITH_DIFFUSERS),
    Mark("Mochi", r"blocks\.[0-9]+\.attn\.qkv_x\.weight", WITH_DIFFUSERS),
    Mark("Cosmos", r"net\.blocks\..*", WITH_DIFFUSERS),
    Mark("Stable Diffusion 1, 2 or XL (a UNet)", r"(input_blocks|down_blocks)\..*", WITH_DIFFUSERS),
)
# What may also lie beside a transformer in one file, and is only asked about where no such transformer is found.
OTHER_PARTS: tuple[Mark, ...] = (
    Mark("a T5 encoder", r"(enc\.blk\.[0-9]+\..*|encoder\.block\.[0-9]+\.layer\.[0-9]+\..*)", _T5),
    Mark("a CLIP model", r"(text_model\..*|v\.blk\.[0-9]+\..*|vision_model\..*)", _TEXT_ENCODER),
    Mark(
        "a language model", r"(blk\.[0-9]+\..*|token_embd\.weight|model\.layers\.[0-9]+\..*)", f"{_TEXT_ENCODER} {_ITS_LOADER}"
    ),
    Mark("a VAE", r"(decoder|encoder|first_stage_model)\..*", "It belongs to the pipeline's vae, not its transformer."),
)


def canonical_names(names: Collection[str]) -> dict[str, str]:
    """Map names without prefix to the names in the file; raise GGUFError where two become one."""
    canonical: dict[str, str] = {}
    for name in names:
        bare = strip_prefix(name)
        if bare in canonical:
            raise GGUFError(f"Tensors {canonical[bare]!r} and {name!r} are both {bare!r}. A file must hold each tensor once.")
        canonical[bare] = name
    return canonical


def transformer_names(names: Collection[str]) -> list[str]:
    """Return the names of a file's transformer: text encoders and VAE beside it are left out.

    Where there is nothing else, they are returned, so that it can be said what they are.
    """
    whole = any(name.startswith(PREFIXES[0]) for name in names)
    companions = COMPANIONS + _BESIDE_PREFIX if whole else COMPANIONS
    return [name for name in names if not name.startswith(companions)] or list(names)


def note_left_out(names: Collection[str]) -> tuple[str, ...]:
    """Say how many tensors of other parts were left out; () for none."""
    return (f"{len(names)} tensors of other parts (text encoders, VAE) are left out.",) if names else ()


def recognise(names: Collection[str]) -> Architecture | None:
    """Return the architecture that tensor names (without prefix) belong to, or None."""
    if any(_shown_by(mark.tensor, names) for mark in (LORA, *_relatives(names))):
        return None
    fine = next((row for row in ARCHITECTURES if not row.mark_needs and _shown_by(row.mark, names)), None)
    if fine is not None or any(_shown_by(mark.tensor, names) for mark in OTHER_TRANSFORMERS):
        return fine
    coarse = (row for row in ARCHITECTURES if not {*row.mark_needs}.isdisjoint(names) and _shown_by(row.mark, names))
    return next(coarse, None)


def _relatives(names: Collection[str]) -> list[Mark]:
    """Return the marks of the relatives of each architecture whose mark the names have."""
    return [mark for row in ARCHITECTURES if row.relatives and _shown_by(row.mark, names) for mark in row.relatives]


def naming_of(architecture: Architecture, names: Collection[str]) -> str:
    """Return the naming of tensors (without prefix): the original where any name is only the original's."""
    original = architecture.links and any(map(architecture.is_original, names))
    return architecture.original if original else DIFFUSERS


def expect(names: Collection[str], stated: str | None, wanted: tuple[Architecture, ...] = ARCHITECTURES) -> Architecture:
    """Return the architecture of a file.

    Args:
        names: its tensor names, without prefix.
        stated: its `general.architecture`. Tensors decide; it only helps to name what is refused.
        wanted: the architectures that will do.

    Raises:
        GGUFError: for any other file, saying what it is.
    """
    known = recognise(names)
    if known is not None and known in wanted:
        return known
    raise GGUFError(_refusal(known, names, stated, wanted))


def _refusal(known: Architecture | None, names: Collection[str], stated: str | None, wanted: tuple[Architecture, ...]) -> str:
    """Say what a file holds that is none of the wanted architectures, and what to do."""
    if not names:
        return f"The file holds no tensors. {_LOADS}"
    some = "" if wanted == ARCHITECTURES else " or ".join(row.name for row in wanted)
    instead = f", not {some}" if some else ", which flux_kernels does not load"
    if known is not None:
        advice = "Load it with flux_kernels.load_transformer(path)."
        return f"This is {known.name}{instead} (it holds {_shown_by(known.mark, names)!r}). {_LOADS} {advice}"
    for mark in (LORA, *_relatives(names), *OTHER_TRANSFORMERS, *OTHER_PARTS):
        tensor = _shown_by(mark.tensor, names)
        if tensor is not None:
            return f"This is {mark.model}{instead} (it holds {tensor!r}). {_LOADS} {mark.advice}".rstrip()
    declared = f"its architecture key says {stated!r}" if stated else "it has no architecture key"
    examples = ", ".join(sorted(names)[:3])
    model = f"{some} transformer" if some else "transformer that is known here"
    return f"This is no {model}: {declared}, its tensors are called {examples}, ... {_LOADS}"


def lora_tensor(names: Collection[str]) -> str | None:
    """Return a name that only a LoRA's tensors have, or None."""
    return _shown_by(LORA.tensor, names)


def _shown_by(mark: str, names: Collection[str]) -> str | None:
    """Return the first name that matches a regular expression as a whole."""
    pattern = re.compile(mark)
    return next((name for name in names if pattern.fullmatch(name)), None)
