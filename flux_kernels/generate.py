"""Draw with a user's own files: a GGUF transformer in a local diffusers pipeline, with LoRAs and offloading."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .base_pipeline import check_base, check_fit, load_pipeline, one_thread
from .embedded import PIPELINE_KWARGS, embedded_model_path
from .errors import BackendUnavailable, FormatError, GGUFError
from .flux import load_flux
from .footprint import memory_footprint
from .inspect_file import FileFacts, inspect_file
from .swap import swap_linear
from .swap_report import SwapReport

if TYPE_CHECKING:
    from PIL.Image import Image

OFFLOADS = {
    "none": "everything on the GPU (or on the CPU where there is no GPU)",
    "model": "one model at a time on the GPU: text encoders, transformer, VAE",
    "sequential": "one layer at a time on the GPU: slow, least memory",
    "auto": "the first of none, model, sequential that fits the GPU's free memory",
}
# Defaults of the published models: diffusers' documentation of FLUX.1-dev and FLUX.1-schnell.
_DEV = {"height": 1024, "width": 1024, "num_inference_steps": 28, "guidance_scale": 3.5, "max_sequence_length": 512}
_SCHNELL = {**_DEV, "num_inference_steps": 4, "guidance_scale": 0.0, "max_sequence_length": 256}


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
        true_cfg: strength of the negative prompt.
        offload: a key of OFFLOADS.
        loras: LoRA files, applied together.
        backend: as in `swap_linear`.
        compute: as in `swap_linear`.
        dtype: of activations, text encoders and VAE.
    """

    gguf: Path
    base: Path
    prompt: str
    negative: str | None = None
    true_cfg: float = 4.0
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    offload: str = "auto"
    loras: Sequence[Lora] = ()
    backend: str = "auto"
    compute: str = "exact"
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Made:
    """Hold an image, the parameters to write into its file, and what was done: layers swapped, offload, seconds."""

    image: Image
    parameters: dict[str, Any]
    report: SwapReport
    offload: str
    load_seconds: float
    draw_seconds: float


