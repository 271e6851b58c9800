"""The embedded model: a small trained FluxPipeline that ships inside the package and needs no network.

It has the architecture of FLUX.1 at a small size (1 double and 2 single blocks, width 256) and draws handwritten
digits as neon signs, 64 x 64 pixels. Every K inside its transformer blocks is a multiple of 256, so that every block
type can hold it.

    pipeline = FluxPipeline.from_pretrained(embedded_model_path())
    image = pipeline(prompt="a red seven", **PIPELINE_KWARGS).images[0]

Importing this module imports neither torch nor diffusers.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
    from PIL.Image import Image

__all__ = [
    "BLOCKS",
    "EMBEDDED_PROMPTS",
    "PIPELINE_KWARGS",
    "embedded_model_path",
    "embedded_transformer",
    "read_digits",
    "words_note",
]

# What Flux GGUF files quantize.
BLOCKS = ("transformer_blocks.*", "single_transformer_blocks.*")
EMBEDDED_PROMPTS: tuple[str, ...] = (
    "a red seven",
    "a blue three",
    "a green zero",
    "a yellow five",
    "a pink two",
    "a cyan eight",
    "an orange four",
    "a purple nine",
    "a white six",
    "a picture of an orange one",
    "the digit 4 in blue",
    "a seven",
)
"""Prompts the model knows well. Digits are words or figures, colours are red, orange, yellow, green, cyan, blue,
purple, pink and white; without a colour (or a digit) the seed chooses."""

PIPELINE_KWARGS: dict[str, Any] = {
    "height": 64,
    "width": 64,
    "num_inference_steps": 16,
    "guidance_scale": 2.5,
    "max_sequence_length": 8,
}
"""Arguments of the pipeline call that the model was trained for: pixels, steps, distilled guidance (1 to 5), tokens."""


def embedded_model_path() -> Path:
    """Return the directory of the embedded pipeline, in the layout `FluxPipeline.from_pretrained` reads.

    Raises FileNotFoundError where the package was installed without its data.
    """
    path = Path(str(files("flux_kernels"))) / "demo_model"
    if not (path / "model_index.json").is_file():
        raise FileNotFoundError(f"the embedded model is missing from {path}: reinstall flux_kernels with its package data")
    return path


def words_note(*texts: str) -> str:
    """Return a sentence that names the words the embedded model does not know; "" where it knows all.

    Its text encoders were trained on digits, colours and the few words around them: all else is noise to it.
    """
    tokenizer = json.loads((embedded_model_path() / "tokenizer_2" / "tokenizer.json").read_text(encoding="utf-8"))
    known = {piece.removeprefix("\u2581") for piece, _ in tokenizer["model"]["vocab"] if piece.startswith("\u2581")}
    words = dict.fromkeys(word.strip(string.punctuation) for text in texts for word in text.split())
    unknown = [word for word in words if word not in known]
    if not unknown:
        return ""
    return (
        f'The embedded model draws digits in colours, such as "{EMBEDDED_PROMPTS[0]}"; it does not know: {", ".join(unknown)}.'
    )


def read_digits(images: Iterable[Image]) -> list[int]:
    """Read the digit on each 64 x 64 RGB image with the small perceptron that ships beside the model.

    It learned from real handwriting and never saw a generated picture, so its hit rate measures how well a
    (quantized) model still draws what it is asked for.
    """
    import numpy as np
    from safetensors.numpy import load_file

    weights = {name: w.astype(np.float32) for name, w in load_file(embedded_model_path() / "reader.safetensors").items()}
    pictures = np.stack([np.asarray(image.convert("RGB").resize((64, 64)), dtype=np.float32) for image in images]) / 255
    brightness = pictures.max(axis=3).reshape(-1, 16, 4, 16, 4).mean(axis=(2, 4)).reshape(-1, 256)
    hidden = np.maximum(brightness @ weights["hidden.weight"].T + weights["hidden.bias"], 0)
    return [int(digit) for digit in (hidden @ weights["out.weight"].T + weights["out.bias"]).argmax(axis=1)]


def embedded_transformer() -> FluxTransformer2DModel:
    """Load the embedded transformer in the 16 bits it ships in."""
    from diffusers import FluxTransformer2DModel
    from safetensors import safe_open

    folder = embedded_model_path() / "transformer"
    with safe_open(folder / "diffusion_pytorch_model.safetensors", framework="pt") as stored:
        dtype = stored.get_tensor(next(iter(stored.keys()))).dtype
    return FluxTransformer2DModel.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
