"""Packed layers as a checkpoint holds them: rows in the order of GGUF files, and a descriptor beside them that says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..formats import FORMATS
from ..linear import GGUFLinear

_ROWS, _DESCRIPTOR = ".qweight", ".weight"
_ROWS_BY_NUMBER = {row.ggml_type: row for row in FORMATS.values()}


def expected_descriptor(layer: GGUFLinear) -> list[int]:
    """Return what a checkpoint says of this layer: [ggml type, N, K, 0 for rows in file order]."""
    return [FORMATS[layer.format].ggml_type, layer.out_features, layer.in_features, 0]


def in_file_order(state_dict: dict[str, Any], format_of: Callable[[str], str | None]) -> dict[str, Any]:
    """Return the state dict of a packed model with all rows as a GGUF file has them; others are on the CPU afterwards.

    Args:
        state_dict: of the whole model.
        format_of: layer name -> type that config.json will tell.

    Raises:
        ValueError: where the state dict cannot be a checkpoint, with the reason and what to do.
    """
    result = dict(state_dict)
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
        row = _ROWS_BY_NUMBER[number]
        if format_of(name) != row.name:
            raise ValueError(
                f"{name} is packed {row.name} and was {format_of(name)} when this copy of the model was made. Call "
                "flux_kernels.swap_linear(model), then save it."
            )
        if planes:
            result[key] = row.layout.from_planes(rows.detach().cpu())
            result[name + _DESCRIPTOR] = torch.tensor([number, n, k, 0])
    return result
