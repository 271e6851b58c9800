"""Draw with a GGUF transformer in a local diffusers pipeline, with LoRAs and offloading."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..compute import dtype_name
from ..errors import FormatError, GGUFError
from ..files import check_writable, written_whole
from ..models import load_transformer
from ..swap import swap_linear
from ..swap.report import SwapReport
from ..text_encoders import load_t5
from .base_pipeline import load_pipeline, one_thread, tokenizer_of
from .job import Job, call_settings, check_request, notes_of
from .memory_check import check_pipeline_memory
from .memory_plan import MemoryPlan
from .picture_size import check_gpu_memory, check_memory, check_positions
from .placement import measured_parts, place
from .request import Lora, Request
from .tasks import IMAGE_OPTIONS

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Drawing:
    """Hold an image and how it was drawn.

    Attributes:
        image: the result.
        parameters: to write into its file.
        report: the layers that were swapped.
        plan: the offload.
        task: its name.
        load_seconds: until the pipeline was ready.
        draw_seconds: from then on.
        notes: sentences about settings that were taken without being sure of them.
    """

    image: Image
    parameters: dict[str, Any]
    report: SwapReport
    plan: MemoryPlan
    task: str
    load_seconds: float
    draw_seconds: float
    notes: tuple[str, ...] = ()


def generate(
    request: Request,
    *,
    status: Callable[[str], None] = lambda text: None,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> Drawing:
    """Draw one image.

    Args:
        request: what to draw.
        status: called with a line whenever a new stage begins.
        step: called with (steps done, steps in all) after each denoising step.

    Raises:
        FileNotFoundError: for files and folders that are missing or incomplete.
        GGUFError: for a file that is no transformer or T5 encoder, does not fit the base, or not the pictures given.
        FormatError: for a LoRA that does not fit, and a picture that is too large.
        BackendUnavailable: where backend, compute mode or offload cannot run here.
    """
    job = check_request(request)
    settings, asks = call_settings(request, job), job.asks
    width, height = settings["width"], settings["height"]
    check_positions(width, height, request.dtype, job.architecture, job.facts.config, rounded=asks.rounded_positions)
    check_pipeline_memory(request.gguf, request.base, request.t5, request.dtype, request.pin, t5_part=asks.t5)
    notes = notes_of(request, job)
    for note in notes:
        status(note)
    started = time.perf_counter()
    pipeline, report = _load(request, job, status)
    text_tokens = settings["max_sequence_length"] + asks.other_tokens
    parts = measured_parts(pipeline, width, height, job.task.reference_tokens, text_tokens, asks.batch(settings))
    if torch.cuda.is_available():
        check_gpu_memory(parts, torch.cuda.mem_get_info()[1], width, height)
    else:
        check_memory(parts, width, height)
    plan = place(pipeline, request.offload, parts, width, height, pin=request.pin)
    loaded = time.perf_counter()
    status(f"drawing, offload {plan.offload}")
    image = _draw(pipeline, request, {**settings, **job.pictures}, step)
    parameters = _parameters(request, settings, job)
    return Drawing(image, parameters, report, plan, job.task.name, loaded - started, time.perf_counter() - loaded, notes)


def _load(request: Request, job: Job, status: Callable[[str], None]) -> tuple[Any, SwapReport]:
    """Load the pipeline on the CPU, with its LoRAs."""
    status(f"loading {request.gguf.name}: {job.facts.variant}")
    # The other modes scale each activation: once for q, k and v.
    fuse = None if request.compute == "exact" else "qkv"
    transformer = load_transformer(request.gguf, dtype=request.dtype, fuse=fuse)
    # The swap arranges packed rows as a GPU wants them, before offloading moves them behind the layers' backs, and its report
    # says what runs: so it comes second, and backend and compute mode are given to it alone.
    report = swap_linear(transformer, backend=request.backend, compute=request.compute)
    t5 = None
    if request.t5 is not None:
        status(f"loading {request.t5.name}")
        t5 = load_t5(request.t5, dtype=request.dtype, backend=request.backend)
        swap_linear(t5, backend=request.backend)
    status(f"loading text encoders and VAE from {request.base}")
    part = job.asks.t5
    encoders = {} if part is None else {part: t5}
    pipeline = load_pipeline(request.base, transformer, request.dtype, kind=job.task.pipeline, **encoders)
    if t5 is not None and part is not None:
        name = tokenizer_of(part)
        known = len(getattr(pipeline, name))
        if known > t5.config.vocab_size:
            raise GGUFError(
                f"{request.t5} has a table of {t5.config.vocab_size} tokens, the {name} of {request.base} has {known}. Take the T5 "
                "encoder of that model."
            )
    for number, lora in enumerate(request.loras):
        status(f"loading {lora.file.name}")
        _load_lora(pipeline, lora, f"lora{number}", job.architecture.name)
    if request.loras:
        pipeline.set_adapters([f"lora{i}" for i in range(len(request.loras))], [lora.scale for lora in request.loras])
    return pipeline, report


def _load_lora(pipeline: Any, lora: Lora, name: str, model: str) -> None:
    if lora.file.suffix == ".gguf":
        raise FormatError(f"{lora.file} is a GGUF file; diffusers reads LoRAs from safetensors. A whole model goes to --gguf.")
    where = {"weight_name": lora.file.name, "adapter_name": name, "local_files_only": True}
    try:
        with warnings.catch_warnings(), _without_repeats():
            # Several LoRAs at once are meant.
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            pipeline.load_lora_weights(str(lora.file.parent), **where)
    # What diffusers, peft and safetensors raise on wrong files.
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OSError) as error:
        raise FormatError(f"{lora.file} does not load as a LoRA of this {model} model: {error}") from error
    # Where no name in the file is one of the model's, diffusers says so in its log at most.
    if not any(name in adapters for adapters in pipeline.get_list_adapters().values()):
        raise FormatError(
            f"{lora.file} is no LoRA of this {model} model: nothing in it fits. Give a LoRA that was made for {model}."
        )


@contextmanager
def _without_repeats() -> Iterator[None]:
    """Keep out of the log what is raised as well."""

    def is_news(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR and not record.getMessage().startswith("No LoRA keys")

    logger = logging.getLogger("diffusers.loaders.peft")
    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)


def _draw(pipeline: Any, request: Request, arguments: dict[str, Any], step: Callable[[int, int], None]) -> Image:
    def after_step(running, index, _timestep, tensors):
        # Fewer than asked for where a strength skips the first.
        step(index + 1, running.num_timesteps)
        return tensors

    if "FluxKontext" in type(pipeline).__name__:
        # Its own sizes are about 1024 x 1024 pixels: what the user asks for counts, and the embedded model needs small ones
        arguments = {**arguments, "max_area": arguments["width"] * arguments["height"], "_auto_resize": not request.embedded}
    # On the CPU the noise is the same with and without a GPU.
    generator = torch.Generator("cpu").manual_seed(request.seed)
    with torch.inference_mode(), one_thread() if request.embedded else nullcontext():
        return pipeline(prompt=request.prompt, generator=generator, callback_on_step_end=after_step, **arguments).images[0]


def _parameters(request: Request, settings: dict[str, Any], job: Job) -> dict[str, Any]:
    return {
        "prompt": request.prompt,
        **settings,
        "seed": request.seed,
        "task": job.task.name,
        **{name: getattr(request, name).name for name in IMAGE_OPTIONS if getattr(request, name) is not None},
        "model": job.facts.variant,
        "gguf": request.gguf.name,
        **({} if request.t5 is None else {"t5": request.t5.name}),
        "bits_per_weight": round(job.facts.block_bits_per_weight, 3),
        "loras": [(lora.file.name, lora.scale) for lora in request.loras],
        "backend": request.backend,
        "compute": request.compute,
        "dtype": dtype_name(request.dtype),
    }


def save_png(drawing: Drawing, path: Path) -> None:
    """Write the image as a PNG whose "flux_kernels" text holds the parameters as JSON."""
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_itxt("flux_kernels", json.dumps(drawing.parameters, ensure_ascii=False))
    # Such as /dev/null.
    if path.exists() and not path.is_file():
        drawing.image.save(path, "PNG", pnginfo=text)
        return
    # A full disk leaves the picture of the last run as it was.
    with written_whole(path) as part:
        drawing.image.save(part, "PNG", pnginfo=text)


def check_out(path: Path, request: Request, force: bool = False) -> None:
    """Check that a picture can be written, before anything is loaded.

    Args:
        path: of the picture.
        request: what to draw.
        force: whether a file that exists is replaced.

    Raises:
        GGUFError: where `path` is a file that the request reads.
        FormatError: where it exists, is a folder, or in a folder that is not there or cannot be written to.
    """
    read = [getattr(request, name) for name in ("gguf", "t5", *IMAGE_OPTIONS)] + [lora.file for lora in request.loras]
    if path.exists() and any(file is not None and file.exists() and path.samefile(file) for file in read):
        raise GGUFError(f"{path} is read by this very command. Give --out another name.")
    # /dev/null is none of these.
    if path.is_file() or path.is_dir() or not path.exists():
        check_writable(path, "--out")
    if path.is_file() and not force:
        raise FormatError(f"--out {path} exists. Give --force to replace it, or another name.")
