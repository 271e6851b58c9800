"""Refuse sizes of pictures that cannot come out, before hours are spent on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..compute import dtype_name
from ..errors import FormatError
from ..machine.free_memory import free_bytes
from ..models.architecture import Architecture
from .memory_plan import GIB, Part, tiled


def longest_side(dtype: torch.dtype, pixels_a_token: int) -> int:
    """Return the pixels of the longest side whose tokens all have a position of their own.

    For pipelines of diffusers that count rows and columns in the activations' dtype, in which whole numbers are exact up to
    2 / eps: 256 in bfloat16. Tokens further out share positions, and the picture repeats itself.

    Source: diffusers 0.42.1 FluxPipeline._prepare_latent_image_ids.
    """
    return (int(2 / torch.finfo(dtype).eps) + 1) * pixels_a_token


def check_positions(
    width: int, height: int, dtype: torch.dtype, architecture: Architecture, config: Mapping[str, Any], *, rounded: bool
) -> None:
    """Raise FormatError where a picture of so many pixels has more positions than can be told apart.

    Args:
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        dtype: of the activations.
        architecture: of the transformer.
        config: of the transformer.
        rounded: whether the pipeline counts positions in `dtype`.
    """
    usual = architecture.settings(config)
    patch = usual.patch or architecture.patch
    made_for = f"{architecture.name} was made for about {usual.size[0]} x {usual.size[1]}"
    start, smaller = f"A picture of {width} x {height} is too large", "Take a smaller --width and --height"
    if architecture.side_tokens is not None and max(width, height) > architecture.side_tokens(config) * patch:
        longest = architecture.side_tokens(config) * patch
        raise FormatError(f"{start}: the model has positions for {longest} pixels a side, and {made_for}. {smaller}.")
    if rounded and max(width, height) > longest_side(dtype, patch):
        raise FormatError(
            f"{start}: positions in {dtype_name(dtype)} are exact up to {longest_side(dtype, patch)} pixels a side, and "
            f"{made_for}. {smaller}, or another --dtype (float32 counts further)."
        )


def check_memory(parts: Iterable[Part], width: int, height: int) -> None:
    """Raise FormatError where the activations of one model are more than this computer's free memory.

    Args:
        parts: the models of the pipeline, measured for the picture; their weights are loaded already, or mapped.
        width: of the picture, in pixels.
        height: of the picture, in pixels.
    """
    _check_largest(parts, free_bytes(torch.device("cpu")), "of memory are free", width, height)


def check_gpu_memory(parts: Iterable[Part], card: int, width: int, height: int) -> None:
    """Raise FormatError where the activations of one model are more than a GPU holds.

    No offload helps then.

    Args:
        parts: the models of the pipeline, measured for the picture; the VAE decodes in tiles where nothing fits otherwise.
        card: bytes of the GPU's memory, free or not.
        width: of the picture, in pixels.
        height: of the picture, in pixels.
    """
    small = [replace(part, working=tiled(part.working, width, height)) if part.name == "vae" else part for part in parts]
    _check_largest(small, card, "is what the GPU has", width, height)


def _check_largest(parts: Iterable[Part], memory: int | None, which: str, width: int, height: int) -> None:
    largest = max(parts, key=lambda part: part.working)
    if memory is not None and largest.working > memory:
        raise FormatError(
            f"A picture of {width} x {height} is too large: the {largest.name} would need about {largest.working / GIB:.1f} "
            f"GiB for its activations, {memory / GIB:.1f} GiB {which}. Take a smaller --width and --height."
        )
