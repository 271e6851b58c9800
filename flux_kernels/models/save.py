"""Write a FluxTransformer2DModel as a GGUF file: packed rows bit for bit, one tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import GGUFError
from ..formats import PLAIN_TYPES
from ..gguf.conventions import KeyValues, general_keys
from ..gguf.file import write_gguf
from ..layers.linear import GGUFLinear
from .config import CONFIG_KEY, CONFIG_NAMES
from .conventions import ARCHITECTURE, IMAGE_INPUT, main_file_type
from .low_rank_tensors import correction_names, is_correction, join_branches
from .names import BFL, DIFFUSERS, NAMINGS, Source, sources, stored_shapes
from .stored import empty_model, parameter_shapes

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

# It holds every value of the 16-bit types.
_EXACT = "F32"
# A tensor to write: name, ggml type, shape, and its data or a function that gives them.
Entry = tuple[str, str, tuple[int, ...], Any]
_PLAIN_NAMES = {plain.dtype: name for name, plain in PLAIN_TYPES.items() if name in ("F32", "F16", "BF16")}


def save_gguf(model: FluxTransformer2DModel, path: str | os.PathLike, *, names: str | None = None) -> None:
    """Write a FLUX.1 transformer as a GGUF file that diffusers, ComfyUI-GGUF and `load_flux` read.

    GGUFLinear layers are written as they are packed: load, save and load again gives the same bytes. Plain matrices keep
    their dtype and vectors become F32, which changes no value; readers have no 16-bit vectors in common. A low-rank branch
    (a correction, or a fused LoRA) becomes two tensors of its own, which only `load_flux` reads.

    Args:
        model: a FluxTransformer2DModel, with any mix of GGUFLinear and plain layers.
        path: the file to write; one that is there is replaced.
        names: "bfl" (one tensor for q, k, v and the single blocks' MLP input, so they must have one type) or "diffusers". None
            takes "bfl", which every reader knows, where the model's types allow it, else "diffusers".

    Raises:
        TypeError: where `model` is not a FLUX.1 transformer.
        GGUFError: where the parts of one BFL tensor differ in type, or weights are missing (adapters, offloading).
    """
    if names not in (None, *NAMINGS):
        raise GGUFError(f"names is {' or '.join(map(repr, NAMINGS))}, got {names!r}.")
    known = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not isinstance(known, Mapping) or not known.keys() >= set(CONFIG_NAMES):
        raise TypeError(f"save_gguf takes a FluxTransformer2DModel such as pipe.transformer, got {type(model).__name__}.")
    config = {name: known[name] for name in CONFIG_NAMES}
    shapes = parameter_shapes(empty_model(config))
    located = sources(shapes, names or BFL)
    if names is None and _mixes_types(model, located):
        located = sources(shapes, DIFFUSERS)
    tensors: list[Entry] = []
    for name, shape in stored_shapes(located, shapes).items():
        parts = {parameter: source for parameter, source in located.items() if source.tensor == name}
        kind = _stored_type(model, name, shape, list(parts))
        tensors.append((name, kind, shape, partial(_assemble, model, kind, parts)))
        tensors += _correction(model, name, parts)
    write_gguf(path, tensors, _metadata(config, tensors))


def _mixes_types(model: nn.Module, located: Mapping[str, Source]) -> bool:
    """Tell whether parameters that would lie in one tensor have different ggml types."""
    kinds: dict[str, set[str]] = {}
    for parameter, source in located.items():
        kinds.setdefault(source.tensor, set()).add(_held(model, parameter)[0])
    return any(len(types) > 1 for types in kinds.values())


def _metadata(config: Mapping[str, Any], tensors: list[Entry]) -> KeyValues:
    """Return the key-values: the three usual ones, and what the tensors do not tell."""
    weights = [(name, kind, shape) for name, kind, shape, _ in tensors if not is_correction(name)]
    number = main_file_type({name: kind for name, kind, _ in weights}, {name: shape for name, _, shape in weights})
    return {**general_keys(ARCHITECTURE, number), CONFIG_KEY: ("STRING", json.dumps(config))}


def _stored_type(model: nn.Module, name: str, shape: tuple[int, ...], parameters: list[str]) -> str:
    """Return the ggml type a tensor is written in; raise GGUFError where its parts disagree."""
    kinds = {parameter: _held(model, parameter)[0] for parameter in parameters}
    if len(set(kinds.values())) > 1:
        held = ", ".join(f"{parameter} {kind}" for parameter, kind in kinds.items())
        raise GGUFError(
            f'{name!r} is one tensor of one type, its parts are {held}. Use names="diffusers", or one type for all.'
        )
    (kind,) = set(kinds.values())
    if kind in PLAIN_TYPES and (len(shape) == 1 or (name == IMAGE_INPUT and kind == "BF16")):
        return _EXACT
    return kind


def _assemble(model: nn.Module, kind: str, parts: Mapping[str, Source]) -> Tensor:
    """Put the rows of a tensor together in the order of the file, on the CPU."""
    pieces = []
    for parameter, source in parts.items():
        _, tensor_of = _held(model, parameter)
        held = tensor_of()
        taken = 0
        for start, stop in source.rows:
            pieces.append((start, held[taken : taken + stop - start].cpu()))
            taken += stop - start
    rows = [piece for _, piece in sorted(pieces, key=lambda piece: piece[0])]
    tensor = rows[0] if len(rows) == 1 else torch.cat(rows)
    return tensor.to(PLAIN_TYPES[kind].dtype) if kind in PLAIN_TYPES else tensor


def _correction(model: nn.Module, name: str, parts: Mapping[str, Source]) -> list[tuple[str, str, tuple[int, ...], Any]]:
    """Return the tensors of a matrix's low-rank correction, where its layers have branches."""
    ordered = sorted(parts, key=lambda parameter: parts[parameter].rows[0][0])
    if not all(parameter.endswith(".weight") for parameter in ordered):
        return []
    layers: list[Any] = [model.get_submodule(parameter.rpartition(".")[0]) for parameter in ordered]
    branches = [_branch(layer, parts[parameter]) for parameter, layer in zip(ordered, layers, strict=True)]
    joined = join_branches(branches, [getattr(layer, "out_features", 0) for layer in layers])
    if joined is None:
        return []
    return [
        (half, _PLAIN_NAMES[factor.dtype], tuple(factor.shape), factor)
        for half, factor in zip(correction_names(name), joined, strict=True)
    ]


def _branch(layer: nn.Module, source: Source) -> tuple[Tensor, Tensor] | None:
    """Return down and up of a layer's low-rank branch, or None; the rows of up are in the file's order."""
    down, up = getattr(layer, "low_rank_down", None), getattr(layer, "low_rank_up", None)
    if down is None or up is None:
        return None
    pieces = up.detach().cpu().split([stop - start for start, stop in source.rows])
    ordered = sorted(zip(source.rows, pieces, strict=True), key=lambda piece: piece[0])
    return down.detach().cpu(), torch.cat([piece for _, piece in ordered])


def _held(model: nn.Module, parameter: str) -> tuple[str, Callable[[], Tensor]]:
    """Return the ggml type of a parameter, and what gives its tensor as a file holds it.

    Raises:
        GGUFError: where the model has no such parameter, or one that cannot be written.
    """
    module_name, _, kind = parameter.rpartition(".")
    try:
        module = model.get_submodule(module_name)
    except AttributeError:
        raise GGUFError(f"The model has no {module_name!r}, which its config promises. It is no whole FLUX.1.") from None
    value = getattr(module, kind, None)
    if not isinstance(value, Tensor):
        raise GGUFError(f"The model has no {parameter!r}: {module_name} is a {type(module).__name__}. Unload adapters first.")
    if value.device.type == "meta":
        raise GGUFError(f"{parameter!r} is on the meta device (offloaded, or never loaded). Save before offload is enabled.")
    if kind == "weight" and isinstance(module, GGUFLinear):
        return module.format, module.file_bytes
    if value.dtype not in _PLAIN_NAMES:
        raise GGUFError(f"{parameter!r} is {value.dtype}, which is no weight to write. Call swap_linear(model) first.")
    return _PLAIN_NAMES[value.dtype], value.detach
