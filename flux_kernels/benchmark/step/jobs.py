"""What `whole_step` measures for a format: a step (true size or embedded model), and a denoising run."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from ...compute import COMPUTE_MODES
from ...errors import FormatError
from ...generation.base_pipeline import one_thread
from ...generation.embedded import PIPELINE_KWARGS, embedded_model_path
from ...models.calls import STEPS, TEXT
from ..names import DENOISING, DIFFUSERS, EMBEDDED_STEP, EXACT, OFFLOADED, OURS, STEP, TORCH
from ..providers import not_installed
from ..record import origin
from .inputs import FLUX_DEV, StepConfig
from .timing import DENOISED, EMBEDDED_BATCH, StepCase, measure_format, new_row

Key = tuple[str, str, str, str, str]  # format, provider, what, size, commit
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """Hold what makes rows of one kind for any format.

    Attributes:
        whats: kinds of rows, as in the column `what`.
        size: as in the column.
        providers: who is compared.
        made_at: origin columns.
        measure: takes a format and a progress function, gives rows without their origin.
    """

    whats: tuple[str, ...]
    size: str
    providers: list[str]
    made_at: dict[str, str]
    measure: Callable[[str, Progress], Iterable[dict]]

    def keys(self, name: str) -> list[Key]:
        """List the rows that it makes for a format."""
        return [(name, provider, what, self.size, self.made_at["commit"]) for provider in self.providers for what in self.whats]

    def rows(self, name: str, progress: Progress) -> Iterator[dict]:
        """Yield the rows of a format, with their origin."""
        return (row | self.made_at for row in self.measure(name, progress))


def step_job(size: str, full: bool, device: torch.device, repeats: int) -> Job:
    """Make the job of one step, FLUX.1-dev's at its true size or the embedded model's on one thread.

    Raises:
        FormatError: on an unknown size.
    """
    case, providers = true_size(size) if full else embedded(), _providers()

    def measure(name: str, progress: Progress) -> Iterable[dict]:
        rows = measure_format(case, name, providers, device, _dtype(device), repeats, progress)
        if full:
            return rows
        with one_thread():
            return list(rows)

    return Job((case.what,), case.size, providers, origin(device) if full else _embedded_origin(device), measure)


def denoising_job(device: torch.device, repeats: int) -> Job:
    """Make the job of the embedded model's denoising run on one thread; its row names missing packages."""
    providers, made_at = [name for name in _providers() if name != "dequantize"], _embedded_origin(device)
    missing = [name for name in ("diffusers", "transformers", "gguf") if not _installed(name)]
    if missing:
        note = str(not_installed(", ".join(missing)))
        return Job(
            (DENOISING,), DENOISED, [EXACT], made_at, lambda name, _: [new_row(name, EXACT, DENOISING, DENOISED, note=note)]
        )

    def measure(name: str, progress: Progress) -> Iterable[dict]:
        from .denoising import measure_denoising

        with one_thread():
            return measure_denoising(name, providers, device, _dtype(device), repeats, progress)

    return Job((DENOISING, OFFLOADED), DENOISED, providers, made_at, measure)


def _embedded_origin(device: torch.device) -> dict[str, str]:
    # As the rows are measured.
    with one_thread():
        return origin(device)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _installed(*names: str) -> bool:
    try:
        return all(importlib.util.find_spec(name) for name in names)
    except ModuleNotFoundError:  # where an import hook hides a package
        return False


def _providers() -> list[str]:
    """List who is compared; where diffusers is missing, decoding in torch stands for it, by its own name."""
    instead = [] if _installed("diffusers", "gguf") else ["dequantize"]
    return [TORCH, DIFFUSERS, *instead, *(OURS + mode for mode in COMPUTE_MODES)]


def true_size(size: str) -> StepCase:
    """Describe a FLUX.1-dev step of a size such as "1024x1024 batch 2"; raise FormatError on others."""
    match = re.fullmatch(r"(\d+)x(\d+)(?: batch (\d+))?", size)
    width, height, batch = (int(part or 1) for part in match.groups()) if match else (0, 0, 0)
    if not (width and height and batch) or width % 16 or height % 16:
        raise FormatError(f"A size is width x height in multiples of 16, got {size!r}. Known: {', '.join(STEPS)}.")
    return StepCase(STEP, size, FLUX_DEV, width, height, batch, TEXT, at_once=True)


def embedded() -> StepCase:
    """Describe a step of the embedded model; without safetensors its weights are random."""
    folder, stored = embedded_model_path() / "transformer", None
    if _installed("safetensors"):
        from safetensors.torch import load_file

        stored = load_file(folder / "diffusion_pytorch_model.safetensors")
    return StepCase(
        what=EMBEDDED_STEP,
        size=DENOISED,
        config=StepConfig.read(json.loads((folder / "config.json").read_text())),
        width=PIPELINE_KWARGS["width"],
        height=PIPELINE_KWARGS["height"],
        batch=EMBEDDED_BATCH,
        text=PIPELINE_KWARGS["max_sequence_length"],
        stored=stored,
    )
