"""A FLUX.1 file that was opened, understood and checked: where every parameter of the model lies in it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import GGUFError
from ..formats import Packed, PlainType
from ..gguf.check import check_weight_type, tensor_problems
from ..gguf.file import GGUFFile, GGUFTensor, read_gguf
from ..torch_backend.reference import dequantize
from .config import infer_config
from .low_rank_tensors import check_corrections, correction_names, is_correction
from .names import Source, sources, stored_shapes
from .variant import canonical_names, naming_of

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

ORIGINAL_SHAPE_KEY = "comfy.gguf.orig_shape."


@dataclass(frozen=True)
class StoredFlux:
    """Hold what is known about a FLUX.1 file before any weight is read.

    Attributes:
        file: the memory-mapped file.
        naming: "bfl" or "diffusers".
        config: the arguments of FluxTransformer2DModel.
        names: tensor name without prefix -> name in the file.
        shapes: tensor name without prefix -> shape in torch order.
        sources: parameter name -> where it lies.
        corrections: tensor name of a weight -> names of down and up of its low-rank correction in the file.
    """

    file: GGUFFile
    naming: str
    config: dict[str, Any]
    names: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    sources: dict[str, Source]
    corrections: dict[str, tuple[str, str]]

    @property
    def types(self) -> dict[str, str]:
        """Tensor name without prefix -> ggml type name."""
        return {bare: self.file.tensors[name].format for bare, name in self.names.items()}

    def format(self, parameter: str) -> str:
        """Return the ggml type name of a parameter."""
        return self.file.tensors[self.names[self.sources[parameter].tensor]].format

    def packed(self, parameter: str) -> Tensor:
        """Return a quantized matrix as it is stored, uint8 [N, row bytes]: mapped, unless its rows change order."""
        return _join(self._ranges(self.sources[parameter]))

    def packed_together(self, parameters: list[str]) -> Tensor | None:
        """Return quantized matrices, mapped, where the file stores them as consecutive rows of one tensor; otherwise None."""
        located = [self.sources[parameter] for parameter in parameters]
        ranges = [rows for source in located for rows in source.rows]
        consecutive = all(before[1] == after[0] for before, after in pairwise(ranges))
        if len({source.tensor for source in located}) > 1 or not consecutive:
            return None
        return _join(self._ranges(Source(located[0].tensor, ((ranges[0][0], ranges[-1][1]),))))

    def decoded(self, parameter: str, dtype: torch.dtype) -> Tensor:
        """Return a plain matrix or any vector in `dtype`; mapped where stored so, a quantized vector decoded in float32."""
        source = self.sources[parameter]
        tensor = self._tensor(source)
        if isinstance(tensor.block_format, PlainType):
            return _join(self._ranges(source)).to(dtype)
        whole = dequantize(Packed(tensor.data, tensor.block_format)).flatten()
        return _join([whole[start:stop] for start, stop in source.rows]).to(dtype, copy=True)

    def low_rank(self, parameter: str) -> tuple[Tensor, Tensor] | None:
        """Return down [r, K] and up [N, r] of a matrix's low-rank correction, in memory of their own, or None."""
        source = self.sources[parameter]
        if source.tensor not in self.corrections:
            return None
        down, up = (self.file.tensors[name] for name in self.corrections[source.tensor])
        return down.data.clone(), torch.cat([up.rows(start, stop) for start, stop in source.rows])

    def _tensor(self, source: Source) -> GGUFTensor:
        return self.file.tensors[self.names[source.tensor]]

    def _ranges(self, source: Source) -> list[Tensor]:
        """Return the row ranges of a source as they are stored, each with a storage of its own."""
        tensor, shape = self._tensor(source), self.shapes[source.tensor]
        if tensor.shape == shape:
            return [tensor.rows(start, stop) for start, stop in source.rows]
        reshaped = tensor.data.reshape(shape[0], -1) if len(shape) > 1 else tensor.data.flatten()
        return [reshaped[start:stop].clone() for start, stop in source.rows]


def _join(ranges: list[Tensor]) -> Tensor:
    return ranges[0] if len(ranges) == 1 else torch.cat(ranges)


def open_flux(path: str | os.PathLike, config: object | None = None) -> StoredFlux:
    """Open a GGUF file and check that it is a complete FLUX.1 transformer; no weight is read.

    Raises:
        GGUFError: for a damaged file, another model, and missing, superfluous or wrongly shaped tensors, which it names.
    """
    file = read_gguf(path)
    try:
        return understand(file, config)
    except GGUFError as error:
        raise GGUFError(f"{os.fspath(path)}: {error}") from None


def understand(file: GGUFFile, config: object | None = None) -> StoredFlux:
    """Locate every parameter of the model in an opened file, or raise GGUFError saying why it cannot be loaded."""
    names = canonical_names(file.tensors)
    shapes = {bare: torch_shape(file, bare, name) for bare, name in names.items()}
    extra = {bare: names.pop(bare) for bare in [*names] if is_correction(bare)}
    extra_shapes = {bare: shapes.pop(bare) for bare in extra}
    architecture = file.metadata.get("general.architecture")
    naming = naming_of(shapes, architecture if isinstance(architecture, str) else None)
    inferred = infer_config(shapes, naming, file.metadata, config)
    expected = parameter_shapes(empty_model(inferred))
    located = sources(expected, naming)
    _check_tensors(shapes, stored_shapes(located, expected), inferred)
    for bare, name in names.items():
        check_weight_type(bare, file.tensors[name].format)
    check_corrections(extra_shapes, shapes, {bare: file.tensors[name].format for bare, name in (names | extra).items()})
    halves = {weight: correction_names(weight) for weight in names}
    corrections = {weight: (extra[down], extra[up]) for weight, (down, up) in halves.items() if down in extra}
    return StoredFlux(file, naming, inferred, names, shapes, located, corrections)


def empty_model(config: Mapping[str, Any]) -> FluxTransformer2DModel:
    """Build a FluxTransformer2DModel on the meta device."""
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    with torch.device("meta"):
        return FluxTransformer2DModel(**config)


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return parameter name -> shape."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def torch_shape(file: GGUFFile, bare: str, name: str) -> tuple[int, ...]:
    """Return the shape of a tensor, as written by converters that reshape tensors or as in the header."""
    shape = tuple(file.tensors[name].shape)
    for key in (ORIGINAL_SHAPE_KEY + name, ORIGINAL_SHAPE_KEY + bare):
        if key in file.metadata:
            return _original_shape(key, file.metadata[key], file.tensors[name])
    return shape


def _original_shape(key: str, sizes: Any, tensor: GGUFTensor) -> tuple[int, ...]:
    """Return the shape that a key-value gives a tensor; raise GGUFError where its bytes cannot have that shape."""
    row = tensor.block_format
    integers = isinstance(sizes, list) and all(isinstance(size, int) for size in sizes)
    if not integers or prod(sizes) != prod(tensor.shape) or not sizes or sizes[-1] % row.block_size:
        raise GGUFError(
            f"{key} says {sizes}, but the tensor is {row.name} of shape {list(tensor.shape)}: both must hold as many "
            f"weights, in rows of a multiple of {row.block_size}."
        )
    return tuple(sizes)


def _check_tensors(
    got: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> None:
    """Raise one GGUFError that names what is missing, superfluous or wrongly shaped."""
    problems = tensor_problems(got, expected)
    if problems:
        raise GGUFError(
            f"{problems}. A FLUX.1 file with {config['num_layers']} double and "
            f"{config['num_single_layers']} single blocks holds exactly {len(expected)} tensors; this one is incomplete, or "
            "its config must be passed as config=..."
        )
