"""Open the 16-bit transformer that is measured, and the pipeline that its states are captured with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import FormatError, GGUFError
from ..files import file_sha256
from ..formats import PLAIN_TYPES
from ..generation.base_pipeline import base_sizes, check_base, check_classes, check_fit, load_pipeline
from ..generation.embedded import PIPELINE_KWARGS, embedded_model_path
from ..generation.file_model import model_of
from ..generation.text_pipelines import check_draws, text_arguments
from ..gguf.conventions import architecture_of, file_title
from ..gguf.file import map_file
from ..models.architecture import Architecture, Variant
from ..models.model_class import parameter_shapes, unfilled_model
from ..models.names import sources
from ..models.recognise import expect
from ..models.types import BLOCK, tensor_kind
from ..source.source import SourceModel, understand
from ..source.source_files import SourceFiles, open_source

_TYPES = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Source16:
    """Name what is measured; only headers were read.

    Attributes:
        opened: the files that hold the transformer.
        base: diffusers folder with the rest of the pipeline; only captured states need it.
        given: file or folder that was named, None for the embedded model.
    """

    opened: SourceFiles
    base: Path | None
    given: Path | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files: one GGUF or safetensors file, or shards."""
        return tuple(map(Path, self.opened.paths))

    @cached_property
    def architecture(self) -> Architecture:
        """The row that the model belongs to; raises GGUFError where that is none."""
        with self._named_in_errors():
            return expect(self.opened.tensors, architecture_of(self.opened.metadata))

    @cached_property
    def model(self) -> SourceModel:
        """What the files hold; raises GGUFError where that is no whole transformer of a known architecture."""
        # Other models are refused here; `understand` takes them as they are.
        _ = self.architecture
        with self._named_in_errors():
            return understand(self.opened)

    @contextmanager
    def _named_in_errors(self) -> Iterator[None]:
        """Name the file in what is raised about its content."""
        try:
            yield
        except GGUFError as error:
            raise GGUFError(f"{self.files[0]}: {error}") from None

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of the model class; raises GGUFError as `model` does."""
        return self.model.config or {}

    @property
    def title(self) -> str:
        """What it calls itself."""
        return file_title(str(self.files[0]), self.opened.metadata)

    @property
    def usual(self) -> Variant:
        """The settings of the published model that it is; raises GGUFError where title and folder name two."""
        return model_of(self.architecture, self.config, self.title, self.base)

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
    """Open the files of a 16-bit transformer; without arguments those of the embedded model.

    Args:
        gguf: a GGUF file of F16, BF16 or F32 matrices.
        model: any source that `quantize` takes: a file, an index of shards, a transformer's or a pipeline's folder.
        base: diffusers folder with the rest of the pipeline; by default `model` where that is such a folder.

    Raises:
        FormatError: where both or neither of two exclusive arguments are given.
        GGUFError: where there is no model, or its files are damaged.
    """
    given = gguf or model
    if gguf is not None and model is not None:
        raise FormatError("Give --gguf or --model, not both: each is the whole transformer.")
    if given is None and base is not None:
        raise FormatError("--base without a transformer: give it as --gguf FILE or --model FILE-OR-FOLDER.")
    path = given or embedded_model_path()
    if base is None and (path / "transformer").is_dir():
        base = path
    return Source16(open_source(path), base, given)


def open_transformer(source: Source16, device: torch.device, dtype: torch.dtype) -> tuple[Any, str]:
    """Load the transformer in eval mode; return it and the ggml type of its block matrices in the file.

    On the CPU, weights that are stored in `dtype` stay mapped from their file.

    Raises:
        FormatError: where the file's weights are quantized.
        GGUFError: where it is no transformer of a known architecture.
    """
    tensors = source.model.tensors
    packed = {kind for tensor in tensors.values() for kind in tensor.types if kind not in _TYPES}
    if packed:
        raise FormatError(
            f"{source.files[0]} is quantized ({', '.join(sorted(packed))}). Costs are measured against the 16-bit model: give its "
            "F16 or BF16 file."
        )
    architecture = source.architecture
    model = unfilled_model(architecture, source.config).eval()
    maps = {path: map_file(path) for path in source.opened.paths}
    weights = {}
    shapes = parameter_shapes(model)
    for name, located in sources(architecture, shapes, architecture.main_naming).items():
        pieces = [tensors[located.tensor].mapped(start, stop, maps).to(device, dtype) for start, stop in located.rows]
        weights[name] = (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view(shapes[name])
    model.load_state_dict(weights, assign=True)
    matrices = [tensor for tensor in tensors.values() if tensor_kind(tensor.name, tensor.shape, architecture) == BLOCK]
    blocks = {kind for tensor in matrices for kind in tensor.types}
    return model, max(blocks, key=lambda kind: PLAIN_TYPES[kind].type_size)


def base_of(source: Source16) -> tuple[Path, str]:
    """Return the folder of the rest of the pipeline, and the class that draws with it.

    Raises:
        FormatError: where none was given.
        FileNotFoundError: where it is incomplete.
        GGUFError: where it does not fit the transformer, or nothing draws from text with that.
    """
    if source.base is None:
        raise FormatError("States are captured by drawing: give the folder with text encoders and VAE as --base DIR.")
    check_draws(source.architecture, source.config, source.title)
    kind = check_base(source.base, source.architecture)
    # Title and folder are of one model.
    _ = source.usual
    check_classes(source.base)
    check_fit(base_sizes(source.base, kind), source.config)
    return source.base, kind


def open_pipeline(source: Source16, transformer: nn.Module) -> tuple[Any, dict[str, Any]]:
    """Load the rest of the pipeline around a transformer; return it and the arguments of its call.

    Raises as `base_of` does.
    """
    parameter = next(transformer.parameters())
    base, kind = base_of(source)
    pipeline = load_pipeline(base, transformer, parameter.dtype, kind=kind).to(parameter.device)
    if source.embedded:
        return pipeline, dict(PIPELINE_KWARGS)
    return pipeline, text_arguments(kind, source.usual)
