"""Describe the packed layers of a model as data that fits into a config.json, short enough to be read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import nn

from ..compute import compute_of_layer, dtype_name
from ..layers.adapters import has_adapter, without_adapters
from ..layers.linear import GGUFLinear
from ..swap.request import first_match

# A component of a dotted name that is a number.
_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")
_OWN_PARAMETERS = ("qweight", "bias")


def describe(model: nn.Module) -> dict[str, Any]:
    """Return the arguments of a FluxKernelsConfig that loads a model's packed layers as they are."""
    named = model.named_modules(remove_duplicate=False)
    linears = {without_adapters(name): module for name, module in named if isinstance(module, nn.Linear)}
    packed = {name: module for name, module in linears.items() if isinstance(module, GGUFLinear)}
    computes = {name: module.compute for name, module in packed.items()}
    backends = {name: module.backend for name, module in packed.items()}
    return {
        "format": by_pattern({name: packed[name].format if name in packed else None for name in linears}, None),
        "compute": _one_mode(computes) or by_pattern(computes, "exact"),
        "backend": by_pattern(backends, "auto") if len({*backends.values()}) > 1 else min(backends.values(), default="auto"),
        "dtype": dtype_of(model, packed),
        "extra_parameters": extra_parameters(packed) or None,
    }


def check_writable(model: nn.Module) -> None:
    """Raise ValueError where no checkpoint of a model's class can hold its state.

    Such are adapters and fused projections.
    """
    for name, module in model.named_modules():
        if has_adapter(module):
            raise ValueError(
                f"{name} has an adapter, which save_pretrained does not write. Save it with pipe.save_lora_weights or "
                "model.save_lora_adapter, call pipe.unload_lora_weights(), then save the model."
            )
        if isinstance(module, GGUFLinear) and type(module) is not GGUFLinear:
            raise ValueError(
                f"{name} is a {type(module).__name__}, and a checkpoint has every layer on its own. Undo the fusion first, with "
                "model.unfuse_qkv_projections() or flux_kernels.unfuse_projections(model)."
            )


def by_pattern(values: Mapping[str, str | None], default: str | None) -> dict[str, str]:
    """Return a short map of fnmatch pattern -> value that gives every name its value.

    It does so in any order of its entries.

    Args:
        values: layer name -> value; `default` is what a layer has that no pattern matches.
    """
    groups: dict[str, set[str | None]] = {}
    for name, value in values.items():
        groups.setdefault(_NUMBER.sub("*", name), set()).add(value)
    short: dict[str, str] = {}
    for name, value in values.items():
        pattern = _NUMBER.sub("*", name)
        if value is not None and value != default:
            short[pattern if len(groups[pattern]) == 1 else name] = value
    # As config.json has it.
    short = dict(sorted(short.items()))
    right = all(first_match(short, [name], default) == value for name, value in values.items())
    return short if right else {name: value for name, value in sorted(values.items()) if value is not None and value != default}


def _one_mode(computes: Mapping[str, str]) -> str | None:
    """Return the mode that gives every layer its mode when it is set for the whole model, or None."""
    for mode in {"exact", *computes.values()}:
        if all(compute == compute_of_layer(mode, [name]) for name, compute in computes.items()):
            return mode
    return None


def dtype_of(model: nn.Module, packed: Mapping[str, GGUFLinear]) -> str:
    """Name the dtype to load a model in so that no plain parameter loses bits.

    Modules that diffusers keeps in float32 do not count.
    """
    apart = getattr(model, "_keep_in_fp32_modules", None) or ()
    plain = {
        parameter.dtype
        for name, parameter in model.named_parameters()
        if parameter.dtype in (torch.float16, torch.bfloat16, torch.float32) and not set(name.split(".")) & set(apart)
    }
    dtypes = plain or {module.compute_dtype for module in packed.values()} or {torch.float32}
    return dtype_name(reduce(torch.promote_types, dtypes))


def extra_parameters(packed: Mapping[str, GGUFLinear]) -> dict[str, list]:
    """Return parameter name -> [dtype, *shape] of what packed layers hold other than rows and bias."""
    return {
        f"{name}.{kind}": [dtype_name(parameter.dtype), *parameter.shape]
        for name, module in packed.items()
        for kind, parameter in module.named_parameters(recurse=False)
        if kind not in _OWN_PARAMETERS
    }