def generate(
    request: Request,
    *,
    status: Callable[[str], None] = lambda text: None,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> Made:
    """Draw one image.

    Args:
        request: what to draw.
        status: called with a line whenever a new stage begins.
        step: called with (steps done, steps in all) after each denoising step.

    Raises:
        FileNotFoundError: for files and folders that are missing or incomplete.
        GGUFError: for a file that is no FLUX.1 transformer, or does not fit the base.
        FormatError: for a LoRA that does not fit.
        BackendUnavailable: where backend, compute mode or offload cannot run here.
    """
    facts = check_request(request)
    started = time.perf_counter()
    status(f"loading {request.gguf.name}: {facts.variant}")
    transformer = load_flux(request.gguf, dtype=request.dtype)
    report = swap_linear(transformer, backend=request.backend, compute=request.compute)
    status(f"loading text encoders and VAE from {request.base}")
    pipeline = load_pipeline(request.base, transformer, request.dtype)
    check_fit(pipeline, transformer.config)
    for number, lora in enumerate(request.loras):
        status(f"loading {lora.file.name}")
        _load_lora(pipeline, lora, f"lora{number}")
    if request.loras:
        pipeline.set_adapters([f"lora{i}" for i in range(len(request.loras))], [lora.scale for lora in request.loras])
    offload = place(pipeline, request.offload, facts.overhead_bytes)
    loaded = time.perf_counter()
    settings = call_settings(request, facts)
    status(f"drawing, offload {offload}")
    image = _draw(pipeline, request, settings, step)
    parameters = _parameters(request, settings, facts)
    return Made(image, parameters, report, offload, loaded - started, time.perf_counter() - loaded)


def check_request(request: Request) -> FileFacts:
    """Check files and folders before anything large is read; return the facts about the GGUF file."""
    if not request.gguf.is_file():
        raise FileNotFoundError(f"{request.gguf} is no file. --gguf is a FLUX.1 transformer in a GGUF file.")
    for lora in request.loras:
        if not lora.file.is_file():
            raise FileNotFoundError(f"{lora.file} is no file. --lora is a .safetensors file, or FILE:SCALE.")
    if request.offload not in OFFLOADS:
        raise BackendUnavailable(f"Unknown offload {request.offload!r}. Known: {', '.join(OFFLOADS)}.")
    check_base(request.base)
    facts = inspect_file(request.gguf)
    if facts.refused:
        raise GGUFError(f"{request.gguf}: {facts.refused}")
    return facts


def call_settings(request: Request, facts: FileFacts) -> dict[str, Any]:
    """Return the pipeline's arguments: the model's defaults, and over them what the request says."""
    if _embedded(request):
        settings = dict(PIPELINE_KWARGS)
    else:
        settings = dict(_DEV if facts.config["guidance_embeds"] else _SCHNELL)
    asked = {
        "height": request.height,
        "width": request.width,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance,
    }
    settings.update({name: value for name, value in asked.items() if value is not None})
    if request.negative is not None:
        settings.update(negative_prompt=request.negative, true_cfg_scale=request.true_cfg)
    return settings


def _embedded(request: Request) -> bool:
    return request.base.resolve() == embedded_model_path().resolve()


def place(pipeline: Any, offload: str, overhead: int) -> str:
    """Put the pipeline where it runs; return the offload that was chosen.

    Args:
        pipeline: a diffusers pipeline on the CPU.
        offload: a key of OFFLOADS.
        overhead: bytes a GPU needs beside the weights, for "auto".
    """
    if not torch.cuda.is_available():
        if offload in ("model", "sequential"):
            raise BackendUnavailable(f"--offload {offload} moves weights to a GPU, and torch sees none. Use --offload none.")
        return "none"
    if offload == "auto":
        sizes = [memory_footprint(part)["total"] for part in pipeline.components.values() if isinstance(part, nn.Module)]
        offload = choose_offload(sizes, overhead, free=torch.cuda.mem_get_info()[0])
    if offload == "none":
        pipeline.to("cuda")
    elif offload == "model":
        pipeline.enable_model_cpu_offload()
    else:
        pipeline.enable_sequential_cpu_offload()
    return offload


def choose_offload(sizes: Sequence[int], overhead: int, free: int) -> str:
    """Choose the fastest offload that fits: all parts at once, the largest part alone, or layer by layer (all bytes)."""
    if sum(sizes) + overhead <= free:
        return "none"
    return "model" if max(sizes) + overhead <= free else "sequential"


def _load_lora(pipeline: Any, lora: Lora, name: str) -> None:
    where = {"weight_name": lora.file.name, "adapter_name": name, "local_files_only": True}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several LoRAs at once are meant
            pipeline.load_lora_weights(str(lora.file.parent), **where)
    except (ValueError, KeyError, RuntimeError, OSError) as error:  # what diffusers, peft and safetensors raise on wrong files
        raise FormatError(f"{lora.file} does not load as a LoRA of this FLUX.1 model: {error}") from error


def _draw(pipeline: Any, request: Request, settings: dict[str, Any], step: Callable[[int, int], None]) -> Image:
    def after_step(_pipeline, index, _timestep, tensors):
        step(index + 1, settings["num_inference_steps"])
        return tensors

    generator = torch.Generator("cpu").manual_seed(request.seed)  # the same noise with and without a GPU
    with torch.inference_mode(), one_thread() if _embedded(request) else nullcontext():
        return pipeline(request.prompt, generator=generator, callback_on_step_end=after_step, **settings).images[0]


def _parameters(request: Request, settings: dict[str, Any], facts: FileFacts) -> dict[str, Any]:
    return {
        "prompt": request.prompt,
        **settings,
        "seed": request.seed,
        "gguf": request.gguf.name,
        "bits_per_weight": round(facts.block_bits_per_weight, 3),
        "loras": [(lora.file.name, lora.scale) for lora in request.loras],
        "backend": request.backend,
        "compute": request.compute,
        "dtype": str(request.dtype).removeprefix("torch."),
    }


def save_png(made: Made, path: Path) -> None:
    """Write the image as a PNG whose "flux_kernels" text holds the parameters as JSON."""
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_itxt("flux_kernels", json.dumps(made.parameters, ensure_ascii=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    made.image.save(path, "PNG", pnginfo=text)
