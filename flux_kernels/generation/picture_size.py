"""Refuse sizes of pictures that cannot come out, before hours are spent on them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..compute import dtype_name
from ..errors import FormatError
from ..machine.free_memory import free_bytes
from ..models.calls import PIXELS_A_TOKEN
from .memory_plan import GIB, Part


def longest_side(dtype: torch.dtype) -> int:
    """Return the pixels of the longest side whose tokens all have a position of their own.

    diffusers counts rows and columns in the activations' dtype, in which whole numbers are exact up to 2 / eps: 256 in
    bfloat16. Tokens further out share positions, and the picture repeats itself.

    Source: diffusers 0.42.1 FluxPipeline._prepare_latent_image_ids.
    """
    return (int(2 / torch.finfo(dtype).eps) + 1) * PIXELS_A_TOKEN


def check_positions(width: int, height: int, dtype: torch.dtype) -> None:
    """Raise FormatError where a picture of so many pixels has more positions than `dtype` can count."""
    longest = longest_side(dtype)
    if max(width, height) <= longest:
        return
    name = dtype_name(dtype)
    raise FormatError(
        f"A picture of {width} x {height} is too large: positions in {name} are exact up to {longest} pixels a side, and "
        "FLUX.1 was made for about 1024 x 1024. Take a smaller --width and --height, or another --dtype (float32 "
        "counts further)."
    )


def check_memory(parts: Iterable[Part], width: int, height: int) -> None:
    """Raise FormatError where the activations of one model are more than this computer's free memory.

    Args:
        parts: the models of the pipeline, measured for the picture; their weights are loaded already, or mapped.
        width: of the picture, in pixels.
        height: of the picture, in pixels.
    """
    largest = max(parts, key=lambda part: part.working)
    memory = free_bytes(torch.device("cpu"))
    if memory is not None and largest.working > memory:
        raise FormatError(
            f"A picture of {width} x {height} is too large: the {largest.name} would need about {largest.working / GIB:.1f} "
            f"GiB for its activations, {memory / GIB:.1f} GiB of memory are free. Take a smaller --width and --height."
        )
