"""Key-values that GGUF files of models share by convention; the format itself asks for none of them."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from torch import Tensor

from .spec import MAX_WRITTEN_DIMS

# Before it a tensor's name: the shape of a tensor that its converter reshaped, as ComfyUI-GGUF reads it.
ORIGINAL_SHAPE_KEY = "comfy.gguf.orig_shape."
_ARCHITECTURE = "general.architecture"
# GGML_QNT_VERSION, the only one there is for the types of today
_QUANTIZATION_VERSION = 2

KeyValues = dict[str, tuple[str, Any]]
"""Key -> (type, value), as `write_gguf` takes them."""


def general_keys(architecture: str, file_type: int | None = None) -> KeyValues:
    """Return the key-values that every published model has.

    Args:
        architecture: of the model, such as "flux" or "t5encoder".
        file_type: llama.cpp's number of the type that most matrices have, None where there is none.
    """
    keys: KeyValues = {
        _ARCHITECTURE: ("STRING", architecture),
        "general.quantization_version": ("UINT32", _QUANTIZATION_VERSION),
    }
    return keys if file_type is None else {**keys, "general.file_type": ("UINT32", file_type)}


def architecture_of(metadata: Mapping[str, Any]) -> str | None:
    """Return the architecture that a file states; None where it states none, or no text."""
    stated = metadata.get(_ARCHITECTURE)
    return stated if isinstance(stated, str) else None


def file_title(path: str, metadata: Mapping[str, Any] | None = None) -> str:
    """Return what a file calls itself: its name, and the name that its key-values state.

    Of a folder's file that has the name which diffusers gives to all, the names of the two folders that hold it.
    """
    *folders, name = path.replace("\\", "/").split("/")[-3:]
    stated = (metadata or {}).get("general.name")
    own = " ".join(folders) if name.startswith("diffusion_pytorch_model") else name
    return f"{own} {stated}" if isinstance(stated, str) else own


def written_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape in which a tensor is written, its first dimensions as one where it has too many.

    stable-diffusion.cpp stores the weight of a 3-D convolution so, and ComfyUI-GGUF reads the shape that a key-value gives it.
    """
    merged = len(shape) - MAX_WRITTEN_DIMS + 1
    return shape if merged <= 1 else (prod(shape[:merged]), *shape[merged:])


def as_written(tensor: Tensor) -> Tensor:
    """Return a tensor (packed rows or plain) in the shape in which it is written."""
    return tensor if tensor.dim() <= MAX_WRITTEN_DIMS else tensor.flatten(0, tensor.dim() - MAX_WRITTEN_DIMS)


def original_shape_keys(shapes: Mapping[str, tuple[int, ...]]) -> KeyValues:
    """Return the key-values that give the shapes of the tensors that are written in another."""
    reshaped = {name: shape for name, shape in shapes.items() if written_shape(shape) != shape}
    return {ORIGINAL_SHAPE_KEY + name: ("ARRAY[INT32]", list(shape)) for name, shape in reshaped.items()}
