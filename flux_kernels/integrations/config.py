"""FluxKernelsConfig: what diffusers knows about packed layers.

from_pretrained and from_single_file take it, save_pretrained writes it.
"""

from __future__ import annotations

import copy
import json
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from ..backends import ACTIVATION_DTYPES, check_names
from ..compute import dtype_name
from ..errors import FormatError
from ..files import write_whole
from ..formats import get_format
from ..swap.request import first_match, mode_asked_for, names_in
from .layer_table import describe

_DEFAULTS: dict[str, Any] = {
    "format": None,
    "compute": "exact",
    "backend": "auto",
    "modules_to_not_convert": None,
    "dtype": None,
    "extra_parameters": None,
}


class Method(str, Enum):
    """Name the quantization method, as diffusers wants it: a member of a str Enum."""

    FLUX_KERNELS = "flux_kernels"


class FluxKernelsConfig(QuantizationConfigMixin):
    """Tell diffusers which linear layers are packed, in which type, and how they compute.

    Pass it as `quantization_config` to quantize a 16-bit model while it loads, or to keep the packed layers of a GGUF file.
    A model that was saved with packed layers needs none: its config.json holds one. The config of a loaded model describes
    the model as it is now.
    """

    def __init__(
        self,
        format: str | Mapping[str, str] | None = None,
        *,
        compute: str | Mapping[str, str] = "exact",
        backend: str | Mapping[str, str] = "auto",
        modules_to_not_convert: str | Sequence[str] | None = None,
        dtype: str | torch.dtype | None = None,
        extra_parameters: Mapping[str, Sequence] | None = None,
    ):
        """Check and hold the arguments.

        Args:
            format: type of the layers, such as "Q4_K", or a map of fnmatch pattern -> type, of which the first match counts.
                Layers whose rows are no whole blocks of it stay as they are. None for GGUF files, whose layers have types.
            compute: "exact", "fp16_accumulate" or "int8", or a map of fnmatch pattern -> mode, as in `swap_linear`.
            backend: "auto", "triton" or "torch", or a map of fnmatch pattern -> backend.
            modules_to_not_convert: names of modules to leave in `torch_dtype`, or fnmatch patterns. As elsewhere in diffusers
                a name stands for every module whose name ends in it and for all that is inside.
            dtype: to load the model in where from_pretrained is given no `torch_dtype`.
            extra_parameters: written by save_pretrained: parameters of packed layers other than rows and bias.

        Raises:
            FormatError: for an unknown type or dtype.
            BackendUnavailable: for an unknown backend or compute mode.
            TypeError: for arguments of another kind.
        """
        self.quant_method = Method.FLUX_KERNELS  # type: ignore[assignment]
        self.format = _checked_map(format, "format", get_format) if format is not None else None
        self.compute = _checked_map(compute, "compute", lambda mode: check_names("auto", mode))
        self.backend = _checked_map(backend, "backend", check_names)
        single = isinstance(modules_to_not_convert, str)
        self.modules_to_not_convert = [modules_to_not_convert] if single else list(modules_to_not_convert or []) or None
        self.dtype = None if dtype is None else _checked_dtype_name(dtype)
        self.extra_parameters = {name: list(shape) for name, shape in (extra_parameters or {}).items()} or None
        self._model: weakref.ref | None = None

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs):
        """Make a config of what `to_dict` returned, as config.json holds it."""
        values = {**config_dict, **{key: kwargs.pop(key) for key in [*kwargs] if key in _DEFAULTS}}
        values.pop("quant_method", None)
        unknown = sorted(set(values) - set(_DEFAULTS))
        if unknown:
            raise FormatError(
                f"The quantization_config has {', '.join(unknown)}, which this version of flux_kernels does not know: the model "
                "was saved by a newer one. Install that."
            )
        config = cls(**values)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Return all fields that are set, JSON-safe; of a loaded model, as it is now."""
        self.refresh()
        fields = {name: getattr(self, name) for name in _DEFAULTS if getattr(self, name) is not None}
        copies = {name: dict(value) if isinstance(value, dict) else value for name, value in fields.items()}
        return {"quant_method": self.quant_method.value, **copies}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the fields that differ from the defaults, and the method."""
        return {key: value for key, value in self.to_dict().items() if key not in _DEFAULTS or value != _DEFAULTS[key]}

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return the fields as JSON, patterns in their order.

        The first pattern that matches counts, and diffusers' own writer sorts them.
        """
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write all fields as JSON, patterns in their order. Raises OSError where the file cannot be written."""
        write_whole(json_file_path, self.to_json_string(use_diff=False).encode())

    @property
    def model(self) -> nn.Module | None:
        """The model that this describes, where there is one."""
        return None if self._model is None else self._model()

    def follow(self, model: nn.Module) -> None:
        """Describe this model from now on, as it changes, without keeping it alive."""
        self._model = weakref.ref(model)
        # The map of formats says it.
        self.modules_to_not_convert = None

    def refresh(self) -> None:
        """Take over what the model is now; without one, leave the fields as they are."""
        if (model := self.model) is not None:
            self.__dict__.update(describe(model))

    def format_of(self, name: str) -> str | None:
        """Return the type for a layer, exclusions left aside, or None."""
        return first_match(self.format, [name], None)

    def compute_of(self, name: str) -> str:
        """Return the compute mode for a layer."""
        return mode_asked_for(self.compute, [name])

    def backend_of(self, name: str) -> str:
        """Return the backend for a layer."""
        return first_match(self.backend, [name], "auto")

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype to load in where none is asked for."""
        return None if self.dtype is None else getattr(torch, self.dtype)

    def __deepcopy__(self, memo: dict) -> FluxKernelsConfig:
        """Copy; where the model is being copied, describe the copy of the model."""
        new = object.__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        clone = memo.get(id(self.model))
        if self.model is not None and clone is not None:
            new._model = weakref.ref(clone)
        return new

    def __getstate__(self) -> dict[str, Any]:
        """Leave the model behind in pickles and in copies of the config alone.

        They describe it as it was when they were made.
        """
        self.refresh()
        return {**self.__dict__, "_model": None}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FluxKernelsConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Yield what `dict(config)` holds."""
        return iter(self.to_dict().items())


def _checked_map(value: Any, what: str, check) -> Any:
    """Return a name, or a copy of a map of pattern -> name, of which each passed `check`."""
    for name in names_in(value, what):
        check(name)
    return dict(value) if isinstance(value, Mapping) else value


def _checked_dtype_name(dtype: str | torch.dtype) -> str:
    wanted = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if wanted not in ACTIVATION_DTYPES:
        legal = ", ".join(dtype_name(legal) for legal in ACTIVATION_DTYPES)
        raise FormatError(f"dtype must be one of {legal}, got {dtype!r}.")
    return dtype_name(wanted)
