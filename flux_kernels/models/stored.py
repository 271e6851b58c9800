"""A transformer's file, opened and checked: where every parameter of the model lies in it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from operator import mul
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import GGUFError
from ..formats import Packed, PlainType
from ..gguf.check import check_weight_type, tensor_problems
from ..gguf.conventions import ORIGINAL_SHAPE_KEY, architecture_of
from ..gguf.file import GGUFFile, GGUFTensor, read_gguf
from ..gguf.spec import MAX_WRITTEN_DIMS
from ..gguf.split import hint_of_part
from ..report.amounts import counted
from ..torch_backend.reference import dequantize
from .architecture import Architecture
from .architectures import ARCHITECTURES
from .config import infer_config
from .cut_short import lacking_blocks
from .low_rank_tensors import check_corrections, correction_names, is_correction
from .model_class import empty_model, parameter_shapes
from .names import Source, block_of, sources, stored_shapes
from .recognise import canonical_names, expect, naming_of, transformer_names
from .stored_shapes import Shapes


class StoredLayer(NamedTuple):
    """Hold what a file stores of a linear layer whose matrix is quantized.

    Attributes:
        weight: the rows as they are stored: mapped, unless they change order.
        bias: [N] in the dtype asked for, or None.
        low_rank: down [r, K] and up [N, r] of the matrix's correction, in memory of their own, or None.
    """

    weight: Packed
    bias: Tensor | None
    low_rank: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class StoredTransformer:
    """Hold what is known about a transformer's file before any weight is read.

    Attributes:
        file: the memory-mapped file.
        architecture: the row it belongs to.
        naming: one of the architecture's.
        config: the arguments of the model class.
        parameters: parameter name -> shape.
        names: tensor name without prefix -> name in the file.
        shapes: tensor name without prefix -> shape in torch order.
        sources: parameter name -> where it lies.
        corrections: tensor name of a weight -> names of down and up of its low-rank correction in the file.
    """

    file: GGUFFile
    architecture: Architecture
    naming: str
    config: dict[str, Any]
    parameters: dict[str, tuple[int, ...]]
    names: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    sources: dict[str, Source]
    corrections: dict[str, tuple[str, str]]

    @property
    def types(self) -> dict[str, str]:
        """Tensor name without prefix -> ggml type name."""
        return {bare: self.file.tensors[name].format for bare, name in self.names.items()}

    @property
    def lacking(self) -> str | None:
        """Blocks of the published model that the file lacks, in a sentence; None where it lacks none."""
        return lacking_blocks(self.architecture, self.config)

    def packed_layer(self, name: str, dtype: torch.dtype) -> StoredLayer | None:
        """Return what the file stores of the linear layer `name`, or None where its matrix is plain.

        The bias has `dtype`.
        """
        source = self.sources[f"{name}.weight"]
        fmt = self._tensor(source).block_format
        if isinstance(fmt, PlainType):
            return None
        weight = Packed(_join(self._ranges(source)), fmt)
        bias = f"{name}.bias"
        return StoredLayer(weight, self.decoded(bias, dtype) if bias in self.sources else None, self._low_rank(source))

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
        source, shape = self.sources[parameter], self.parameters[parameter]
        tensor = self._tensor(source)
        if isinstance(tensor.block_format, PlainType):
            return _join(self._ranges(source)).to(dtype).view(shape)
        whole = dequantize(Packed(tensor.data, tensor.block_format)).reshape(self.shapes[source.tensor])
        return _join([whole[start:stop] for start, stop in source.rows]).to(dtype, copy=True).view(shape)

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
        plain = isinstance(tensor.block_format, PlainType)
        reshaped = tensor.data.reshape(shape if plain else (shape[0], -1) if len(shape) > 1 else (-1,))
        return [reshaped[start:stop].clone() for start, stop in source.rows]


def _join(ranges: list[Tensor]) -> Tensor:
    return ranges[0] if len(ranges) == 1 else torch.cat(ranges)


def open_stored(
    path: str | os.PathLike, config: object | None = None, wanted: tuple[Architecture, ...] = ARCHITECTURES
) -> StoredTransformer:
    """Open a GGUF file and check that it is a complete transformer; no weight is read.

    Args:
        path: the file.
        config: overrides of the inferred config.
        wanted: the architectures that will do.

    Raises:
        GGUFError: for a damaged file, another model, and missing, superfluous or wrongly shaped tensors, which it names.
    """
    file = read_gguf(path)
    try:
        return understand(file, config, wanted)
    except GGUFError as error:
        raise GGUFError(f"{os.fspath(path)}: {error}") from None


def understand(
    file: GGUFFile, config: object | None = None, wanted: tuple[Architecture, ...] = ARCHITECTURES
) -> StoredTransformer:
    """Locate every parameter of the model in an opened file.

    Raises:
        GGUFError: where it cannot be loaded, with the reason.
    """
    with hint_of_part(file.path, file.metadata):
        return _understood(file, config, wanted)


def _understood(file: GGUFFile, config: object | None, wanted: tuple[Architecture, ...]) -> StoredTransformer:
    names = canonical_names(transformer_names(file.tensors))
    shapes = {bare: torch_shape(file, bare, name) for bare, name in names.items()}
    extra = {bare: names.pop(bare) for bare in [*names] if is_correction(bare)}
    extra_shapes = {bare: shapes.pop(bare) for bare in extra}
    architecture = expect(shapes, architecture_of(file.metadata), wanted)
    naming = naming_of(architecture, shapes)
    inferred = infer_config(architecture, shapes, naming, file.metadata, config)
    expected = parameter_shapes(empty_model(architecture, inferred))
    located = sources(architecture, expected, naming)
    shapes = used_shapes(architecture, shapes, stored_shapes(located, expected))
    names = {bare: names[bare] for bare in shapes}
    check_tensors(architecture, shapes, stored_shapes(located, expected), "This file")
    for bare, name in names.items():
        check_weight_type(bare, file.tensors[name].format)
    check_corrections(extra_shapes, shapes, {bare: file.tensors[name].format for bare, name in (names | extra).items()})
    halves = {weight: correction_names(weight) for weight in names}
    corrections = {weight: (extra[down], extra[up]) for weight, (down, up) in halves.items() if down in extra}
    return StoredTransformer(file, architecture, naming, inferred, expected, names, shapes, located, corrections)


def used_shapes(architecture: Architecture, got: Shapes, expected: Shapes) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that the model has a use for.

    Converters drop leading dimensions of 1, store a table as a row of numbers, or merge dimensions where a file has room for
    fewer: a tensor has the shape that is expected where only that differs.
    """
    unused = re.compile(architecture.unused)
    dropped = {name for name in got if name in architecture.flags or unused.fullmatch(name)}
    used = {name: shape for name, shape in got.items() if name in expected or name not in dropped}
    for name, shape in used.items():
        wanted = expected.get(name, shape)
        if shape != wanted and prod(shape) == prod(wanted) and _holds(shape, wanted):
            used[name] = wanted
    return used


