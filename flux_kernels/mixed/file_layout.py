"""The bytes of a file before it is written: every tensor of a FLUX.1 GGUF file, its type where no plan chooses it, its size."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from pathlib import Path

from ..errors import FormatError
from ..flux.low_rank_tensors import RANK_TYPE, low_rank_shapes
from ..flux.names import BFL, sources, stored_shapes, strip_prefix
from ..flux.types import BLOCK, RULES, tensor_kind, tensor_types
from ..formats import type_row, types_by_name
from ..gguf.file import read_gguf
from ..gguf.spec import DEFAULT_ALIGNMENT, padded, tensor_nbytes
from ..gguf.write import planned_size
from ..source.safetensors_header import join_scales, read_safetensors

Shapes = Mapping[str, tuple[int, ...]]
KEY_VALUE_BYTES = 4096  # kept free of a budget for the key-values that tell where a file comes from (see provenance.py)
_IMAGE_INPUT = {"img_in.weight": "F32"}  # in BF16, diffusers takes its bytes for columns (see flux/save.py)
_OPTION = re.compile(r"(?P<type>\w+?)(\+r(?P<rank>[1-9]\d*))?")
_USUAL_KEYS = {
    "general.architecture": ("STRING", "flux"),
    "general.quantization_version": ("UINT32", 2),
    "general.file_type": ("UINT32", 0),
}


@dataclass(frozen=True)
class FileLayout:
    """Hold every tensor of the file that a plan is for.

    Attributes:
        shapes: tensor name (BFL, without prefix) -> shape in torch order, in file order.
        types: tensor name -> ggml type where the plan does not choose it.
        model: name of the model.
    """

    shapes: Shapes
    types: Mapping[str, str]
    model: str = ""

    @property
    def parameters(self) -> int:
        """Number of weights in all tensors."""
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def block_parameters(self) -> int:
        """Number of weights in the matrices of the blocks."""
        return sum(prod(shape) for name, shape in self.shapes.items() if tensor_kind(name, shape) == BLOCK)

    @cached_property
    def empty_bytes(self) -> int:
        """Bytes of everything that is not tensor data: header, names, and the key-values that published files have."""
        tensors = [(name, self.types[name], shape) for name, shape in self.shapes.items()]
        data = sum(self.option_bytes(name, self.types[name]) for name in self.shapes)
        return planned_size(tensors, _USUAL_KEYS) - data

    def option_bytes(self, name: str, option: str) -> int:
        """Return what a tensor adds to the file in an option such as "Q4_K" or "Q4_K+r16", padding included."""
        kind, rank = parse_option(option)
        size = padded(tensor_nbytes(type_row(kind), tuple(self.shapes[name])), DEFAULT_ALIGNMENT)
        return size + sum(
            padded(2 * prod(shape), DEFAULT_ALIGNMENT) + _entry_bytes(extra)
            for extra, shape in low_rank_shapes(name, self.shapes[name], rank).items()
        )

    def file_bytes(self, options: Mapping[str, str]) -> int:
        """Return the bytes of the whole file with these options and the key-values that published files have."""
        chosen = {**self.types, **options}
        tensors = []  # counted as a whole: entries of corrections lengthen the header, which is padded once
        for name, shape in self.shapes.items():
            kind, rank = parse_option(chosen[name])
            tensors.append((name, kind, shape))
            tensors += [(extra, RANK_TYPE, size) for extra, size in low_rank_shapes(name, shape, rank).items()]
        return planned_size(tensors, _USUAL_KEYS)

    def bits_per_weight(self, options: Mapping[str, str]) -> float:
        """Return 8 * bytes of all tensors (without padding and header) / weights of all tensors."""
        chosen = {**self.types, **options}
        return 8 * sum(self.data_bytes(name, chosen[name]) for name in self.shapes) / self.parameters

    def block_bits(self, options: Mapping[str, str]) -> float:
        """Return bits per weight over the matrices of the blocks alone."""
        chosen = {**self.types, **options}
        blocks = [name for name, shape in self.shapes.items() if tensor_kind(name, shape) == BLOCK]
        return 8 * sum(self.data_bytes(name, chosen[name]) for name in blocks) / self.block_parameters

    def budget_of_bits(self, bits: float) -> int:
        """Return the most bytes of a file whose tensors have `bits` a weight: those, header and key-values."""
        return self.empty_bytes + KEY_VALUE_BYTES + int(bits * self.parameters / 8)

    def file_name(self, options: Mapping[str, str]) -> str:
        """Return `<model>_mxA_B.gguf`: A.B are the bits per weight, rounded to one digit."""
        bits = f"{self.bits_per_weight(options):.1f}".replace(".", "_")
        return f"{self.model or 'model'}_mx{bits}.gguf"

    def data_bytes(self, name: str, option: str) -> int:
        """Return the bytes of a tensor in an option, a correction included, padding and header left aside."""
        kind, rank = parse_option(option)
        extra = sum(2 * prod(shape) for shape in low_rank_shapes(name, self.shapes[name], rank).values())
        return tensor_nbytes(type_row(kind), tuple(self.shapes[name])) + extra


@cache
def parse_option(option: str) -> tuple[str, int]:
    """Split "Q4_K+r16" into type and rank; rank 0 where there is none."""
    match = _OPTION.fullmatch(option)
    if match is None or match["type"] not in types_by_name():
        known = ", ".join(types_by_name())
        raise FormatError(f"Unknown type {option!r}. Known: {known}, and each with a rank, as in Q4_K+r16.")
    return match["type"], int(match["rank"] or 0)


def option_bits(option: str) -> float:
    """Return the bits per weight of an option's type, its rank left aside."""
    return type_row(parse_option(option)[0]).bits_per_weight


def layout_of_shapes(shapes: Shapes, model: str, rule: str = "new") -> FileLayout:
    """Make the layout of a file; `rule` says how the tensors outside a plan are stored (see flux/types.py)."""
    if rule not in RULES:
        raise FormatError(f"Unknown rule {rule!r}. Known: {', '.join(RULES)}.")
    types = tensor_types(rule, "BF16", shapes)
    return FileLayout(shapes, {name: _IMAGE_INPUT.get(name, kind) for name, kind in types.items()}, model)


def flux1_shapes(*, guidance: bool = True) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a FLUX.1-dev file (of schnell without guidance), by BFL name."""
    from ..flux.stored import empty_model, parameter_shapes

    return _as_bfl(parameter_shapes(empty_model({"guidance_embeds": guidance})))


def embedded_shapes() -> dict[str, tuple[int, ...]]:
    """Return the tensors of the embedded model, by BFL name."""
    from ..generation.embedded import embedded_model_path

    return shapes_of_model(embedded_model_path() / "transformer")


NAMED_MODELS = {
    "flux1-dev": flux1_shapes,
    "flux1-schnell": lambda: flux1_shapes(guidance=False),
    "embedded": embedded_shapes,
}
"""Models whose tensors are known without a file."""


def shapes_of_model(path: Path) -> dict[str, tuple[int, ...]]:
    """Read tensor names and shapes from headers alone, as BFL names without prefix.

    Args:
        path: a .gguf file, a .safetensors file, or a folder of the latter; BFL or diffusers names.
    """
    if path.suffix.lower() == ".gguf":
        found = {strip_prefix(name): tuple(tensor.shape) for name, tensor in read_gguf(path).tensors.items()}
        return _as_bfl(found)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"{path} holds no .safetensors file. Name the model's file or folder.")
    stored = {name: tensor for file in files for name, tensor in read_safetensors(str(file)).items()}
    return _as_bfl({strip_prefix(name): tensor.shape for name, tensor in join_scales(stored).items()})


def _as_bfl(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    if "x_embedder.weight" in shapes:
        return stored_shapes(sources(shapes, BFL), shapes)
    return dict(shapes)


def _entry_bytes(name: str) -> int:
    """Return the bytes of a matrix's entry in the header."""
    return 8 + len(name) + 4 + 2 * 8 + 4 + 8


def uniform(layout: FileLayout, kind: str, tensors: Iterable[str]) -> dict[str, str]:
    """Give these tensors one type; raise FormatError where one has no whole blocks of it."""
    chosen = {}
    for name in tensors:
        if layout.shapes[name][-1] % type_row(kind).block_size:
            raise FormatError(f"{name} has rows of {layout.shapes[name][-1]} weights, which are no whole blocks of {kind}.")
        chosen[name] = kind
    return chosen
