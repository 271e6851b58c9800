"""Turn what people say about size into bytes of a file: "8GB", "7.5GiB", "Q4_K", or a card's memory."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from math import prod

from ..errors import FormatError
from ..formats import FORMATS
from ..generation.memory_plan import (
    CONTEXT_BYTES,
    GIB,
    LIVE_WIDTHS,
    TEXT_TOKENS,
    USABLE,
    companions,
    free_on_card,
    tiled,
    transformer_working,
)
from ..mixed.file_layout import KEY_VALUE_BYTES, FileLayout
from ..mixed.option import Option
from ..models.architectures.flux1 import FLUX1
from ..models.config import infer_config

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"(?P<number>[0-9][0-9_]*(\.[0-9]+)?)\s*(?P<unit>[a-zA-Z]*)")
RESOLUTIONS = ((512, 512), (768, 768), (1024, 1024), (1536, 1536), (2048, 2048))
OFFLOADS = ("model", "none")
ROOM = (
    f"{USABLE:.0%} of the card less {CONTEXT_BYTES / GIB:g} GiB for CUDA; activations of the image's and {TEXT_TOKENS} text tokens, "
    f"{LIVE_WIDTHS} hidden widths each in 16 bit and a tenth more; the largest matrix decoded; with offload model the text "
    "encoders and the VAE are off the card while the transformer runs, with none they are on it; an estimate"
)
"""The arithmetic of `--fits`, in words."""


def parse_size(text: str, layout: FileLayout, tensors: Collection[str]) -> int:
    """Return the bytes of a file that a size in words means.

    Args:
        text: a number of bytes, with GB or MB (powers of ten), GiB or MiB (powers of two); or a type name such as "Q4_K": as
            large as the file with all chosen tensors in that type.
        layout: the file.
        tensors: the tensors that a plan chooses.
    """
    if text in FORMATS:
        option = Option(text)
        broken = next((name for name in tensors if not option.fits(layout.shapes[name])), None)
        if broken:
            raise FormatError(f"{broken} has rows of {layout.shapes[broken][-1]} weights, which are no whole blocks of {text}.")
        return layout.file_bytes(dict.fromkeys(tensors, option)) + KEY_VALUE_BYTES
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match["unit"].upper()) if match else None
    if match is None or unit is None:
        raise FormatError(
            f"{text!r} is no size. Legal: bytes (8000000000), 8GB or 750MB (powers of ten), 7.5GiB (powers of two), or a type "
            "(Q4_K: as large as the file in that type)."
        )
    return int(float(match["number"]) * unit) if "." in match["number"] else int(match["number"]) * unit


def parse_card(text: str) -> float:
    """Return the GiB of a card written as "12GB" or "12": the names of cards mean powers of two."""
    match = re.fullmatch(r"(?P<number>[0-9]+(\.[0-9]+)?)\s*(GB|GiB|G)?", text.strip(), re.IGNORECASE)
    if match is None or float(match["number"]) <= 0:
        raise FormatError(f"{text!r} is no card. Write its memory, as in 12GB.")
    return float(match["number"])


def parse_resolution(text: str) -> tuple[int, int]:
    """Return (width, height) in pixels of "1024x1024"."""
    match = re.fullmatch(r"([0-9]{1,5})[xX]([0-9]{1,5})", text.strip())
    if match is None or min(int(match[1]), int(match[2])) < 16:
        raise FormatError(f"{text!r} is no resolution. Write width x height in pixels, as in 1024x1024.")
    return int(match[1]), int(match[2])


@dataclass(frozen=True)
class Room:
    """Say what a card leaves for the file at one resolution, in bytes.

    Attributes:
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        activations: of the transformer, a decoded matrix included.
        vae: memory of the VAE while it decodes the picture, in tiles above 1024 x 1024.
        beside: weights of other parts that stay on the card while the transformer runs.
        file: what is left for the file; negative where nothing is.
    """

    width: int
    height: int
    activations: int
    vae: int
    beside: int
    file: int


def room_on_card(layout: FileLayout, card_gib: float, width: int, height: int, offload: str = "model") -> Room:
    """Return what a card leaves for the file of the transformer, by the arithmetic of ROOM."""
    if offload not in OFFLOADS:
        raise FormatError(f"Unknown offload {offload!r}. Legal: {', '.join(OFFLOADS)}.")
    working = _transformer_bytes(layout, width, height)
    if layout.architecture is not FLUX1:
        if offload == "none":
            raise FormatError(
                "--offload none counts the text encoders and the VAE, whose sizes are known here of FLUX.1 alone, not of "
                f"{layout.model or 'this model'}. Take --offload model, or subtract what they take from the card yourself "
                "and give what is left for the file: --size 6GB."
            )
        return Room(width, height, working, 0, 0, free_on_card(card_gib) - working)
    others = companions(width, height)
    vae = next(part for part in others if part.name == "vae")
    decoding = tiled(vae.working, width, height)
    resident = sum(part.weights for part in others) if offload == "none" else 0
    peak = max(working, decoding) if offload == "none" else working
    return Room(width, height, working, vae.weights + decoding, resident, free_on_card(card_gib) - resident - peak)


def _transformer_bytes(layout: FileLayout, width: int, height: int) -> int:
    """Return the bytes of the transformer's activations and of its largest matrix decoded."""
    architecture = layout.architecture
    if architecture is None:
        raise FormatError(
            f"What {layout.model or 'this model'} takes on a card is not known. Give the file's size instead of a card."
        )
    config = infer_config(architecture, layout.shapes, architecture.main_naming)
    tokens = architecture.picture_tokens(architecture.settings(config), width, height) + architecture.text_tokens
    decoded = 2 * max(prod(layout.shapes[name]) for name in layout.blocks)
    return transformer_working(architecture.width(config), tokens, decoded=decoded)


def room_table(layout: FileLayout, card_gib: float, offload: str = "model") -> list[Room]:
    """Return what a card leaves for the file at usual resolutions."""
    return [room_on_card(layout, card_gib, width, height, offload) for width, height in RESOLUTIONS]
