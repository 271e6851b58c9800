"""The model class of an architecture: diffusers' own, built empty."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from ..errors import GGUFError
from .architecture import Architecture
from .architectures import ARCHITECTURES

# What a class of diffusers raises for a config that does not hold together.
_REFUSALS = (TypeError, ValueError, AssertionError, RuntimeError, IndexError, ZeroDivisionError, OverflowError)


def model_class(architecture: Architecture) -> Any:
    """Return diffusers' class of an architecture.

    Raises:
        GGUFError: where the installed diffusers has none.
    """
    import diffusers

    try:
        return getattr(diffusers, architecture.model_class)
    except AttributeError:
        raise GGUFError(
            f"This is {architecture.name}, for which diffusers {diffusers.__version__} has no {architecture.model_class}. "
            "Update diffusers."
        ) from None


def architecture_of_model(model: object) -> Architecture | None:
    """Return the architecture whose class and config a model has, or None."""
    known = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not isinstance(known, Mapping):
        return None
    classes = {cls.__name__ for cls in type(model).__mro__}
    fits = [row for row in ARCHITECTURES if known.keys() >= {*config_names(row)}]
    # What is wrapped around a model, by torch.compile for example, has its config and another class. A relative with blocks of
    # its own has more in its config.
    arguments = {name for name in known if not name.startswith("_") and name != "quantization_config"}
    whole = (row for row in fits if arguments == {*config_names(row)})
    return next((row for row in fits if row.model_class in classes), next(whole, None))


@cache
def config_names(architecture: Architecture) -> tuple[str, ...]:
    """Name the arguments of an architecture's model class."""
    return tuple(name for name in inspect.signature(model_class(architecture).__init__).parameters if name != "self")


def empty_model(architecture: Architecture, config: Mapping[str, Any]) -> Any:
    """Build a model on the meta device: its names and shapes, for any config, without memory."""
    with torch.device("meta"):
        return _built(architecture, config)


def unfilled_model(architecture: Architecture, config: Mapping[str, Any]) -> Any:
    """Build a model whose parameters are on the meta device.

    All else is computed, such as tables of frequencies.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return _built(architecture, config)


def _built(architecture: Architecture, config: Mapping[str, Any]) -> Any:
    known = model_class(architecture)
    try:
        return known(**config)
    except _REFUSALS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise GGUFError(
            f"{architecture.model_class} cannot be built with this config: {reason}. It is damaged, or wrongly given."
        ) from error


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return name and shape of all in a model's state dict: parameters, and buffers that are saved."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
