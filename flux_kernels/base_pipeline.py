"""Put a transformer into a local diffusers Flux pipeline: no hub, no network, and no chatter from the libraries."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import GGUFError

PARTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")
_INDEX = "model_index.json"
_HOW = (
    "--base is a folder in the diffusers layout, with {parts}; the transformer's weights are not needed in it. Get one with "
    '`hf download black-forest-labs/FLUX.1-dev --exclude "transformer/*" "*.sft" "flux1-dev*" --local-dir FLUX.1-dev`.'
)


def go_offline_quietly() -> None:
    """Keep the Hugging Face libraries off the network and their notes off the screen; call it before they are imported."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def check_base(base: Path) -> None:
    """Raise FileNotFoundError, saying what is missing and how to get it, where `base` is no complete Flux pipeline folder."""
    how = _HOW.format(parts=", ".join(PARTS))
    if not base.is_dir():
        raise FileNotFoundError(f"{base} is not a folder. {how}")
    index = base / _INDEX
    if not index.is_file():
        raise FileNotFoundError(f"{base} holds no {_INDEX}. {how}")
    missing = [part for part in PARTS if not (base / part).is_dir()]
    if missing:
        raise FileNotFoundError(f"{base} lacks {', '.join(missing)}. {how}")
    made_for = json.loads(index.read_text(encoding="utf-8")).get("_class_name", "")
    if not str(made_for).startswith("Flux"):
        raise FileNotFoundError(f"{base} is a {made_for or 'pipeline without a name'}, not a FLUX.1 pipeline. {how}")


def load_pipeline(base: Path, transformer: nn.Module | None, dtype: torch.dtype) -> Any:
    """Load a FluxPipeline around `transformer` from local files alone.

    Args:
        base: folder that passes `check_base`.
        transformer: a FluxTransformer2DModel, or None to put one in later with `register_modules`.
        dtype: of the text encoders and the VAE.
    """
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(base, transformer=transformer, dtype=dtype, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check_fit(pipeline: Any, config: Any) -> None:
    """Raise GGUFError where text encoders or VAE do not fit the transformer's config, naming both sizes.

    Args:
        pipeline: a FluxPipeline.
        config: the transformer's config, as a mapping.
    """
    parts = {
        "joint_attention_dim": ("text_encoder_2", pipeline.text_encoder_2.config.d_model),
        "pooled_projection_dim": ("text_encoder", pipeline.text_encoder.config.hidden_size),
        "in_channels": ("vae", 4 * pipeline.vae.config.latent_channels),
    }
    wrong = [
        f"its {part} gives {given}, the file's {key} is {config[key]}"
        for key, (part, given) in parts.items()
        if given != config[key]
    ]
    if wrong:
        raise GGUFError(
            f"The base pipeline does not fit the GGUF file: {'; '.join(wrong)}. Take the --base folder of the file's own "
            "model. Files with more input channels (Fill, Canny, Depth) need an image input, which this command has not yet."
        )


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one CPU thread: the embedded model is so small that a second one only waits, long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
