"""Find the files of a source model and the tensors in them.

A source is one safetensors file, shards with or without an index, a diffusers folder, or a GGUF file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import GGUFError
from ..gguf.file import read_gguf
from ..gguf.spec import MAGIC, shown, shown_path
from ..models.architectures import ARCHITECTURES
from ..models.recognise import canonical_names, transformer_names
from ..models.stored import torch_shape
from .safetensors_header import join_scales, read_safetensors
from .stored_tensor import StoredTensor

_INDEX = ".safetensors.index.json"
_SHARD = re.compile(r"-[0-9]+-of-[0-9]+\.safetensors$")
# The transformer's prefix in files that hold text encoders and VAE too.
_WHOLE_CHECKPOINT = "model.diffusion_model."
_LEGAL = (
    "Legal are a .safetensors or .gguf file, an index of shards (.safetensors.index.json), or a folder that holds one of them"
)


@dataclass(frozen=True)
class SourceFiles:
    """Hold what the files of a model say before any weight is read.

    Attributes:
        paths: the files, GGUF or safetensors.
        tensors: name without prefix -> tensor.
        metadata: key-values of a GGUF file.
        config: path of the config.json of a diffusers model, or None.
        left_out: names of tensors that belong to other parts of a whole checkpoint.
    """

    paths: tuple[str, ...]
    tensors: dict[str, StoredTensor]
    metadata: dict[str, Any]
    config: str | None = None
    left_out: tuple[str, ...] = ()


def open_source(path: str | os.PathLike[str]) -> SourceFiles:
    """List the tensors of a source; only headers are read.

    Raises:
        GGUFError: where there is no model, the files are damaged, or shards are missing.
        OSError: where a file cannot be read.
    """
    source = Path(os.fsdecode(path))
    paths = list(_files(source))
    if _is_gguf(paths[0]):
        return _open_gguf(str(paths[0]))
    tensors: dict[str, StoredTensor] = {}
    for file in paths:
        for name, tensor in read_safetensors(str(file)).items():
            if name in tensors:
                raise GGUFError(f"{shown(name)} is in two shards, {Path(tensors[name].path).name} and {file.name}.")
            tensors[name] = tensor
    tensors = join_scales(tensors)
    if not tensors:
        raise GGUFError(f"{shown_path(str(source))} holds no tensors.")
    chosen = [name for name in tensors if name.startswith(_WHOLE_CHECKPOINT)] or transformer_names(tensors)
    return SourceFiles(
        tuple(map(str, paths)),
        {bare: tensors[name] for bare, name in canonical_names(chosen).items()},
        {},
        _config(paths[0].parent / "config.json"),
        tuple(tensors.keys() - set(chosen)),
    )


def _config(path: Path) -> str | None:
    """Return the path of a known transformer's config.json; any other file of that name says nothing."""
    try:
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError:
        return None
    classes = {row.model_class for row in ARCHITECTURES}
    return str(path) if isinstance(known, dict) and known.get("_class_name") in classes else None


def _open_gguf(path: str) -> SourceFiles:
    file = read_gguf(path)
    tensors = {}
    chosen = transformer_names(file.tensors)
    for bare, name in canonical_names(chosen).items():
        tensor = file.tensors[name]
        shape = torch_shape(file, bare, name)
        tensors[bare] = StoredTensor(name, tensor.path, tensor.offset, tensor.format, shape)
    return SourceFiles(file.parts, tensors, file.metadata, left_out=tuple(file.tensors.keys() - set(chosen)))


def _files(path: Path) -> Iterable[Path]:
    if path.is_dir():
        return _files_of_folder(path)
    if path.name.endswith(_INDEX):
        return _shards(path)
    if not path.exists():
        raise GGUFError(f"{shown_path(str(path))} does not exist. {_LEGAL}.")
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise GGUFError(f"{shown_path(str(path))} is a pickle, which can run code when it is read. {_LEGAL}.")
    if _SHARD.search(path.name):
        raise GGUFError(f"{shown_path(str(path))} is one of several shards. Give their folder, or the index beside them.")
    return [path]


def _files_of_folder(folder: Path) -> Iterable[Path]:
    """Return the files of a folder: a pipeline's transformer/, shards with or without index, or one file."""
    inner = folder / "transformer"
    if inner.is_dir() and any(inner.glob("*.safetensors")):
        folder = inner
    indices = sorted(folder.glob(f"*{_INDEX}"))
    if len(indices) == 1:
        return _shards(indices[0])
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.gguf"))
    shards = [path for path in files if _SHARD.search(path.name)]
    if shards and len(shards) == len(files) and not indices:
        wanted = int(shards[0].name.removesuffix(".safetensors").rpartition("-")[2])
        if len({_SHARD.sub("", path.name) for path in shards}) == 1 and len(shards) == wanted:
            return shards
        raise GGUFError(f"{shown_path(str(folder))} holds {len(shards)} shards of {wanted}. Get the rest.")
    if len(files) == 1:
        return files
    names = ", ".join(path.name for path in (indices or files)[:5])
    what = f"several models: {names}. Give one of them" if names else f"no model. {_LEGAL}"
    raise GGUFError(f"{shown_path(str(folder))} holds {what}.")


def _shards(index: Path) -> list[Path]:
    """Return the files that an index names; raise GGUFError where one is missing."""
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise GGUFError(f"{shown_path(str(index))} is no index of shards ({error}). Get it again.") from None
    if not files or any(not isinstance(name, str) or Path(name).name != name for name in files):
        raise GGUFError(f"{shown_path(str(index))} names no files beside it. Get it again.")
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        raise GGUFError(f"{shown_path(str(index))} names {', '.join(map(shown, missing[:3]))}, not there. Get the rest.")
    return [index.parent / name for name in files]


def _is_gguf(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC
