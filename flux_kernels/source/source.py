"""Understand a source model: what it is, and of which stored rows each tensor of a new file consists."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..errors import GGUFError
from ..gguf.check import tensor_problems
from ..gguf.conventions import architecture_of
from ..gguf.spec import shown_path
from ..models.config import default_rope, infer_config
from ..models.names import BFL, Source, sources, stored_shapes
from ..models.stored import empty_model, parameter_shapes
from ..models.variant import lora_tensor, naming_of, refusal_of, variant_name
from .source_files import SourceFiles, open_source
from .stored_tensor import StoredTensor


@dataclass(frozen=True)
class SourceTensor:
    """Hold one tensor of the file to be written.

    Attributes:
        name: in the file, BFL's for FLUX.1.
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
        config: arguments of FluxTransformer2DModel, None for other models.
        notes: sentences for the user.
    """

    files: SourceFiles
    model: str
    tensors: dict[str, SourceTensor]
    config: dict[str, Any] | None
    notes: tuple[str, ...]

    @property
    def needs_config(self) -> bool:
        """Whether the config does not follow from the tensors, so that the file must hold it."""
        if self.config is None:
            return False
        try:
            return default_rope(self.config["attention_head_dim"]) != self.config["axes_dims_rope"]
        except GGUFError:
            return True


def understand_source(path: str | os.PathLike[str], config: object | None = None) -> SourceModel:
    """Open a source and tell what it is; see `understand`."""
    return understand(open_source(path), config)


def understand(files: SourceFiles, config: object | None = None) -> SourceModel:
    """Tell what model a source holds; only headers were read.

    FLUX.1 must be complete, and gets BFL names: q, k and v become one tensor, so do the inputs of a single block, and the
    halves of the last modulation change places. Tensors of other models keep their names.

    Args:
        files: an opened source.
        config: overrides of FLUX.1's inferred config, as in `load_flux`.

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
    refusal = refusal_of(shapes, architecture_of(files.metadata))
    if refusal is not None:
        tensors = {name: _whole(name, tensor) for name, tensor in files.tensors.items()}
        first = refusal.split(". ")[0].rstrip(".")
        note = f"Not recognised as FLUX.1, so nothing is checked and no name changed: {first}."
        return SourceModel(files, "not FLUX.1", tensors, None, (note, *_notes(files)))
    naming = naming_of(shapes, None)
    known = infer_config(shapes, naming, files.metadata, files.config if config is None else config)
    expected = parameter_shapes(empty_model(known))
    located = sources(expected, naming)
    problems = tensor_problems(shapes, stored_shapes(located, expected))
    if problems:
        raise GGUFError(f"{problems}. The source is no whole FLUX.1 transformer, or its config must be passed as config=...")
    if naming == BFL:
        tensors = {name: _whole(name, files.tensors[name]) for name in stored_shapes(located, expected)}
    else:
        tensors = _fused(files.tensors, expected)
    return SourceModel(files, variant_name(known), tensors, known, _notes(files))


def _whole(name: str, tensor: StoredTensor) -> SourceTensor:
    return SourceTensor(name, tensor.shape, ((tensor, 0, tensor.rows),), name)


def _fused(stored: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]]) -> dict[str, SourceTensor]:
    """Put diffusers' parameters together to BFL's tensors."""
    located = sources(expected, BFL)
    parts: dict[str, list[tuple[str, Source]]] = {}
    for parameter, source in located.items():
        parts.setdefault(source.tensor, []).append((parameter, source))
    fused = {}
    for name, shape in stored_shapes(located, expected).items():
        pieces = []
        for parameter, source in parts[name]:
            taken = 0
            # Where the parameter's rows lie in BFL's tensor, in the parameter's order.
            for start, stop in source.rows:
                pieces.append((start, (stored[parameter], taken, taken + stop - start)))
                taken += stop - start
        ordered = tuple(piece for _, piece in sorted(pieces, key=lambda piece: piece[0]))
        fused[name] = SourceTensor(name, shape, ordered, parts[name][0][0])
    return fused


def _notes(files: SourceFiles) -> tuple[str, ...]:
    if not files.left_out:
        return ()
    return (f"{len(files.left_out)} tensors of other parts (text encoders, VAE) are left out.",)


def _joined(rows: list[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows)
