"""Packed layers as a checkpoint holds them: rows in the order of GGUF files, and a descriptor."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from ..errors import GGUFError
from ..formats import FORMATS, BlockFormat, types_by_number
from ..layers.linear import GGUFLinear

_ROWS, _DESCRIPTOR = ".qweight", ".weight"


def expected_descriptor(layer: GGUFLinear) -> list[int]:
    """Return what a checkpoint says of this layer: [ggml type, N, K, 0 for rows in file order]."""
    return [FORMATS[layer.format].ggml_type, layer.out_features, layer.in_features, 0]


def in_file_order(state_dict: dict[str, Any], format_of: Callable[[str], str | None], extra: Collection[str]) -> dict[str, Any]:
    """Return the state dict of a packed model with all rows as a GGUF file has them.

    Rows that are stored otherwise are on the CPU afterwards.

    Args:
        state_dict: of the whole model.
        format_of: layer name -> type that config.json names.
        extra: parameters of packed layers other than rows and bias that config.json names.

    Raises:
        ValueError: where the state dict cannot be a checkpoint, with the reason and what to do.
    """
    result, types = dict(state_dict), types_by_number()
    for key, rows in state_dict.items():
        if ".base_layer." in key:
            raise ValueError(f"{key} is under an adapter. Call pipe.unload_lora_weights(), then save the model.")
        if isinstance(rows, Tensor) and rows.is_meta:
            raise ValueError(
                f"{key} is on the meta device (offloaded, or never loaded). Save the model before offload is enabled."
            )
        if not key.endswith(_ROWS) or key.removesuffix(_ROWS) + _DESCRIPTOR not in state_dict:
            continue
        name = key.removesuffix(_ROWS)
        number, n, k, planes = state_dict[name + _DESCRIPTOR].tolist()
        row = types[number]
        own = {name + part for part in (_ROWS, _DESCRIPTOR, ".bias")}
        others = {key for key in state_dict if key.rpartition(".")[0] == name and key not in own}
        if format_of(name) != row.name or not others <= set(extra):
            raise ValueError(
                f"{name} was changed after the model was unpickled, and config.json would not say so. Call "
                "flux_kernels.swap_linear(model), then save it."
            )
        if planes and isinstance(row, BlockFormat):
            result[key] = row.layout.from_planes(rows.detach().cpu())
            result[name + _DESCRIPTOR] = torch.tensor([number, n, k, 0])
    return result


def holds_rows(state_dict: dict[str, Any]) -> bool:
    """Tell whether a state dict was written from packed layers."""
    return any(key.endswith(_ROWS) for key in state_dict)


def without_descriptors(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict without descriptors, which are no parameters.

    Offloading to the disk would look for a place for each.

    Raises:
        GGUFError: where one does not belong to its rows.
    """
    left_out, types = set(), types_by_number()
    for key, rows in state_dict.items():
        name = key.removesuffix(_ROWS)
        descriptor = state_dict.get(name + _DESCRIPTOR)
        if not key.endswith(_ROWS) or descriptor is None:
            continue
        number, n, k, _ = descriptor.tolist()
        row = types.get(number)
        if not isinstance(row, BlockFormat) or rows.shape != (n, row.row_bytes(k)):
            raise GGUFError(
                f"{name} is described as [ggml type, N, K, planes] {descriptor.tolist()}, its rows are {list(rows.shape)} bytes. "
                "The checkpoint is damaged, or was written by a newer flux_kernels."
            )
        left_out.add(name + _DESCRIPTOR)
    return {key: value for key, value in state_dict.items() if key not in left_out}
