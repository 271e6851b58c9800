"""The diffusers pipelines that draw a picture from text, as data: one row for each class.

A row says how the class names what `generate` says, and which sizes of its parts must fit the transformer. What a model's makers
use (steps, guidance, size, tokens) stands with the architectures (models/architectures/).

Source: `__call__`, `check_inputs` and `encode_prompt` of the classes in diffusers 0.42.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import GGUFError
from ..install_hints import PIPELINE_DOWNLOAD
from ..models.architecture import Architecture, Variant


@dataclass(frozen=True)
class Fit:
    """Relate an argument of the transformer's config to what parts of the folder give.

    Attributes:
        argument: of the transformer's config.
        sizes: (part, key of its config.json); the values add up.
        times: how often the sum is taken: layers of a text encoder side by side, latent pixels of a token.
    """

    argument: str
    sizes: tuple[tuple[str, str], ...]
    times: int = 1

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that give the sizes."""
        return tuple(part for part, _ in self.sizes)


@dataclass(frozen=True)
class TextPipeline:
    """Describe a diffusers pipeline class that draws from text.

    Attributes:
        fits: what its parts give the transformer.
        guidance: argument that takes the model's guidance.
        negative: argument that takes the strength of a negative prompt; None where the class takes no such prompt.
        counts_above: strength above which a negative prompt counts, and the transformer runs twice a step.
        deaf: whether it ignores guidance where it says that its model is distilled.
        told: argument of the transformer's config that is True where the transformer is told the guidance, and nothing else takes
            it; None where the class guides by itself.
        nothing: negative prompt to give where the user gives none; the class guides with one alone. None leaves it to the class.
        one_batch: whether prompt and negative prompt run in one batch.
        t5: part that is a T5 encoder.
        optional: parts that a folder may leave out.
        other_tokens: text tokens that the transformer gets besides the `max_sequence_length` ones.
        rounded_positions: whether it counts positions in the dtype of the text encoders.
        twins: classes with the same parts; their folders do as well.
        download: command that gets a folder without the transformer, where one was tried.
    """

    fits: tuple[Fit, ...]
    guidance: str = "guidance_scale"
    negative: str | None = None
    counts_above: float = 1.0
    deaf: bool = False
    told: str | None = None
    nothing: str | None = None
    one_batch: bool = False
    t5: str | None = None
    optional: tuple[str, ...] = ()
    other_tokens: int = 0
    rounded_positions: bool = False
    twins: tuple[str, ...] = ()
    download: str | None = None

    def batch(self, settings: Mapping[str, Any]) -> int:
        """Return how many pictures the transformer computes at once."""
        return 2 if self.one_batch and settings[self.guidance] > self.counts_above else 1


def _vae(argument: str, times: int = 1, key: str = "latent_channels") -> Fit:
    return Fit(argument, (("vae", key),), times)


def _text(argument: str, part: str = "text_encoder", key: str = "hidden_size", times: int = 1) -> Fit:
    return Fit(argument, ((part, key),), times)


# A token is 2 x 2 latent pixels.
_PATCH = 4

