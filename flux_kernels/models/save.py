"""Write a diffusers transformer as a GGUF file: packed rows bit for bit, one tensor at a time."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GGUFError
from ..formats import PLAIN_TYPES
from ..gguf.conventions import KeyValues, as_written, general_keys, original_shape_keys, written_shape
from ..gguf.file import write_gguf
from ..layers.linear import GGUFLinear
from .architecture import DIFFUSERS, Architecture
from .architectures import ARCHITECTURES
from .config import CONFIG_KEY
from .low_rank_tensors import correction_names, is_correction, join_branches
from .model_class import architecture_of_model, config_names, empty_model, parameter_shapes
from .names import Source, sources, stored_shapes
from .types import main_file_type

# It holds every value of the 16-bit types.
_EXACT = "F32"
# A tensor to write: name, ggml type, shape, and its data or a function that gives them.
Entry = tuple[str, str, tuple[int, ...], Any]
_PLAIN_NAMES = {plain.dtype: name for name, plain in PLAIN_TYPES.items() if name in ("F32", "F16", "BF16")}


def save_gguf(model: nn.Module, path: str | os.PathLike, *, names: str | None = None) -> None:
    """Write a transformer as a GGUF file that diffusers, ComfyUI-GGUF and `load_transformer` read.

    GGUFLinear layers are written as they are packed: load, save and load again gives the same bytes. Plain matrices keep
    their dtype and vectors become F32, which changes no value; readers have no 16-bit vectors in common. A low-rank branch
    (a correction, or a fused LoRA) becomes two tensors of its own, which only `load_transformer` reads.

    Args:
        model: a transformer of a class that `load_transformer` gives, with any mix of GGUFLinear and plain layers.
        path: the file to write; one that is there is replaced.
        names: the naming: the original's, called "bfl" for Flux and "original" for others (FLUX.1 has one tensor there for q,
            k, v and the single blocks' MLP input, so they must have one type), or "diffusers". None takes the original's,
            which every reader knows, where the model's types allow it, else "diffusers", which ComfyUI-GGUF and
            stable-diffusion.cpp do not open.

    Raises:
        TypeError: where `model` is no such transformer.
        GGUFError: where the parts of one tensor differ in type, or weights are missing (adapters, offloading).
    """
    architecture = _architecture_of(model)
    if names not in (None, *architecture.namings):
        raise GGUFError(f"names is {' or '.join(map(repr, architecture.namings))}, got {names!r}.")
    known: Any = model.config
    config = {name: known[name] for name in config_names(architecture)}
    shapes = parameter_shapes(empty_model(architecture, config))
    located = sources(architecture, shapes, names or architecture.main_naming)
    if names is None and _mixes_types(model, located):
        located = sources(architecture, shapes, DIFFUSERS)
    tensors: list[Entry] = []
    stored = stored_shapes(located, shapes)
    for name, shape in stored.items():
        parts = {parameter: source for parameter, source in located.items() if source.tensor == name}
        kind = _stored_type(model, architecture, name, shape, list(parts))
        tensors.append((name, kind, written_shape(shape), partial(_assemble, model, kind, parts)))
        tensors += _correction(model, name, parts)
    tensors += [(name, _EXACT, (0,), torch.empty(0)) for name in architecture.flagged(config)]
    write_gguf(path, tensors, _metadata(architecture, config, tensors) | original_shape_keys(stored))


def _architecture_of(model: object) -> Architecture:
    architecture = architecture_of_model(model)
    if architecture is None:
        legal = ", ".join(row.model_class for row in reversed(ARCHITECTURES))
        raise TypeError(f"save_gguf takes a transformer such as pipe.transformer ({legal}), got {type(model).__name__}.")
    return architecture


def _mixes_types(model: nn.Module, located: Mapping[str, Source]) -> bool:
    """Tell whether parameters that would lie in one tensor have different ggml types."""
    kinds: dict[str, set[str]] = {}
    for parameter, source in located.items():
        kinds.setdefault(source.tensor, set()).add(_held(model, parameter)[0])
    return any(len(types) > 1 for types in kinds.values())


def _metadata(architecture: Architecture, config: Mapping[str, Any], tensors: list[Entry]) -> KeyValues:
    """Return the key-values: the three usual ones, and what the tensors do not tell."""
    weights = [(name, kind, shape) for name, kind, shape, _ in tensors if not is_correction(name)]
    types, shapes = {name: kind for name, kind, _ in weights}, {name: shape for name, _, shape in weights}
    number = main_file_type(types, shapes, architecture)
    return {**general_keys(architecture.gguf_name, number), CONFIG_KEY: ("STRING", json.dumps(config))}


def _stored_type(model: nn.Module, architecture: Architecture, name: str, shape: tuple[int, ...], parameters: list[str]) -> str:
    """Return the ggml type a tensor is written in; raise GGUFError where its parts disagree."""
    kinds = {parameter: _held(model, parameter)[0] for parameter in parameters}
    if len(set(kinds.values())) > 1:
        held = ", ".join(f"{parameter} {kind}" for parameter, kind in kinds.items())
        raise GGUFError(
            f'{name!r} is one tensor of one type, its parts are {held}. Use names="diffusers", or one type for all.'
        )
    (kind,) = set(kinds.values())
    if kind in PLAIN_TYPES and (len(shape) < 2 or re.fullmatch(architecture.precise, architecture.original_of(name))):
        return _EXACT
    original = architecture.original_of(name)
    if kind == "BF16" and (name in architecture.never_bf16 or re.fullmatch(architecture.undecoded, original)):
        return _EXACT
    return kind


def _assemble(model: nn.Module, kind: str, parts: Mapping[str, Source]) -> Tensor:
    """Put the rows of a tensor together in the order of the file, on the CPU."""
    pieces = []
    for parameter, source in parts.items():
        _, tensor_of = _held(model, parameter)
        held = tensor_of().flatten() if source.flat else tensor_of()
        taken = 0
        for start, stop in source.rows:
            pieces.append((start, held[taken : taken + stop - start].cpu()))
            taken += stop - start
    rows = [piece for _, piece in sorted(pieces, key=lambda piece: piece[0])]
    tensor = rows[0] if len(rows) == 1 else torch.cat(rows)
    tensor = as_written(tensor)
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
        raise GGUFError(f"The model has no {module_name!r}, which its config promises. It is incomplete.") from None
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
