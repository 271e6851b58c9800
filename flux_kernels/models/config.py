"""Infer the config of a model class from a file's tensors: no hub, no network, any width."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import GGUFError
from ..gguf.spec import shown
from .architecture import Architecture
from .model_class import config_names
from .stored_shapes import Shapes

# JSON of the config, in files that save_gguf wrote.
CONFIG_KEY = "flux_kernels.config"


def infer_config(
    architecture: Architecture,
    shapes: Shapes,
    naming: str,
    metadata: Mapping[str, Any] | None = None,
    config: object | None = None,
) -> dict[str, Any]:
    """Infer the arguments of a model class from tensor shapes.

    What no tensor shows, such as the split of a head into rotary axes, is the value of `config`, else that which `save_gguf`
    left in the file, else the architecture's default.

    Args:
        architecture: the row, whose `read_config` reads what the tensors show.
        shapes: tensor name without prefix -> shape in torch order.
        naming: one of the architecture's.
        metadata: the file's key-values.
        config: what overrides the inferred values: a mapping, a model with a `config`, or the path of a config.json or of
            a directory that holds one.

    Raises:
        GGUFError: where a tensor that the config is read from is missing or cannot be that architecture's.
    """
    inferred = architecture.read_config(architecture.stored(shapes, naming))
    inferred |= _written(architecture, metadata or {}, inferred)
    inferred |= _override(architecture, config)
    for name, default in architecture.untold.items():
        if inferred.get(name) is None:
            inferred[name] = _usual(architecture, inferred, default)
        else:
            _check_untold(name, inferred[name], default)
    # A config from JSON has lists where model classes take tuples.
    return {name: tuple(value) if isinstance(value, list) else value for name, value in inferred.items()}


def _written(architecture: Architecture, metadata: Mapping[str, Any], inferred: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `save_gguf` left in the file of the values that no tensor shows."""
    text = metadata.get(CONFIG_KEY)
    if text is None:
        return {}
    wanted = " and ".join(architecture.untold)
    try:
        held = json.loads(text)
        values = {name: held[name] for name in architecture.untold}
    except (TypeError, ValueError, KeyError, RecursionError) as error:
        raise GGUFError(f"The key {CONFIG_KEY!r} holds no JSON with {wanted}. Remove the key from the file.") from error
    for name, value in values.items():
        if name in _ROPE and (not isinstance(value, list) or not all(isinstance(axis, int) for axis in value)):
            raise GGUFError(f"{name} in the key {CONFIG_KEY!r} is no list of integers. Remove the key from the file.")
        _check_untold(name, value, architecture.untold[name], f" in the key {CONFIG_KEY!r}")
    return {name: value for name, value in values.items() if name not in _ROPE or sum(value) == _head_dim(inferred)}


# The arguments that split a head into rotary axes.
_ROPE = ("axes_dims_rope", "axes_dims")


def _head_dim(inferred: Mapping[str, Any]) -> int:
    return inferred["attention_head_dim"] if "attention_head_dim" in inferred else inferred["dim"] // inferred["n_heads"]


# Above any model's: wrong by far, or made to take all memory.
_MOST = 2**16


def _usual(architecture: Architecture, inferred: Mapping[str, Any], default: Any) -> Any:
    """Return the default of a value that no tensor shows."""
    try:
        return default(inferred) if callable(default) else default
    except (TypeError, ZeroDivisionError) as error:
        raise GGUFError(f"The config given for {architecture.name} does not hold together ({error}).") from None


def _check_untold(name: str, value: Any, default: Any, where: str = "") -> None:
    """Raise GGUFError where a value that no tensor shows is none that a model can have."""
    if name in _ROPE:
        legal = "positive even numbers"
        right = (
            isinstance(value, list | tuple) and 0 < len(value) < 8 and all(_is_size(axis) and axis % 2 == 0 for axis in value)
        )
    elif isinstance(default, bool):
        legal, right = "true or false", isinstance(value, bool)
    elif isinstance(default, float):
        legal = "a positive number"
        right = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9
    elif isinstance(default, tuple | list):
        legal = f"{len(default)} positive integers up to {_MOST}"
        right = isinstance(value, list | tuple) and len(value) == len(default) and all(map(_is_size, value))
    elif isinstance(default, str):
        legal, right = repr(default), value == default
    else:
        legal, right = f"a positive integer up to {_MOST}", _is_size(value)
    if not right:
        raise GGUFError(f"{name}{where} is {shown(str(value))}; legal are {legal}, as in the models that were published.")


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MOST


def _override(architecture: Architecture, config: object | None) -> dict[str, Any]:
    """Read what the user passed as `config` into the arguments it names."""
    if config is None:
        return {}
    if isinstance(config, str | Path):
        config = _read_config(Path(config))
    values = config if isinstance(config, Mapping) else getattr(config, "config", None)
    if not isinstance(values, Mapping):
        raise TypeError(f"config is a mapping, a model, or a path to config.json, got {type(config).__name__}.")
    known = config_names(architecture)
    # A model saved with packed layers describes them there; the file has its own.
    ignored = ("_", "quantization_config")
    unknown = [name for name in values if not name.startswith(ignored) and name not in known]
    if unknown:
        raise GGUFError(f"{architecture.model_class} has no config value {unknown[0]!r}. Known: {', '.join(known)}.")
    return {name: value for name, value in values.items() if name in known}


def _read_config(path: Path) -> Any:
    candidates = [path / "config.json", path / "transformer" / "config.json"] if path.is_dir() else [path]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise GGUFError(f"No config.json at {path}. Pass the file, or a directory that holds it (or transformer/config.json).")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GGUFError(f"{file} is no JSON ({error}). Get it again, or leave config out.") from None
