"""Check what `generate` is asked for before anything large is read, and say how to call the pipeline."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backends import check_names
from ..errors import FormatError, GGUFError
from ..gguf.conventions import file_title
from ..models.architecture import Architecture, Variant
from ..models.architectures import ARCHITECTURES
from ..text_encoders.encoders.t5 import T5
from ..text_encoders.stored import open_stored
from .base_pipeline import base_sizes, check_base, check_classes, check_fit, says_distilled
from .embedded import PIPELINE_KWARGS
from .file_model import model_of, settings_note
from .inspect_file import TRANSFORMER, FileFacts, inspect_file
from .placement import check_offload
from .request import LEAST_SIDE, MOST_SEED, TRUE_CFG, Request
from .tasks import KONTEXT, TEXT, Task, fitted_size, read_pictures, task_of
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

    def usual(self, base: Path) -> Variant:
        """The settings of the file's model, whose pipeline's folder is `base`."""
        return model_of(self.architecture, self.facts.config, _title(self.facts), base)


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
    model_of(architecture, facts.config, _title(facts), request.base)
    task = task_of(architecture, kind, facts.config, request, _title(facts))
    _check_guidance(request, kind, facts)
    check_classes(request.base)
    check_fit(base_sizes(request.base, kind, _t5_width(request.t5)), facts.config)
    return Job(facts, task, read_pictures(task, request), kind)


def _check_options(request: Request) -> None:
    """Raise where a value is of another type or out of range, and where a LoRA is not there."""
    for option, text in {"--prompt": request.prompt, "--negative": request.negative}.items():
        if not isinstance(text, str) and (option == "--prompt" or text is not None):
            raise FormatError(f"{option} is {text!r}; give a text.")
    _check_whole_numbers(request)
    numbers = {"--guidance": request.guidance, "--true-cfg": request.true_cfg}
    numbers |= {f"--lora {lora.file.name}": lora.scale for lora in request.loras}
    for option, number in numbers.items():
        if number is not None and not (isinstance(number, (int, float)) and math.isfinite(number)):
            raise FormatError(f"{option} is {number!r}; give a finite number.")
        if number is not None and number < 0 and not option.startswith("--lora"):
            raise FormatError(f"{option} is {number:g}; give 0 or more.")
    for lora in request.loras:
        if not lora.file.is_file():
            name, _, scale = str(lora.file).rpartition(":")
            if name and Path(name).is_file():
                raise FormatError(
                    f"--lora {lora.file}: {scale!r} is no scale. Write FILE:SCALE with a number, such as {name}:0.8."
                )
            raise FileNotFoundError(f"{lora.file} is no file. --lora is a .safetensors file, or FILE:SCALE.")


def _check_whole_numbers(request: Request) -> None:
    sides = {"--width": request.width, "--height": request.height}
    least = {"--seed": (request.seed, 0), "--steps": (request.steps, 1), **{side: (sides[side], LEAST_SIDE) for side in sides}}
    for option, (number, lowest) in least.items():
        if number is None and option != "--seed":
            continue
        if type(number) is not int or number < lowest:
            raise FormatError(f"{option} is {number!r}; give a whole number of at least {lowest}.")
    if request.seed > MOST_SEED:
        raise FormatError(f"--seed is {request.seed}; give a whole number of at most {MOST_SEED}.")


def _check_can_draw(request: Request, facts: FileFacts, architecture: Architecture) -> None:
    """Raise GGUFError where nothing draws from text with a file, or its own parts are not named."""
    try:
        check_draws(architecture, facts.config, _title(facts))
    except GGUFError as error:
        raise GGUFError(f"{request.gguf}: {error}") from None
    kinds = drawing_classes(architecture)
    if request.embedded and TEXT.pipeline not in kinds:
        raise GGUFError(
            f"{request.gguf} is a {facts.variant}, and without --base the embedded model's text encoders and VAE are taken, which "
            f"do not fit it. Give --base, the folder of a {' or '.join(kinds)}."
        )


def _check_guidance(request: Request, kind: str, facts: FileFacts) -> None:
    """Raise FormatError where --guidance, --negative or --true-cfg would be ignored."""
    asks = TEXT_PIPELINES[kind]
    if asks.told is not None and not facts.config[asks.told] and request.guidance:
        raise FormatError(
            f"--guidance {request.guidance:g} would be ignored: {facts.variant} is not told the guidance. Leave it out; --negative "
            "with --true-cfg guides it."
        )
    if asks.negative in (None, asks.guidance):
        if request.true_cfg is not None:
            raise FormatError(f"--true-cfg is not taken by a {kind}, whose guidance is what --guidance says. Leave it out.")
    elif request.true_cfg is not None and request.negative is None:
        raise FormatError(
            "--true-cfg is the strength of the negative prompt, and none is given. Give --negative too, or leave --true-cfg out."
        )
    elif request.true_cfg is not None and request.true_cfg <= asks.counts_above:
        raise FormatError(
            f"--negative counts with a --true-cfg above {asks.counts_above:g}, and it is {request.true_cfg:g}. Give a larger "
            f"--true-cfg, such as {TRUE_CFG:g}, or leave --negative out."
        )


def _title(facts: FileFacts) -> str:
    return file_title(facts.path, facts.metadata)


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
    return open_stored(path, (T5,)).config["d_model"]


def call_settings(request: Request, job: Job) -> dict[str, Any]:
    """Return the pipeline's arguments: the model's defaults, and over them what the request says."""
    architecture, asks = job.architecture, job.asks
    usual = job.usual(request.base)
    settings = dict(PIPELINE_KWARGS) if request.embedded else {**text_arguments(job.kind, usual), **job.task.defaults}
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
    if asks.deaf and request.guidance is not None and request.guidance > asks.counts_above and says_distilled(request.base):
        raise FormatError(
            f"--guidance {request.guidance:g} would be ignored: {request.base} says that its model is distilled. Leave it out."
        )
    patch = usual.patch or architecture.patch
    for side in ("width", "height"):
        if settings[side] < patch:
            raise FormatError(f"--{side} is {settings[side]}; a picture has at least {patch} pixels a side.")
        settings[side] -= settings[side] % patch
    return _with_negative(request, asks, settings)


def notes_of(request: Request, job: Job) -> tuple[str, ...]:
    """Return what the user shall know of the settings, which were not all given."""
    if request.embedded or (request.steps is not None and request.guidance is not None):
        return ()
    note = settings_note(job.architecture, job.facts.config, _title(job.facts), request.base)
    return () if note is None else (note,)


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
