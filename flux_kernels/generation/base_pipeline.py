"""Put a transformer into a local diffusers pipeline, without a hub, a network or chatter."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import GGUFError
from ..install_hints import PIPELINE_DOWNLOAD
from ..integrations.on_import import after_import
from ..models.architecture import Architecture

PARTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")
_INDEX = "model_index.json"
_HOW = (
    "--base is a folder in the diffusers layout, with {parts}; the transformer's weights are not needed in it. Get one with "
    "`" + PIPELINE_DOWNLOAD + "`."
)


def go_offline_quietly() -> None:
    """Keep the Hugging Face libraries off the network and their notes off the screen.

    Call it before they are imported. It imports none itself: each falls silent when it is imported, if ever.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for library in ("transformers", "diffusers"):
        os.environ.setdefault(f"{library.upper()}_VERBOSITY", "error")
        after_import(f"{library}.utils.logging", partial(_silence, f"{library}.utils.logging"))


def _silence(name: str) -> None:
    logging = sys.modules[name]
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def check_base(base: Path, given: Sequence[str] = ()) -> None:
    """Raise FileNotFoundError where `base` is no complete Flux pipeline folder.

    The sentence says what is missing and how to get it.

    Args:
        base: the folder.
        given: parts that come from elsewhere and may be missing.
    """
    needed = [part for part in PARTS if part not in given]
    how = _HOW.format(parts=", ".join(needed))
    made_for = _pipeline_of(base, how)
    missing = [part for part in needed if not (base / part).is_dir()]
    if missing:
        instead = " Or give the T5 encoder as a GGUF file with --t5." if missing == ["text_encoder_2"] else ""
        raise FileNotFoundError(f"{base} lacks {', '.join(missing)}. {how}{instead}")
    if not made_for.startswith("Flux"):
        raise FileNotFoundError(f"{base} is a {made_for or 'pipeline without a name'}, not a FLUX.1 pipeline. {how}")


def pipeline_class(base: Path, architecture: Architecture) -> str:
    """Return the class of the pipeline in a folder.

    Raises:
        FileNotFoundError: where it is none, or of another model.
    """
    how = f"Give the folder of a {architecture.pipelines[0]} in the diffusers layout; the transformer's weights are not needed in it."
    made_for = _pipeline_of(base, how)
    if made_for not in architecture.pipelines:
        raise FileNotFoundError(
            f"{base} is a {made_for or 'pipeline without a name'}, no pipeline of {architecture.name}. {how}"
        )
    return made_for


def _pipeline_of(base: Path, how: str) -> str:
    """Return the pipeline class that a folder names."""
    if not base.is_dir():
        raise FileNotFoundError(f"{base} is not a folder. {how}")
    index = base / _INDEX
    if not index.is_file():
        raise FileNotFoundError(f"{base} holds no {_INDEX}. {how}")
    return str(_read_json(index).get("_class_name", ""))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{path} is missing or no JSON ({error}). Get the --base folder again.") from error
    return content if isinstance(content, dict) else {}


def base_sizes(base: Path, t5_width: int | None = None) -> dict[str, tuple[str, int | None]]:
    """Read what the parts of a base folder give the transformer: argument of its config -> (part, size).

    Args:
        base: folder that passes `check_base`.
        t5_width: of a T5 encoder that replaces the folder's.
    """
    latent = _read_json(base / "vae" / "config.json").get("latent_channels")
    pooled = _read_json(base / "text_encoder" / "config.json").get("hidden_size")
    if t5_width is None:
        t5_width = _read_json(base / "text_encoder_2" / "config.json").get("d_model")
    return {
        "joint_attention_dim": ("text_encoder_2", t5_width),
        "pooled_projection_dim": ("text_encoder", pooled),
        "out_channels": ("vae", None if latent is None else 4 * latent),
    }


def check_fit(sizes: Mapping[str, tuple[str, int | None]], config: Mapping[str, Any]) -> None:
    """Raise GGUFError where text encoders or VAE do not fit the transformer's config, naming both sizes.

    Args:
        sizes: of `base_sizes`.
        config: the transformer's config.
    """
    wants = {**config, "out_channels": config.get("out_channels") or config["in_channels"]}
    wrong = [
        f"its {part} gives {given}, the file's {key} is {wants[key]}"
        for key, (part, given) in sizes.items()
        if given != wants[key]
    ]
    if wrong:
        raise GGUFError(
            f"The base pipeline does not fit the GGUF file: {'; '.join(wrong)}. Take the --base folder of the file's own model."
        )


def load_pipeline(
    base: Path,
    transformer: nn.Module | None,
    dtype: torch.dtype,
    *,
    kind: str = "FluxPipeline",
    text_encoder_2: nn.Module | None = None,
) -> Any:
    """Load a pipeline around `transformer` from local files alone.

    Args:
        base: folder that passes `check_base`, or has a `pipeline_class`.
        transformer: the model, or None to put one in later with `register_modules`.
        dtype: of the text encoders and the VAE.
        kind: class name in diffusers, such as "FluxFillPipeline".
        text_encoder_2: a T5EncoderModel instead of the folder's, which is then not read.
    """
    import diffusers

    replaced = {} if text_encoder_2 is None else {"text_encoder_2": text_encoder_2}
    pipeline = getattr(diffusers, kind).from_pretrained(
        base, transformer=transformer, dtype=dtype, local_files_only=True, **replaced
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one CPU thread.

    The embedded model is so small that a second thread would only wait, long on a busy machine.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
