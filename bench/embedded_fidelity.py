"""Measure what a type and a mode cost in pictures of the embedded model, over many seeds.

    python -m bench.embedded_fidelity --seeds 64 --write bench/results/embedded_fidelity.csv

On a CPU the compute modes run as their torch twins, which round as the kernels do. No GPU, no network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.progress import Progress

from bench.record import origin, write_csv
from flux_kernels.compute import COMPUTE_MODES
from flux_kernels.generation.base_pipeline import go_offline_quietly, load_pipeline
from flux_kernels.generation.embedded import (
    EMBEDDED_PROMPTS,
    PIPELINE_KWARGS,
    embedded_model_path,
    embedded_transformer,
    read_digits,
)
from flux_kernels.swap import swap_linear

FORMATS = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K")
BLOCKS = "*transformer_blocks.*"
CPU = torch.device("cpu")


def main(
    seeds: Annotated[int, typer.Option(help="Pictures a row; prompts repeat.")] = 64,
    formats: Annotated[str, typer.Option(help="Comma-separated types of the block matrices.")] = ",".join(FORMATS),
    write: Annotated[Path | None, typer.Option(help="CSV to write.")] = None,
) -> None:
    """Draw the same prompts and seeds in 16 bit and in every type and mode, and compare the pictures."""
    go_offline_quietly()
    pipeline = load_pipeline(embedded_model_path(), embedded_transformer().float(), torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompts = [EMBEDDED_PROMPTS[i % len(EMBEDDED_PROMPTS)] for i in range(seeds)]
    reference = draw(pipeline, prompts)
    read = read_digits(reference)
    rows = []
    work = [(name, mode) for name in formats.split(",") for mode in COMPUTE_MODES]
    with Progress() as progress:
        task = progress.add_task("drawing", total=len(work))
        for name, mode in work:
            transformer = embedded_transformer().float()
            swap_linear(transformer, "torch", mode, format=name, include=BLOCKS)
            pipeline.register_modules(transformer=transformer)
            images = draw(pipeline, prompts)
            same = sum(a == b for a, b in zip(read_digits(images), read, strict=True)) / seeds
            scores = compare(images, reference) | dict(same_digit=round(same, 4), seeds=seeds)
            rows.append(dict(format=name, compute=mode) | scores | origin(CPU))
            progress.advance(task)
    for row in rows:
        print(" ".join(f"{row[key]!s:>16}" for key in ("format", "compute", "psnr_db", "ssim", "squared_error", "same_digit")))
    if write:
        write_csv(rows, write)


def draw(pipeline, prompts: list[str]) -> list:
    """Draw one picture a prompt, seed 0 upwards."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    return pipeline(prompt=prompts, generator=generators, **PIPELINE_KWARGS).images


def compare(images: list, reference: list) -> dict[str, float]:
    """Return PSNR in dB (of the mean squared error over all), mean SSIM, and that error (pixels 0 to 1)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    got, expected = (torch.stack([_pixels(image) for image in side]) for side in (images, reference))
    error = (got - expected).square().mean().item()
    ssim = structural_similarity_index_measure(got, expected, data_range=1.0).item()
    return dict(psnr_db=round(-10 * np.log10(max(error, 1e-12)), 2), ssim=round(ssim, 5), squared_error=float(f"{error:.4g}"))


def _pixels(image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)


if __name__ == "__main__":
    typer.run(main)
