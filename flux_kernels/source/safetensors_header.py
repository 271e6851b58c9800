"""Read the header of a safetensors file: names, types, shapes and offsets. No weight is touched.

The safetensors package maps a file as a whole; the rows are read one by one here (see stored_tensor.py).

Source: the safetensors format: 8 bytes little-endian length of the header, the header as JSON, the data.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from math import prod
from typing import Any

from ..errors import GGUFError
from ..gguf.spec import shown, shown_path
from .stored_tensor import FLOATS, FP8, StoredTensor

# Bytes; the limit of the safetensors package.
_MOST_HEADER = 10**8
_SCALES = (".scale_weight", ".weight_scale", ".weight_scale_inv")
# Written next to fp8 weights for kernels that compute in fp8, no weights themselves.
_FP8_EXTRAS = (".scale_input", ".input_scale", ".scale_output", ".output_scale", ".comfy_quant", "scaled_fp8")


def read_safetensors(path: str) -> dict[str, StoredTensor]:
    """List the tensors of a safetensors file by name, in file order.

    Raises:
        GGUFError: where the file is not safetensors, or cut short.
        OSError: where it cannot be read.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MOST_HEADER, size - 8):
            raise _no_safetensors(path, "its first 8 bytes are no length of a header; it may be cut short")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise _no_safetensors(path, f"its header is no JSON ({error})") from None
    if not isinstance(header, dict):
        raise _no_safetensors(path, "its header is no JSON object")
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    tensors = [_tensor(path, name, entry, 8 + length, size) for name, entry in entries.items()]
    return {tensor.name: tensor for tensor in sorted(tensors, key=lambda tensor: tensor.offset)}


def join_scales(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Make the scales of fp8 weights part of the weights, and leave out what only fp8 kernels use."""
    if not any(tensor.type in FP8 for tensor in tensors.values()):
        return tensors
    joined = dict(tensors)
    for name, tensor in tensors.items():
        suffix = next((suffix for suffix in _SCALES if name.endswith(suffix)), None)
        weight = f"{name.removesuffix(suffix)}.weight" if suffix else ""
        if weight in tensors and tensors[weight].type in FP8:
            joined[weight] = replace(tensors[weight], scale=tensor)
        elif not name.endswith(_FP8_EXTRAS) and suffix is None:
            continue
        del joined[name]
    return joined


def _tensor(path: str, name: str, entry: Any, start: int, size: int) -> StoredTensor:
    try:
        kind, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(isinstance(number, int) and number >= 0 for number in (*shape, first, last))
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        raise _no_safetensors(path, f"the header's entry of {shown(name)} is not dtype, shape and data_offsets")
    if start + last > size:
        raise _no_safetensors(path, f"{shown(name)} ends at byte {start + last}, the file has {size}")
    if kind in FLOATS and prod(shape) * FLOATS[kind].itemsize != last - first:
        raise _no_safetensors(path, f"{shown(name)} is {kind} {list(shape)}, but takes {last - first} bytes")
    return StoredTensor(name, path, start + first, kind, shape)


def _no_safetensors(path: str, why: str) -> GGUFError:
    return GGUFError(f"{shown_path(path)}: no whole safetensors file: {why}. Get it again, or give a GGUF file.")
