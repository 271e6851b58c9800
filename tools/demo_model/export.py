"""Put the trained parts together as a diffusers pipeline directory, and measure what it draws."""

import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from safetensors.numpy import load_file, save_file

from . import reader
from .prompts import COLOURS, DIGIT_WORDS
from .text import TextSide

_SHIFT = 1.5


class Scores(NamedTuple):
    """Holds shares in 0..1: digits drawn as asked, colours drawn as asked."""

    digits: float
    colours: float


def assemble(transformer: FluxTransformer2DModel, vae: AutoencoderKL, text: TextSide) -> FluxPipeline:
    """Build the float32 pipeline with a scheduler of static shift 1.5."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=_SHIFT, use_dynamic_shifting=False)
    pipeline = FluxPipeline(scheduler=scheduler, vae=vae, transformer=transformer, **text._asdict())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.inference_mode()
def rounding_loss(transformer: FluxTransformer2DModel, dtype: torch.dtype) -> float:
    """Measure the relative root-mean-square change of the weights when they are stored as `dtype`."""
    lost = sum((p.to(dtype).float() - p).square().sum().item() for p in transformer.parameters())
    return (lost / sum(p.square().sum().item() for p in transformer.parameters())) ** 0.5


def save(pipeline: FluxPipeline, weights: dict[str, np.ndarray], dtype: torch.dtype, out: Path) -> None:
    """Write the 16-bit pipeline and the reader to a new folder, then rename it to `out`, README.md kept."""
    new = Path(tempfile.mkdtemp(dir=out.parent, prefix=".demo_model_"))
    new.chmod(0o755)
    pipeline.to(dtype).save_pretrained(new, safe_serialization=True)
    _name_as_older_readers_do(new / "text_encoder" / "model.safetensors")
    save_file(weights, new / "reader.safetensors")
    if (out / "README.md").exists():
        shutil.copy2(out / "README.md", new / "README.md")
    if out.exists():
        shutil.rmtree(out)
    new.rename(out)


def _name_as_older_readers_do(path: Path) -> None:
    """Put CLIP's prefix back: transformers 5.0 needs it, later releases leave it out and read either."""
    weights = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def size(folder: Path) -> int:
    """Add up the bytes of all files under `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def draw(pipeline: FluxPipeline, prompts: list[str], *, seed: int, settings: dict) -> torch.Tensor:
    """Draw one picture a prompt, float32 [n, 3, 64, 64] in -1..1."""
    generator = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]
    images = pipeline(prompt=prompts, generator=generator, output_type="pt", **settings).images
    return images.float() * 2 - 1


def score(pipeline: FluxPipeline, weights: dict[str, np.ndarray], *, rounds: int, seed: int, settings: dict) -> Scores:
    """Draw every digit in every colour `rounds` times and count what the reader and the palette recognise."""
    asked = [(digit, colour) for digit in range(10) for colour in range(len(COLOURS))]
    prompts = [f"a {COLOURS[colour]} {DIGIT_WORDS[digit]}".replace("a orange", "an orange") for digit, colour in asked]
    right = torch.zeros(2)
    for turn in range(rounds):
        pictures = draw(pipeline, prompts, seed=seed + 1000 * turn, settings=settings)
        right[0] += (reader.read(weights, pictures) == torch.tensor([digit for digit, _ in asked])).sum()
        right[1] += (reader.read_colours(pictures) == torch.tensor([colour for _, colour in asked])).sum()
    digits, colours = (right / (rounds * len(asked))).tolist()
    return Scores(digits, colours)


def contact_sheet(pipeline: FluxPipeline, *, seed: int, settings: dict, zoom: int = 2) -> Image.Image:
    """Draw ten columns of digits in six rows: five of rotating colours, one left to the seed."""
    rows = []
    for row in range(6):
        colours = [COLOURS[(digit + 2 * row) % len(COLOURS)] if row < 5 else "" for digit in range(10)]
        prompts = [" ".join(f"a {colour} {word}".split()) for colour, word in zip(colours, DIGIT_WORDS, strict=True)]
        prompts = [p.replace("a orange", "an orange").replace("a eight", "an eight") for p in prompts]
        pictures = draw(pipeline, prompts, seed=seed + 100 * row, settings=settings)
        rows.append(torch.cat(list(pictures), dim=2))
    sheet = ((torch.cat(rows, dim=1) + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(sheet)
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
