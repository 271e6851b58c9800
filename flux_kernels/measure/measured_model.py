"""Open the 16-bit transformer that is to be measured, and the pipeline that its states are captured with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import FormatError, GGUFError
from ..files import file_sha256
from ..flux import load_flux
from ..flux.config import infer_config
from ..flux.names import Source, sources
from ..flux.stored import empty_model, open_flux, parameter_shapes
from ..flux.types import BLOCK, tensor_kind
from ..flux.variant import canonical_names, naming_of
from ..formats import PLAIN_TYPES
from ..generation.base_pipeline import check_base, load_pipeline
from ..generation.embedded import PIPELINE_KWARGS, embedded_model_path
from ..generation.tasks import default_settings
from ..gguf.check import tensor_problems

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

_WEIGHTS = "*.safetensors"
_TYPES = {plain.dtype: name for name, plain in PLAIN_TYPES.items() if plain.dtype.is_floating_point}


@dataclass(frozen=True)
class Source16:
    """Name what is measured.

    Attributes:
        files: that hold the transformer: one GGUF file, one safetensors file, or the shards of a diffusers folder.
        base: diffusers folder with the rest of the pipeline; only captured states need it.
        given: file or folder that was named, None for the embedded model.
    """

    files: tuple[Path, ...]
    base: Path | None
    given: Path | None = None

    @property
    def name(self) -> str:
        """A name for people: the file's, or the folder's."""
        return self.files[0].name if len(self.files) == 1 and not self.embedded else self.files[0].parent.parent.name

    @property
    def embedded(self) -> bool:
        """Whether it is the model inside this package."""
        return self.files[0].resolve().is_relative_to(embedded_model_path().resolve())

    def sha256(self) -> str:
        """Return the sha256 of the files' bytes."""
        return file_sha256(*self.files)


def find_source(gguf: Path | None = None, model: Path | None = None, base: Path | None = None) -> Source16:
    """Find the files of a 16-bit transformer; without arguments those of the embedded model.

    Args:
        gguf: a GGUF file of F16, BF16 or F32 matrices.
        model: a safetensors file (BFL or diffusers names), a diffusers pipeline folder or its transformer folder.
        base: diffusers folder with the rest of the pipeline; by default `model` where that is such a folder.

    Raises:
        FormatError: where both or neither of two exclusive arguments are given.
        FileNotFoundError: for files that are not there.
    """
    given = gguf or model
    if gguf is not None and model is not None:
        raise FormatError("Give --gguf or --model, not both: each is the whole transformer.")
    if gguf is None and model is None:
        if base is not None:
            raise FormatError("--base without a transformer: give it as --gguf FILE or --model FILE-OR-FOLDER.")
        model = embedded_model_path()
    if gguf is not None:
        files = (gguf,)
    elif model.is_dir():
        folder = model / "transformer" if (model / "transformer").is_dir() else model
        files = tuple(sorted(folder.glob(_WEIGHTS)))
        base = model if base is None and folder != model else base
    else:
        files = (model,)
    missing = [str(file) for file in files if not file.is_file()]
    if missing or not files:
        where = missing[0] if missing else f"{model}: no {_WEIGHTS}"
        raise FileNotFoundError(f"{where} was not found. --gguf is a 16-bit GGUF file; --model a safetensors file or folder.")
    return Source16(files, base, given)


def open_transformer(source: Source16, device: torch.device, dtype: torch.dtype) -> tuple[FluxTransformer2DModel, str]:
    """Load the transformer in `dtype`, in eval mode; return it and the ggml type of its block matrices in the file.

    Raises:
        FormatError: where the file's block matrices are quantized.
        GGUFError: where it is no FLUX.1 transformer.
    """
    if source.files[0].suffix == ".gguf":
        return _from_gguf(source.files[0], device, dtype)
    return _from_safetensors(source.files, device, dtype)


def _from_gguf(file: Path, device: torch.device, dtype: torch.dtype) -> tuple[FluxTransformer2DModel, str]:
    stored = open_flux(file)
    types = {kind for name, kind in stored.types.items() if tensor_kind(name, stored.shapes[name]) == BLOCK}
    packed = types - PLAIN_TYPES.keys()
    if packed:
        raise FormatError(
            f"{file} is quantized ({', '.join(sorted(packed))}). Costs are measured against the 16-bit model: give its F16 or BF16 file."
        )
    return load_flux(file, dtype=dtype, device=device), max(types, key=lambda kind: PLAIN_TYPES[kind].type_size)


def _from_safetensors(files: tuple[Path, ...], device: torch.device, dtype: torch.dtype) -> tuple[FluxTransformer2DModel, str]:
    """Fill an empty model parameter by parameter; a folder's config.json counts, otherwise tensors tell the config."""
    from safetensors import safe_open

    opened = [safe_open(file, framework="pt") for file in files]
    slices = {name: one.get_slice(name) for one in opened for name in one.keys()}  # noqa: SIM118 (it has no iterator)
    bare = canonical_names(slices)
    shapes = {name: tuple(slices[full].get_shape()) for name, full in bare.items()}
    try:
        naming = naming_of(shapes, None)
        folder = files[0].parent
        config = infer_config(shapes, naming, {}, folder if (folder / "config.json").is_file() else None)
        model = empty_model(config).eval()
        located = sources(parameter_shapes(model), naming)
        lacking = {source.tensor for source in located.values()} - shapes.keys()
        if lacking:
            raise GGUFError(f"it lacks {min(lacking)!r}. The file is incomplete.")
        parameters = {name: _rows(slices, bare, source) for name, source in located.items()}
        problems = tensor_problems({name: tuple(one.shape) for name, one in parameters.items()}, parameter_shapes(model))
        if problems:
            raise GGUFError(problems)
    except GGUFError as error:
        raise GGUFError(f"{files[0]}: {error}") from None
    held = {parameters[name].dtype for name in parameters if tensor_kind(located[name].tensor, parameters[name].shape) == BLOCK}
    foreign = held - _TYPES.keys()
    if foreign or not held:
        raise FormatError(
            f"{files[0]} holds {', '.join(map(str, foreign)) or 'no blocks'}; measure reads float16, bfloat16 and float32."
        )
    model.load_state_dict({name: one.to(device, dtype) for name, one in parameters.items()}, assign=True)
    return model, _TYPES[max(held, key=lambda kind: kind.itemsize)]


def _rows(slices: Mapping[str, Any], bare: Mapping[str, str], source: Source) -> Tensor:
    stored = slices[bare[source.tensor]]
    pieces = [stored[start:stop] for start, stop in source.rows]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def check_base_of(source: Source16) -> None:
    """Raise FormatError where no base folder was given, FileNotFoundError where it is incomplete."""
    if source.base is None:
        raise FormatError("States are captured by drawing: give the folder with text encoders and VAE as --base DIR.")
    check_base(source.base)


def open_pipeline(source: Source16, transformer: FluxTransformer2DModel) -> tuple[Any, dict[str, Any]]:
    """Load the rest of the pipeline around a transformer; return it and the arguments of its call.

    Raises:
        FormatError: where no base folder was given.
        FileNotFoundError: where it is incomplete.
    """
    check_base_of(source)
    parameter = next(transformer.parameters())
    pipeline = load_pipeline(source.base, transformer, parameter.dtype).to(parameter.device)
    settings = PIPELINE_KWARGS if source.embedded else default_settings(bool(transformer.config["guidance_embeds"]))
    return pipeline, dict(settings)