def _holds(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Tell whether converters store a tensor of as many weights in this shape."""
    merged = len(wanted) > MAX_WRITTEN_DIMS and _row_sizes(shape) <= _row_sizes(wanted)
    return merged or _core(shape) == _core(wanted) or 1 in (len(shape), len(wanted))


def _core(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _row_sizes(shape: tuple[int, ...]) -> set[int]:
    """Return the weights of a row, of a row of rows and so on; merging neighbours leaves some of them out."""
    return set(accumulate(reversed(shape), mul))


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
    integers = isinstance(sizes, list) and all(isinstance(size, int) and size >= 0 for size in sizes)
    if not integers or prod(sizes) != prod(tensor.shape) or not sizes or sizes[-1] % row.block_size:
        raise GGUFError(
            f"{key} says {sizes}, but the tensor is {row.name} of shape {list(tensor.shape)}: both must hold as many "
            f"weights, in rows of a multiple of {row.block_size}."
        )
    return tuple(sizes)


def check_tensors(architecture: Architecture, got: Shapes, expected: Shapes, what: str) -> None:
    """Raise one GGUFError that names what is missing, superfluous or wrongly shaped."""
    problems = tensor_problems(got, expected)
    if problems:
        reasons = ["incomplete"] * (not expected.keys() <= got.keys()) + ["changed", "made for another config"]
        if not got.keys() <= expected.keys():
            reasons += [f"of a relative of {architecture.name} that is not known here", "holding another part of its pipeline"]
        raise GGUFError(
            f"{problems}. A {architecture.name} file with {_counted_blocks(architecture, expected)} holds exactly {len(expected)} "
            f"tensors. {what} is {', '.join(reasons[:-1])} or {reasons[-1]}. Get it again, or pass the config.json that belongs to it as config=..."
        )


def _counted_blocks(architecture: Architecture, expected: Shapes) -> str:
    """Say how many blocks of each list a model has, "19 double and 38 single blocks"."""
    held = {block for block in map(block_of, expected) if block}
    counts = {pair[0].removesuffix("blocks").rstrip("_"): sum(kind in pair for kind, _ in held) for pair in architecture.blocks}
    words = [counted(count, "layer") if name == "layers" else f"{count} {name}".rstrip() for name, count in counts.items()]
    *others, last = words
    listed = f"{', '.join(others)} and {last}" if others else last
    return listed if "layers" in counts else f"{listed} block{'s' * (sum(counts.values()) != 1)}"
