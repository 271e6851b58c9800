"""The bytes of a GGUF file before it is written: its tensors, and types that no plan chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from pathlib import Path

from ..errors import FormatError
from ..formats import type_row
from ..generation.embedded import embedded_model_path
from ..gguf.conventions import general_keys, original_shape_keys, written_shape
from ..gguf.spec import DEFAULT_ALIGNMENT, padded, tensor_nbytes
from ..gguf.write import planned_size
from ..models.architecture import DIFFUSERS, Architecture
from ..models.model_class import empty_model, parameter_shapes
from ..models.names import sources, stored_shapes
from ..models.recognise import naming_of, recognise
from ..models.types import BLOCK, RULES, tensor_kind, tensor_types
from ..models.variant_calls import VARIANTS, find_variant
from ..source.source_files import open_source
from .option import Option

Shapes = Mapping[str, tuple[int, ...]]
Options = Mapping[str, Option]
# Kept free of a budget for the key-values that tell where a file comes from (convert/provenance.py).
KEY_VALUE_BYTES = 4096


@dataclass(frozen=True)
class FileLayout:
    """Hold every tensor of the file that a plan is for.

    Attributes:
        shapes: tensor name (the original's, without prefix) -> shape in torch order, in file order.
        types: tensor name -> how it is stored where the plan does not choose it.
        model: name of the model.
        architecture: the row it belongs to.
    """

    shapes: Shapes
    types: Options
    model: str = ""
    architecture: Architecture | None = None

    @property
    def parameters(self) -> int:
        """Number of weights in all tensors."""
        return self._weights(self.shapes)

    @property
    def block_parameters(self) -> int:
        """Number of weights in the matrices of the blocks."""
        return self._weights(self.blocks)

    @cached_property
    def blocks(self) -> list[str]:
        """The matrices of the blocks."""
        return [name for name, shape in self.shapes.items() if tensor_kind(name, shape, self.architecture) == BLOCK]

    @cached_property
    def empty_bytes(self) -> int:
        """Bytes of all but tensor data: header, names, and the key-values that published files have."""
        return self.file_bytes({}) - sum(self.option_bytes(name, self.types[name]) for name in self.shapes)

    def option_bytes(self, name: str, option: Option) -> int:
        """Return the bytes that a tensor adds: padded data, and the header's entries of a correction."""
        entries = option.entries(name, written_shape(self.shapes[name]))
        data = sum(padded(tensor_nbytes(type_row(kind), shape), DEFAULT_ALIGNMENT) for _, kind, shape in entries)
        return data + sum(_entry_bytes(extra) for extra, _, _ in entries[1:])

    def file_bytes(self, options: Options) -> int:
        """Return the bytes of the whole file with these options and the key-values that published files have."""
        chosen = {**self.types, **options}
        # Counted as a whole: entries of corrections lengthen the header, which is padded once.
        entries = [entry for name, shape in self.shapes.items() for entry in chosen[name].entries(name, written_shape(shape))]
        keys = general_keys(self.architecture.gguf_name if self.architecture else "", 0) | original_shape_keys(self.shapes)
        return planned_size(entries, keys)

    def bits_per_weight(self, options: Options) -> float:
        """Return 8 * bytes of all tensors (without padding and header) / weights of all tensors."""
        return self._bits(self.shapes, options)

    def block_bits(self, options: Options) -> float:
        """Return bits per weight over the matrices of the blocks alone."""
        return self._bits(self.blocks, options)

    def budget_of_bits(self, bits: float) -> int:
        """Return the most bytes of a file whose tensors have `bits` a weight: those, header and key-values."""
        return self.empty_bytes + KEY_VALUE_BYTES + int(bits * self.parameters / 8)

    def file_name(self, options: Options) -> str:
        """Return `<model>_mxA_B.gguf`: A.B are the bits per weight, rounded to one digit."""
        bits = f"{self.bits_per_weight(options):.1f}".replace(".", "_")
        return f"{self.model or 'model'}_mx{bits}.gguf"

    def _weights(self, names: Iterable[str]) -> int:
        return sum(prod(self.shapes[name]) for name in names)

    def _bits(self, names: Iterable[str], options: Options) -> float:
        chosen = {**self.types, **options}
        return 8 * sum(chosen[name].nbytes(self.shapes[name]) for name in names) / self._weights(names)


def layout_of_shapes(shapes: Shapes, model: str, rule: str = "new") -> FileLayout:
    """Make the layout of a file; `rule` of models/types.py says how tensors outside a plan are stored."""
    if rule not in RULES:
        raise FormatError(f"Unknown rule {rule!r}. Known: {', '.join(RULES)}.")
    architecture = recognise(shapes)
    wide = {name: "F32" for name in (architecture.never_bf16 if architecture else ()) if name in shapes}
    types = {**tensor_types(rule, "BF16", shapes), **wide}
    return FileLayout(shapes, {name: Option(type_name) for name, type_name in types.items()}, model, architecture)


def shapes_of_variant(slug: str) -> Shapes:
    """Return the tensors of a published model's file, by original name.

    Args:
        slug: such as "flux1-dev" or "flux2-klein-4b".

    Raises:
        FormatError: for an unknown name.
    """
    architecture, variant = find_variant(slug)
    return _as_original(architecture, parameter_shapes(empty_model(architecture, variant.config)))


def embedded_shapes() -> Shapes:
    """Return the tensors of the embedded model, by original name."""
    return shapes_of_model(embedded_model_path())


NAMED_MODELS: dict[str, Callable[[], Shapes]] = {
    **{slug: partial(shapes_of_variant, slug) for slug in VARIANTS},
    "embedded": embedded_shapes,
}
"""Models whose tensors are known without a file."""


def shapes_of_model(path: Path) -> Shapes:
    """Read tensor names and shapes from headers alone, as original names without prefix.

    Args:
        path: whatever `open_source` takes, in original or diffusers names.
    """
    shapes = {name: tensor.shape for name, tensor in open_source(path).tensors.items()}
    architecture = recognise(shapes)
    is_diffusers = architecture is not None and naming_of(architecture, shapes) == DIFFUSERS
    return _as_original(architecture, shapes) if architecture and is_diffusers else shapes


def _as_original(architecture: Architecture, shapes: Shapes) -> Shapes:
    return stored_shapes(sources(architecture, shapes, architecture.main_naming), shapes)


def _entry_bytes(name: str) -> int:
    """Return the bytes of a matrix's entry in the header."""
    return 8 + len(name) + 4 + 2 * 8 + 4 + 8