TEXT_PIPELINES: Mapping[str, TextPipeline] = {
    "FluxPipeline": TextPipeline(
        # Fill, Canny and Depth take more channels than they give.
        (
            _text("joint_attention_dim", "text_encoder_2", "d_model"),
            _text("pooled_projection_dim"),
            _vae("out_channels", _PATCH),
        ),
        negative="true_cfg_scale",
        told="guidance_embeds",
        t5="text_encoder_2",
        rounded_positions=True,
        twins=("FluxImg2ImgPipeline", "FluxKontextPipeline", "FluxFillPipeline", "FluxControlPipeline"),
        download=PIPELINE_DOWNLOAD,
    ),
    # Hidden states of three layers, side by side.
    "Flux2Pipeline": TextPipeline((_text("joint_attention_dim", times=3), _vae("in_channels", _PATCH))),
    "Flux2KleinPipeline": TextPipeline(
        (_text("joint_attention_dim", times=3), _vae("in_channels", _PATCH)),
        deaf=True,
    ),
    "ChromaPipeline": TextPipeline(
        (_text("joint_attention_dim", key="d_model"), _vae("in_channels", _PATCH)),
        negative="guidance_scale",
        t5="text_encoder",
        rounded_positions=True,
        twins=("ChromaImg2ImgPipeline", "ChromaInpaintPipeline"),
    ),
    "Krea2Pipeline": TextPipeline(
        (_text("text_hidden_dim"), _vae("in_channels", _PATCH, "z_dim")),
        negative="guidance_scale",
        counts_above=0.0,
    ),
    "ZImagePipeline": TextPipeline(
        (_text("cap_feat_dim"), _vae("in_channels")),
        negative="guidance_scale",
        counts_above=0.0,
        one_batch=True,
        twins=("ZImageImg2ImgPipeline", "ZImageInpaintPipeline"),
    ),
    "QwenImagePipeline": TextPipeline(
        (_text("joint_attention_dim"), _vae("in_channels", _PATCH, "z_dim")),
        # Its guidance_scale is for models that are told the scale; none is published.
        guidance="true_cfg_scale",
        negative="true_cfg_scale",
        nothing=" ",
        twins=("QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
    ),
    "StableDiffusion3Pipeline": TextPipeline(
        (
            _text("joint_attention_dim", "text_encoder_3", "d_model"),
            Fit("pooled_projection_dim", (("text_encoder", "projection_dim"), ("text_encoder_2", "projection_dim"))),
            _vae("in_channels"),
        ),
        negative="guidance_scale",
        one_batch=True,
        t5="text_encoder_3",
        optional=("text_encoder_3", "tokenizer_3"),
        # CLIP's.
        other_tokens=77,
        twins=("StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    ),
}
"""Class of diffusers -> what it asks for."""


def check_draws(architecture: Architecture, config: Mapping[str, Any], title: str = "") -> None:
    """Raise GGUFError where no pipeline draws a picture from text with a model.

    Args:
        architecture: of the model.
        config: of the model.
        title: of its file, as `file_title` gives it.
    """
    usual = architecture.settings(config, title)
    if usual.latent_frames > 1:
        reason = "makes videos, and flux_kernels draws pictures"
    elif not usual.from_text:
        reason = "does not draw from text alone, as `generate` does"
    elif not drawing_classes(architecture):
        reason = "has no pipeline here that draws from text"
    else:
        return
    files = "it" if usual.transformers == 1 else "each of its files"
    raise GGUFError(
        f"This is a {_named(architecture, usual, config, title)}, which {reason}. Load {files} in Python: "
        f"flux_kernels.load_transformer(path), for diffusers' {' or '.join(usual.pipelines or architecture.pipelines[:1])}."
    )


def _named(architecture: Architecture, usual: Variant, config: Mapping[str, Any], title: str) -> str:
    """Name a model, and where it is none of the published ones that of its kind."""
    published = architecture.published(config, title)
    name = architecture.variant_name(config, title)
    return name if published else f"model of the kind of {usual.name} ({name})"


def drawing_classes(architecture: Architecture) -> tuple[str, ...]:
    """Return the classes that draw from text with an architecture."""
    return tuple(name for name in architecture.pipelines if name in TEXT_PIPELINES)


def usual_batch(architecture: Architecture, usual: Variant) -> int:
    """Return how many pictures a transformer computes at once with the settings of its makers."""
    kinds = drawing_classes(architecture)
    return TEXT_PIPELINES[kinds[0]].batch(text_arguments(kinds[0], usual)) if kinds else 1


def text_arguments(kind: str, usual: Variant) -> dict[str, Any]:
    """Return the arguments of a pipeline call that draws as a model's makers do.

    Args:
        kind: a key of TEXT_PIPELINES.
        usual: the model's settings.
    """
    row = TEXT_PIPELINES[kind]
    arguments = {
        "height": usual.size[1],
        "width": usual.size[0],
        "num_inference_steps": usual.steps,
        row.guidance: usual.guidance,
        "max_sequence_length": usual.text_tokens - row.other_tokens,
    }
    return arguments if row.nothing is None else {**arguments, "negative_prompt": row.nothing}
