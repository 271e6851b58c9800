"""What `generate` can do with a file, as data: one row for each use of a transformer.

Every architecture draws from text. With FLUX.1 pictures can go in, too: Fill, Canny and Depth, Kontext, image to image; a file's
input channels decide. dev and Kontext have the same tensors, and only the user (or the file's name) can tell them apart.
Everything is checked before anything large is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import GGUFError
from ..models.architecture import Architecture
from ..models.architectures.flux1 import FLUX1
from ..models.calls import PIXELS_A_TOKEN
from .request import Request
from .text_pipelines import TEXT_PIPELINES

if TYPE_CHECKING:
    from PIL.Image import Image

# Input channels in multiples of the latent ones: Canny and Depth stack a second picture, Fill a second picture and a mask.
_CONTROL, _FILL = 2, 6
IMAGE_OPTIONS = {"image": "--image", "mask": "--mask", "control_image": "--control-image"}


@dataclass(frozen=True, eq=False)
class Task:
    """Describe one use of a transformer.

    Attributes:
        name: shown to the user.
        pipeline: diffusers' class.
        says: what it does, in half a sentence.
        inputs: option (attribute of a request) -> argument of the pipeline; all of them are needed.
        defaults: arguments of the pipeline that differ from those of text to image (diffusers' documentation of the models).
        takes: options that only some tasks have: "negative", "strength".
        reference_tokens: of the pictures that the transformer sees besides the result.
    """

    name: str
    pipeline: str
    says: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    takes: tuple[str, ...] = ()
    reference_tokens: int = 0


_TEXT = "text to image"
_TEXT_TO_IMAGE = (_TEXT, "FluxPipeline")
TEXT = Task(*_TEXT_TO_IMAGE, "This file draws from text, or redraws --image with --strength", takes=("negative",))
SCHNELL = Task(*_TEXT_TO_IMAGE, "This is a schnell file, which draws from text alone", takes=("negative",))
FILL = Task(
    "fill",
    "FluxFillPipeline",
    "This is a Fill file: it repaints the white part of --mask in --image",
    {"image": "image", "mask": "mask_image"},
    {"guidance_scale": 30.0, "num_inference_steps": 50},
)
_CONTROL_TASK = (
    "control",
    "FluxControlPipeline",
    "This is a Canny or Depth file: it draws along --control-image (edges or a depth map)",
    {"control_image": "control_image"},
)
CANNY = Task(*_CONTROL_TASK, {"guidance_scale": 30.0})
DEPTH = Task(*_CONTROL_TASK, {"guidance_scale": 10.0})
KONTEXT = Task(
    "edit",
    "FluxKontextPipeline",
    "A Kontext file edits --image by the prompt",
    {"image": "image"},
    {"guidance_scale": 2.5},
    ("negative",),
    # Of 1328 x 800 pixels, the largest of the sizes that diffusers brings the picture to.
    reference_tokens=4150,
)
IMAGE = Task(
    "image to image",
    "FluxImg2ImgPipeline",
    "--strength redraws --image with a dev file",
    {"image": "image"},
    takes=("negative", "strength"),
)


def task_of(architecture: Architecture, kind: str, config: Mapping[str, Any], request: Request, title: str) -> Task:
    """Choose what to do with a transformer of any architecture.

    Args:
        architecture: of the transformer.
        kind: the pipeline class that draws from text with it.
        config: its config.
        request: as in `choose_task`.
        title: as in `choose_task`.

    Raises:
        GGUFError: where file and options do not go together; the sentence says what the file needs.
    """
    if architecture is FLUX1:
        return choose_task(config, request, title)
    negative = TEXT_PIPELINES[kind].negative is not None
    task = Task(_TEXT, kind, f"This is a file of {architecture.name}, which draws from text", takes=("negative",) * negative)
    given = [option for name, option in IMAGE_OPTIONS.items() if getattr(request, name) is not None]
    given += ["--strength"] * (request.strength is not None) + ["--kontext"] * request.kontext
    if given:
        raise GGUFError(_mismatch(task, [], given, of=f" of {FLUX1.name}"))
    if request.negative is not None and not negative:
        raise GGUFError(f"{task.says}; --negative is not taken. {kind} has no negative prompt.")
    return task


def choose_task(config: Mapping[str, Any], request: Request, title: str) -> Task:
    """Choose what to do with a FLUX.1 transformer and the request's pictures.

    Args:
        config: the transformer's config.
        request: with `image`, `mask`, `control_image` (paths or None), `kontext`, `strength` and `negative`.
        title: file name and name in the file, which may say "kontext" or "depth".

    Raises:
        GGUFError: where file and options do not go together; the sentence says what the file needs.
    """
    task = _by_channels(config, request, title.lower())
    given = [name for name in IMAGE_OPTIONS if getattr(request, name) is not None]
    missing = [IMAGE_OPTIONS[name] for name in task.inputs if name not in given]
    superfluous = [IMAGE_OPTIONS[name] for name in given if name not in task.inputs]
    if request.strength is not None and task is TEXT:
        raise GGUFError(
            "--strength is how much of --image is drawn anew: give a picture with --image, or leave --strength out."
        )
    if request.strength is not None and "strength" not in task.takes:
        superfluous.append("--strength")
    if request.negative is not None and "negative" not in task.takes:
        superfluous.append("--negative")
    if request.kontext and task is not KONTEXT:
        superfluous.append("--kontext")
    if missing or superfluous:
        raise GGUFError(_mismatch(task, missing, superfluous))
    return task


def _by_channels(config: Mapping[str, Any], request: Request, title: str) -> Task:
    channels = config["in_channels"]
    latent = config.get("out_channels") or channels
    stacked = channels / latent
    if stacked == _FILL:
        return FILL
    if stacked == _CONTROL:
        return DEPTH if "depth" in title and "canny" not in title else CANNY
    if stacked != 1:
        raise GGUFError(
            f"The file takes {channels} input channels for {latent} of the result, as Flex.2 does; `generate` has pipelines "
            f"for {latent} (dev, schnell, Kontext), {_CONTROL * latent} (Canny, Depth) and {_FILL * latent} (Fill)."
        )
    if not config["guidance_embeds"]:
        return SCHNELL
    if request.image is None or request.mask is not None:
        return KONTEXT if request.kontext else TEXT
    if request.kontext or ("kontext" in title and request.strength is None):
        return KONTEXT
    if request.strength is not None:
        return IMAGE
    raise GGUFError(
        "FLUX.1-dev and FLUX.1-Kontext files have the same tensors, and this one's name does not tell which it is. Add "
        "--kontext for a Kontext file, which edits the --image by the prompt, or --strength 0.6 to redraw the --image with a "
        "dev file."
    )


def _mismatch(task: Task, missing: list[str], superfluous: list[str], of: str = "") -> str:
    problems = [
        f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} {word}"
        for names, word in ((missing, "missing"), (superfluous, "not taken"))
        if names
    ]
    homes = ", ".join(f"{name} is for {_HOMES[name]}{of}" for name in superfluous)
    return f"{task.says}; {', '.join(problems)}.{f' {homes}.' if homes else ''}"


_HOMES = {
    "--image": "Fill, Kontext and dev files",
    "--mask": "Fill files",
    "--control-image": "Canny and Depth files",
    "--strength": "dev files",
    "--negative": "dev, schnell and Kontext files",
    "--kontext": "Kontext files",
}


def read_pictures(task: Task, request: Request) -> dict[str, Image]:
    """Read the request's pictures: argument of the pipeline -> RGB picture, or grey for the mask.

    Raises:
        FileNotFoundError: for a path that is no file.
        GGUFError: for a file that is no picture, and a mask of another size than its picture.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    pictures = {}
    for name, argument in task.inputs.items():
        path = Path(getattr(request, name))
        if not path.is_file():
            raise FileNotFoundError(f"{path} is no file. {IMAGE_OPTIONS[name]} is a picture, such as PNG or JPEG.")
        try:
            with Image.open(path) as opened:
                pictures[argument] = ImageOps.exif_transpose(opened).convert("L" if name == "mask" else "RGB")
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise GGUFError(
                f"{path} is no picture that can be read ({error}). {IMAGE_OPTIONS[name]} takes PNG or JPEG."
            ) from error
    sizes = {picture.size for picture in pictures.values()}
    if len(sizes) > 1:
        listed = ", ".join(f"{argument} is {picture.width} x {picture.height}" for argument, picture in pictures.items())
        raise GGUFError(f"The mask must have the size of its picture: {listed} pixels.")
    return pictures


def fitted_size(
    picture: Image, area: int, *, enlarge: bool, width: int | None = None, height: int | None = None
) -> tuple[int, int]:
    """Return (width, height) in the proportions of a picture, multiples of 16.

    Args:
        picture: what the result shall be as wide and high as.
        area: pixels the model draws by default; the result has about as many at most.
        enlarge: whether a smaller picture grows to `area` too.
        width: in pixels, where it is asked for; `height` follows unless it is asked for too.
        height: in pixels, where it is asked for.
    """
    factor = (area / (picture.width * picture.height)) ** 0.5
    factor = factor if enlarge else min(factor, 1.0)
    if width is not None or height is not None:
        factor = width / picture.width if width is not None else (height or 0) / picture.height
    fitted = (max(1, round(side * factor / PIXELS_A_TOKEN)) * PIXELS_A_TOKEN for side in picture.size)
    return tuple(asked or side for asked, side in zip((width, height), fitted, strict=True))  # type: ignore[return-value]
