"""The arguments of a transformer's call as what a file can keep, and back.

Tensors keep their names; the tensors of a list get a number each ("x.0"). Numbers, text and lists of them are kept as JSON.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FormatError

# They say how the call answers, not what it computes.
_IGNORED = ("return_dict",)


def call_inputs(
    model: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the other arguments of a call, by the names of the model's forward.

    Raises:
        FormatError: for an argument that is neither tensors nor JSON.
    """
    given = inspect.signature(model.forward).bind(*arguments, **named).arguments
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for name, value in given.items():
        if name in _IGNORED or value is None or (isinstance(value, dict) and not value):
            continue
        if isinstance(value, Tensor):
            tensors[name] = clone(value)
        elif isinstance(value, list) and value and all(isinstance(part, Tensor) for part in value):
            tensors |= {f"{name}.{number}": clone(part) for number, part in enumerate(value)}
        else:
            others[name] = _as_json(name, value)
    return tensors, others


def as_arguments(tensors: Mapping[str, Tensor], others: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of a call from what was kept of it."""
    arguments: dict[str, Any] = {}
    for name, tensor in tensors.items():
        stem, dot, number = name.partition(".")
        if dot and number.isascii() and number.isdecimal():
            arguments.setdefault(stem, []).append(tensor)
        else:
            arguments[name] = tensor
    return {**arguments, **others}


def velocity_of(output: Any) -> Tensor:
    """Return what a transformer gave as one tensor, the batch first."""
    given = output[0]
    return torch.stack(given) if isinstance(given, list) else given


def _as_json(name: str, value: Any) -> Any:
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        raise FormatError(
            f"The pipeline gives its transformer {name!r} as a {type(value).__name__}, which cannot be kept."
        ) from None


def clone(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU that is no inference tensor."""
    with torch.inference_mode(False):
        return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach().to("cpu", copy=True))
