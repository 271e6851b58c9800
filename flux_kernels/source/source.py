"""Understand a source model: what it is, and of which stored rows each tensor of a new file consists."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..errors import GGUFError
from ..gguf.conventions import architecture_of, file_title
from ..gguf.spec import shown_path
from ..gguf.split import hint_of_part
from ..models.architecture import DIFFUSERS, Architecture
from ..models.config import infer_config
from ..models.cut_short import lacking_blocks
from ..models.model_class import empty_model, parameter_shapes
from ..models.names import Source, sources, stored_shapes
from ..models.recognise import expect, lora_tensor, naming_of, note_left_out, recognise
from ..models.stored import check_tensors, used_shapes
from ..models.stored_shapes import Shapes
from .source_files import SourceFiles, open_source
from .stored_tensor import StoredTensor


@dataclass(frozen=True)
class SourceTensor:
    """Hold one tensor of the file to be written.

    Attributes:
        name: in the file, the original's where the architecture is known.
        shape: in torch order.
        pieces: (stored tensor, first row, end), one after the other.
        parameter: name in the source of the first piece.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[tuple[StoredTensor, int, int], ...]
    parameter: str

    @property
    def rows(self) -> int:
        """Size of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def nbytes(self) -> int:
        """Bytes read from the source."""
        return round(sum((stop - start) * tensor.row_nbytes for tensor, start, stop in self.pieces))

    @property
    def weights(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @cached_property
    def type(self) -> str | None:
        """Type it is stored in, None where its pieces differ or are scaled."""
        types = {tensor.type if tensor.scale is None else None for tensor, _, _ in self.pieces}
        return types.pop() if len(types) == 1 else None

    @property
    def types(self) -> set[str]:
        """The types of its pieces."""
        return {tensor.type for tensor, _, _ in self.pieces}

    def read(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Read and decode rows: float32 [stop - start, ...] on `device`."""
        return _joined([tensor.read(first, last, device) for tensor, first, last in self._ranges(start, stop)])

    def raw(self, start: int, stop: int) -> Tensor:
        """Read rows as they are stored, of a tensor that has one `type`."""
        return _joined([tensor.raw(first, last) for tensor, first, last in self._ranges(start, stop)])

    def mapped(self, start: int, stop: int, files: Mapping[str, mmap.mmap]) -> Tensor:
        """Map rows as they are stored, of a tensor of floats; `files` are the source's by path, mapped whole."""
        return _joined([tensor.mapped(first, last, files[tensor.path]) for tensor, first, last in self._ranges(start, stop)])

    def _ranges(self, start: int, stop: int) -> Iterator[tuple[StoredTensor, int, int]]:
        """Yield the stored rows that rows start..stop consist of."""
        at = 0
        for tensor, first, last in self.pieces:
            begin, end = max(start, at), min(stop, at + last - first)
            if begin < end:
                yield tensor, first + begin - at, first + end - at
            at += last - first


@dataclass(frozen=True)
class SourceModel:
    """Hold a source that was opened and understood.

    Attributes:
        files: where it lies.
        model: what it is, in words.
        tensors: those of the file to be written, in its order.
        config: arguments of the model class, None for models of no known architecture.
        notes: sentences for the user.
        architecture: the row it belongs to, or None.
    """

    files: SourceFiles
    model: str
    tensors: dict[str, SourceTensor]
    config: dict[str, Any] | None
    notes: tuple[str, ...]
    architecture: Architecture | None = None

    @property
    def needs_config(self) -> bool:
        """Whether the config does not follow from the tensors, so that the file must hold it."""
        if self.config is None or self.architecture is None:
            return False
        try:
            usual = {
                name: default(self.config) if callable(default) else default
                for name, default in self.architecture.untold.items()
            }
        except GGUFError:
            return True
        return any(self.config[name] != value for name, value in usual.items())


def understand_source(path: str | os.PathLike[str], config: object | None = None) -> SourceModel:
    """Open a source and tell what it is; see `understand`."""
    return understand(open_source(path), config)


