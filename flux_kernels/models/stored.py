"""A FLUX.1 file, opened and checked: where every parameter of the model lies in it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import GGUFError
from ..formats import Packed, PlainType
from ..gguf.check import check_weight_type, tensor_problems
from ..gguf.conventions import ORIGINAL_SHAPE_KEY, architecture_of
from ..gguf.file import GGUFFile, GGUFTensor, read_gguf
from ..torch_backend.reference import dequantize
from .config import infer_config
from .low_rank_tensors import check_corrections, correction_names, is_correction
from .names import Source, sources, stored_shapes
from .variant import canonical_names, naming_of

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel


class StoredLayer(NamedTuple):
    """Hold what a file stores of a linear layer whose matrix is quantized.

    Attributes:
        weight: the rows as they are stored: mapped, unless they change order.
        bias: [N] in the dtype asked for.
        low_rank: down [r, K] and up [N, r] of the matrix's correction, in memory of their own, or None.
    """

    weight: Packed
    bias: Tensor
    low_rank: tuple[Tensor, Tensor] | None


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

    def packed_layer(self, name: str, dtype: torch.dtype) -> StoredLayer | None:
        """Return what the file stores of the linear layer `name`, or None where its matrix is plain.

        The bias has `dtype`.
        """
        source = self.sources[f"{name}.weight"]
        fmt = self._tensor(source).block_format
        if isinstance(fmt, PlainType):
            return None
        weight = Packed(_join(self._ranges(source)), fmt)
        return StoredLayer(weight, self.decoded(f"{name}.bias", dtype), self._low_rank(source))

    def rows_together(self, layers: list[str]) -> Tensor | None:
        """Return the packed rows of layers that lie one after the other in one tensor, mapped, or None."""
        located = [self.sources[f"{layer}.weight"] for layer in layers]
        ranges = [rows for source in located for rows in source.rows]
        consecutive = all(before[1] == after[0] for before, after in pairwise(ranges))
        if len({source.tensor for source in located}) > 1 or not consecutive:
            return None
        return _join(self._ranges(Source(located[0].tensor, ((ranges[0][0], ranges[-1][1]),))))

    def decoded(self, parameter: str, dtype: torch.dtype) -> Tensor:
        """Return a plain matrix or any vector in `dtype`.

        It is mapped where it is stored in that type; a quantized vector is decoded in float32.
        """
        source = self.sources[parameter]
        tensor = self._tensor(source)
        if isinstance(tensor.block_format, PlainType):
            return _join(self._ranges(source)).to(dtype)
        whole = dequantize(Packed(tensor.data, tensor.block_format)).flatten()
        return _join([whole[start:stop] for start, stop in source.rows]).to(dtype, copy=True)

    def _low_rank(self, source: Source) -> tuple[Tensor, Tensor] | None:
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
    """Locate every parameter of the model in an opened file.

    Raises:
        GGUFError: where it cannot be loaded, with the reason.
    """
    names = canonical_names(file.tensors)
    shapes = {bare: torch_shape(file, bare, name) for bare, name in names.items()}
    extra = {bare: names.pop(bare) for bare in [*names] if is_correction(bare)}
    extra_shapes = {bare: shapes.pop(bare) for bare in extra}
    naming = naming_of(shapes, architecture_of(file.metadata))
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
    """Return the shape that a key-value gives a tensor.

    Raises:
        GGUFError: where its bytes cannot have that shape.
    """
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
