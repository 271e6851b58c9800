"""Small files for every task of `generate`, around the embedded pipeline.

Random transformers, its T5, pictures.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from transformers import T5EncoderModel

from flux_kernels.generation.embedded import embedded_model_path

from .flux_files import Architecture, flux_file, layout_types
from .t5_files import type_of, write_t5

IN_CHANNELS = {"dev": 64, "schnell": 64, "canny": 128, "fill": 384}


def write_transformer(folder: Path, name: str) -> Path:
    """Write a random transformer of 1 + 1 blocks that fits the embedded pipeline."""
    variant = next(variant for variant in IN_CHANNELS if name.startswith(variant)) if name != "kontext" else "dev"
    architecture = Architecture(in_channels=IN_CHANNELS[variant], guidance=variant != "schnell")
    return flux_file(architecture, layout_types("new", "Q8_0")).write(folder / f"{name}.gguf")


def write_embedded_t5(path: Path, kind: str = "Q8_0") -> dict:
    """Write the embedded pipeline's T5 encoder under llama.cpp's names; return what its tensors decode to."""
    model = T5EncoderModel.from_pretrained(embedded_model_path() / "text_encoder_2", dtype=torch.float32)
    return write_t5(model, path, types=lambda name, shape: type_of(name, shape, (kind,), kind))


def write_picture(path: Path, size: tuple[int, int] = (64, 64), colour: str = "red", part: float = 0.5) -> Path:
    """Draw a disc on black, a `part` of the picture wide and high."""
    picture = Image.new("RGB", size)
    corners = [round(side * (1 + sign * part) / 2) for sign in (-1, 1) for side in size]
    ImageDraw.Draw(picture).ellipse(corners, fill=colour)
    picture.save(path)
    return path
