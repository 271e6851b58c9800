"""Draw with a GGUF transformer in a local diffusers pipeline, with LoRAs and offloading."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..backends import check_names
from ..compute import dtype_name
from ..errors import FormatError, GGUFError
from ..files import check_writable, written_whole
from ..models import load_transformer
from ..models.architecture import Architecture
from ..models.architectures import ARCHITECTURES
from ..swap import swap_linear
from ..swap.report import SwapReport
from ..t5 import load_t5
from ..t5.load import open_t5
from .base_pipeline import (
    base_sizes,
    check_base,
    check_classes,
    check_fit,
    load_pipeline,
    one_thread,
    says_distilled,
    tokenizer_of,
)
from .embedded import PIPELINE_KWARGS
from .inspect_file import TRANSFORMER, FileFacts, inspect_file
from .memory_check import check_pipeline_memory
from .memory_plan import MemoryPlan
from .picture_size import check_memory, check_positions
from .placement import check_offload, measured_parts, place
from .request import TRUE_CFG, Lora, Request
from .tasks import IMAGE_OPTIONS, KONTEXT, TEXT, Task, fitted_size, read_pictures, task_of
from .text_pipelines import TEXT_PIPELINES, TextPipeline, check_draws, drawing_classes, text_arguments

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Job:
    """Hold a checked request: facts about the file, what to do with it, and the pictures.

    Attributes:
        facts: about the transformer's file.
        task: what to do with it.
        pictures: argument of the pipeline -> picture.
        kind: the class that draws from text with the folder's parts.
    """

    facts: FileFacts
    task: Task = TEXT
    pictures: dict[str, Image] = field(default_factory=dict)
    kind: str = TEXT.pipeline

    @property
    def architecture(self) -> Architecture:
        """The row of the transformer."""
        return next(row for row in ARCHITECTURES if row.name == self.facts.architecture)

    @property
    def asks(self) -> TextPipeline:
        """What the pipeline asks for."""
        return TEXT_PIPELINES[self.kind]


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
    """

    image: Image
    parameters: dict[str, Any]
    report: SwapReport
    plan: MemoryPlan
    task: str
    load_seconds: float
    draw_seconds: float


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
    started = time.perf_counter()
    pipeline, report = _load(request, job, status)
    text_tokens = settings["max_sequence_length"] + asks.other_tokens
    parts = measured_parts(pipeline, width, height, job.task.reference_tokens, text_tokens, asks.batch(settings))
    if not torch.cuda.is_available():
        check_memory(parts, width, height)
    plan = place(pipeline, request.offload, parts, width, height, pin=request.pin)
    loaded = time.perf_counter()
    status(f"drawing, offload {plan.offload}")
    image = _draw(pipeline, request, {**settings, **job.pictures}, step)
    parameters = _parameters(request, settings, job)
    return Drawing(image, parameters, report, plan, job.task.name, loaded - started, time.perf_counter() - loaded)


def check_request(request: Request) -> Job:
    """Check what goes together before anything large is read; return what is to be done."""
    if not request.gguf.is_file():
        raise FileNotFoundError(f"{request.gguf} is no file. --gguf is a transformer in a GGUF file.")
    _check_options(request)
    check_names(request.backend, request.compute)
    check_offload(request.offload, request.pin)
    facts = inspect_file(request.gguf)
    if facts.refused:
        raise GGUFError(f"{request.gguf}: {facts.refused}")
    if facts.role != TRANSFORMER:
        raise GGUFError(f"{request.gguf} is a {facts.variant}: give it as --t5, and a transformer as --gguf.")
    architecture = Job(facts).architecture
    _check_can_draw(request, facts, architecture)
    kind = check_base(request.base, architecture, given=_given(request, architecture))
    task = task_of(architecture, kind, facts.config, request, f"{request.gguf.name} {facts.metadata.get('general.name', '')}")
    if request.true_cfg is not None and TEXT_PIPELINES[kind].negative in (None, TEXT_PIPELINES[kind].guidance):
        raise FormatError(f"--true-cfg is not taken by a {kind}, whose guidance is what --guidance says. Leave it out.")
    check_classes(request.base)
    check_fit(base_sizes(request.base, kind, _t5_width(request.t5)), facts.config)
    return Job(facts, task, read_pictures(task, request), kind)