def understand(files: SourceFiles, config: object | None = None) -> SourceModel:
    """Tell what model a source holds; only headers were read.

    A known architecture must be complete, and gets its original names: in FLUX.1, q, k and v become one tensor, so do the inputs
    of a single block, and the halves of the last modulation change places. Tensors of other models keep their names.

    Args:
        files: an opened source.
        config: overrides of the inferred config, as in `load_transformer`.

    Raises:
        GGUFError: where the source is damaged, incomplete, a LoRA, or holds what cannot be weights.
    """
    shapes = {name: tensor.shape for name, tensor in files.tensors.items()}
    for tensor in files.tensors.values():
        tensor.check()
    factor = lora_tensor(shapes)
    if factor is not None:
        raise GGUFError(
            f"{shown_path(files.paths[0])} holds a LoRA ({factor!r}), which is no model and stays in 16 bit: quantize the model, "
            "and give the LoRA to `flux-kernels generate --lora` or pipeline.load_lora_weights(...)."
        )
    architecture = recognise(shapes)
    if architecture is None:
        return _unknown(files, shapes)
    with hint_of_part(files.paths[0], files.metadata):
        return _known(architecture, files, shapes, files.config if config is None else config)


def _known(architecture: Architecture, files: SourceFiles, shapes: Shapes, config: object | None) -> SourceModel:
    """Take the tensors of a model of a known architecture, which must all be there."""
    naming = naming_of(architecture, shapes)
    known = infer_config(architecture, shapes, naming, files.metadata, config)
    expected = parameter_shapes(empty_model(architecture, known))
    located = sources(architecture, expected, naming)
    stored = stored_shapes(located, expected)
    check_tensors(architecture, used_shapes(architecture, shapes, stored), stored, "The source")
    if naming == DIFFUSERS and architecture.links:
        tensors = _fused(architecture, files.tensors, expected)
    else:
        tensors = {name: _whole(name, replace(files.tensors[name], shape=shape)) for name, shape in stored.items()}
    tensors |= {name: SourceTensor(name, (0,), (), name) for name in architecture.flagged(known)}
    lacking = lacking_blocks(architecture, known)
    notes = (*note_left_out(files.left_out), *([lacking] if lacking else []))
    name = architecture.variant_name(known, file_title(files.paths[0], files.metadata))
    return SourceModel(files, name, tensors, known, notes, architecture)


def _unknown(files: SourceFiles, shapes: Mapping[str, tuple[int, ...]]) -> SourceModel:
    """Take the tensors of a model of no known architecture as they are."""
    try:
        expect(shapes, architecture_of(files.metadata))
    except GGUFError as error:
        seen = str(error).split(". ")[0].rstrip(".")
    tensors = {name: _whole(name, tensor) for name, tensor in files.tensors.items()}
    note = f"Not recognised, so nothing is checked and no name changed: {seen}."
    return SourceModel(files, "not recognised", tensors, None, (note, *note_left_out(files.left_out)))


def _whole(name: str, tensor: StoredTensor) -> SourceTensor:
    return SourceTensor(name, tensor.shape, ((tensor, 0, tensor.rows),), name)


def _fused(
    architecture: Architecture, stored: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, SourceTensor]:
    """Put diffusers' parameters together to the original's tensors."""
    located = sources(architecture, expected, architecture.original)
    parts: dict[str, list[tuple[str, Source]]] = {}
    for parameter, source in located.items():
        parts.setdefault(source.tensor, []).append((parameter, source))
    fused = {}
    for name, shape in stored_shapes(located, expected).items():
        pieces = []
        for parameter, source in parts[name]:
            taken = 0
            # Where the parameter's rows lie in the original tensor, in the parameter's order.
            held = replace(stored[parameter], shape=(prod(expected[parameter]),) if source.flat else expected[parameter])
            for start, stop in source.rows:
                pieces.append((start, (held, taken, taken + stop - start)))
                taken += stop - start
        ordered = tuple(piece for _, piece in sorted(pieces, key=lambda piece: piece[0]))
        fused[name] = SourceTensor(name, shape, ordered, parts[name][0][0])
    return fused


def _joined(rows: list[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows)
