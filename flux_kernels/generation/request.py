"""What to draw, with which files, and how it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .embedded import embedded_model_path

TRUE_CFG = 4.0
LEAST_SIDE = 16
"""Pixels of a picture's side, at least, whatever the model."""
MOST_SEED = 2**64 - 1
"""What torch's generators take at most."""


@dataclass(frozen=True)
class Lora:
    """Name a LoRA file and its strength."""

    file: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Lora:
        """Read "FILE" or "FILE:SCALE"; the colon of a Windows drive is no scale."""
        name, colon, scale = text.rpartition(":")
        try:
            return cls(Path(name), float(scale)) if colon and name else cls(Path(text))
        except ValueError:
            return cls(Path(text))


@dataclass(frozen=True)
class Request:
    """Say what to draw and how; sizes in pixels, None takes the model's default.

    Attributes:
        gguf: the transformer's GGUF file.
        base: diffusers folder with the rest of the pipeline.
        negative: negative prompt; costs a second pass a step.
        true_cfg: strength of the negative prompt, where that is not the guidance; None takes TRUE_CFG.
        t5: GGUF file of the T5 encoder, instead of the base's.
        image: picture to edit, repaint or redraw.
        mask: picture whose white part is repainted (Fill).
        control_image: edges or depth map to draw along (Canny, Depth).
        kontext: whether the file is a Kontext, which its tensors do not show.
        strength: of redrawing `image` with a dev file, 0 to 1.
        offload: a key of OFFLOADS.
        pin: whether weights that are copied to the GPU at every step are pinned in host memory.
        loras: LoRA files, applied together.
        backend: as in `swap_linear`.
        compute: as in `swap_linear`.
        dtype: of activations, text encoders and VAE.
    """

    gguf: Path
    base: Path
    prompt: str
    negative: str | None = None
    true_cfg: float | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    t5: Path | None = None
    image: Path | None = None
    mask: Path | None = None
    control_image: Path | None = None
    kontext: bool = False
    strength: float | None = None
    offload: str = "auto"
    pin: bool = False
    loras: Sequence[Lora] = ()
    backend: str = "auto"
    compute: str = "exact"
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        """Take names of files as text too."""
        for name in ("gguf", "base", "t5", "image", "mask", "control_image"):
            given = getattr(self, name)
            if isinstance(given, str):
                object.__setattr__(self, name, Path(given))

    @property
    def embedded(self) -> bool:
        """Whether text encoders and VAE are those of the model inside this package."""
        return self.base.resolve() == embedded_model_path().resolve()