def _check_options(request: Request) -> None:
    """Raise where a number is none, and where a LoRA is not there."""
    numbers = {"--guidance": request.guidance, "--true-cfg": request.true_cfg}
    numbers |= {f"--lora {lora.file.name}": lora.scale for lora in request.loras}
    for option, number in numbers.items():
        if number is not None and not math.isfinite(number):
            raise FormatError(f"{option} is {number}; give a finite number.")
    for lora in request.loras:
        if not lora.file.is_file():
            name, _, scale = str(lora.file).rpartition(":")
            if name and Path(name).is_file():
                raise FormatError(
                    f"--lora {lora.file}: {scale!r} is no scale. Write FILE:SCALE with a number, such as {name}:0.8."
                )
            raise FileNotFoundError(f"{lora.file} is no file. --lora is a .safetensors file, or FILE:SCALE.")


def _check_can_draw(request: Request, facts: FileFacts, architecture: Architecture) -> None:
    """Raise GGUFError where nothing draws from text with a file, or its own parts are not named."""
    try:
        check_draws(architecture, facts.config)
    except GGUFError as error:
        raise GGUFError(f"{request.gguf}: {error}") from None
    kinds = drawing_classes(architecture)
    if request.embedded and TEXT.pipeline not in kinds:
        raise GGUFError(
            f"{request.gguf} is a {facts.variant}, and without --base the embedded model's text encoders and VAE are taken, which "
            f"do not fit it. Give --base, the folder of a {' or '.join(kinds)}."
        )


def _given(request: Request, architecture: Architecture) -> tuple[str, ...]:
    """Name the parts that come as files of their own."""
    if request.t5 is None:
        return ()
    kinds = drawing_classes(architecture)
    part = TEXT_PIPELINES[kinds[0]].t5
    if part is None:
        raise GGUFError(f"--t5 is not taken: a {' or '.join(kinds)} has no T5 encoder. Leave it out.")
    return (part,)


def _t5_width(path: Path | None) -> int | None:
    if path is None:
        return None
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file. --t5 is a T5 encoder in a GGUF file.")
    return open_t5(path).config["d_model"]


def call_settings(request: Request, job: Job) -> dict[str, Any]:
    """Return the pipeline's arguments: the model's defaults, and over them what the request says."""
    architecture, asks = job.architecture, job.asks
    usual = architecture.settings(job.facts.config)
    if request.embedded:
        settings = dict(PIPELINE_KWARGS)
    else:
        # Only where it matters is the folder asked.
        distilled = usual.undistilled is None or says_distilled(request.base)
        settings = {**text_arguments(job.kind, usual, distilled=distilled), **job.task.defaults}
    if job.pictures:
        area = settings["width"] * settings["height"]
        picture = next(iter(job.pictures.values()))
        size = fitted_size(picture, area, enlarge=job.task is KONTEXT, width=request.width, height=request.height)
        settings.update(width=size[0], height=size[1])
    asked = {
        "height": request.height,
        "width": request.width,
        "num_inference_steps": request.steps,
        asks.guidance: request.guidance,
        "strength": request.strength,
    }
    settings.update({name: value for name, value in asked.items() if value is not None})
    patch = usual.patch or architecture.patch
    for side in ("width", "height"):
        if settings[side] < patch:
            raise FormatError(f"--{side} is {settings[side]}; a picture has at least {patch} pixels a side.")
        settings[side] -= settings[side] % patch
    return _with_negative(request, asks, settings)


def _with_negative(request: Request, asks: TextPipeline, settings: dict[str, Any]) -> dict[str, Any]:
    """Add the negative prompt and its strength; leave out what would not count."""
    counts = asks.negative != asks.guidance or settings[asks.guidance] > asks.counts_above
    if request.negative is None:
        return settings if counts else {name: value for name, value in settings.items() if name != "negative_prompt"}
    if not counts:
        raise FormatError(
            f"--negative counts with a guidance above {asks.counts_above:g}, and it is {settings[asks.guidance]:g}. Give --guidance "
            "too, such as 4, or leave --negative out."
        )
    settings["negative_prompt"] = request.negative
    if asks.negative is not None and asks.negative != asks.guidance:
        settings[asks.negative] = TRUE_CFG if request.true_cfg is None else request.true_cfg
    return settings


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
        with warnings.catch_warnings():
            # Several LoRAs at once are meant.
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            pipeline.load_lora_weights(str(lora.file.parent), **where)
    # What diffusers, peft and safetensors raise on wrong files.
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise FormatError(f"{lora.file} does not load as a LoRA of this {model} model: {error}") from error


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
