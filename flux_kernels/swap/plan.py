"""Decide what swap_linear does with each linear layer, and check that it can, before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ..backends import check_runnable
from ..compute import compute_of_layer, dtype_name
from ..errors import FormatError
from ..formats import BlockFormat, get_format
from ..layers.fused_linear import FusedLinear, FusedPart
from ..layers.linear import GGUFLinear
from ..layers.takeover import carry_over, is_diffusers_gguf, packed_type, quantize_layer, take_over, unpack_plain
from .report import SwapRow

Places = list[tuple[nn.Module, str]]


@dataclass
class Step:
    """Hold what is to happen to one layer, decided before anything happens."""

    row: SwapRow
    names: list[str]
    places: Places
    old: Any
    make: Callable[[], nn.Module] | None = None

    def forget(self) -> None:
        """Let go of the old layer, so that its memory is free before the next one is made."""
        self.old = self.make = None


@dataclass(frozen=True)
class Request:
    """Hold the arguments of swap_linear."""

    backend: str
    compute: str | Mapping[str, str]
    format: str | Mapping[str, str] | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]

    def format_of(self, names: list[str]) -> str | None:
        """Return the type to quantize a layer of these names to, or None."""
        return first_match(self.format, names, None)

    def compute_of(self, names: list[str]) -> str:
        """Return the compute mode of a layer of these names; one mode for a whole model spares WEIGHT_ONLY_LAYERS."""
        if isinstance(self.compute, str):
            return compute_of_layer(self.compute, names)
        return first_match(self.compute, names, "exact")

    def refusal(self, names: list[str]) -> str | None:
        """Return why the patterns leave a layer of these names out, or None."""
        if not any(matches(names, pattern) for pattern in self.include):
            return "not in include="
        matched = [pattern for pattern in self.exclude if matches(names, pattern)]
        return f'exclude="{matched[0]}"' if matched else None

    def patterns(self) -> list[str]:
        """List all patterns the user wrote."""
        maps = [key for value in (self.format, self.compute) if isinstance(value, Mapping) for key in value]
        return [*self.include, *self.exclude, *maps]


def linear_layers(model: nn.Module) -> Iterator[tuple[list[str], nn.Linear, Places, bool]]:
    """Yield every linear layer once: its names (and its fused parts'), itself, all places that hold it, whether it is an adapter's."""
    adapters = _adapter_modules(model)
    found: dict[int, tuple[list[str], nn.Linear, Places]] = {}
    parts: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, FusedPart):  # goes with the layer that holds its rows
            parts.setdefault(id(module.whole), []).append(path.replace(".base_layer", ""))
        elif isinstance(module, nn.Linear):
            names, _, places = found.setdefault(id(module), ([], module, []))
            names.append(path.replace(".base_layer", ""))
            prefix, _, attribute = path.rpartition(".")
            places.append((model.get_submodule(prefix), attribute))
    for names, module, places in found.values():
        yield names + parts.get(id(module), []), module, places, id(module) in adapters


def _adapter_modules(model: nn.Module) -> set[int]:
    """Return the ids of modules that belong to an adapter: all that peft's layers hold beside their base layer."""
    owners = [module for module in model.modules() if "base_layer" in module._modules]
    parts = [part for owner in owners for key, part in owner._modules.items() if key != "base_layer" and part is not None]
    return {id(module) for part in parts for module in part.modules()}


def plan_layer(names: list[str], module: nn.Linear, places: Places, adapter: bool, request: Request) -> Step:
    """Decide what happens to one layer and check that it can; nothing is changed."""
    step = Step(_describe(names[0], module), names, places, module)
    reason = request.refusal(names) or ("weights of an adapter" if adapter else _foreign(module, places))
    if reason is not None:
        step.row = replace(step.row, detail=reason)
        return step
    if isinstance(module, GGUFLinear):
        return _plan_update(step, module, request)
    if is_diffusers_gguf(module):
        return _plan_take_over(step, module, request)
    return _plan_quantize(step, module, request)


def _describe(name: str, module: nn.Linear) -> SwapRow:
    """Describe a layer as it is now."""
    weight = module.qweight if isinstance(module, GGUFLinear) else module.weight
    if isinstance(module, GGUFLinear):
        format = module.format
    else:
        format = packed_type(weight, name).name if hasattr(weight, "quant_type") else dtype_name(weight.dtype)
    shape = (module.out_features, module.in_features)
    return SwapRow(name, "skipped", "", format, shape, weight.numel() * weight.element_size())


def _foreign(module: nn.Linear, places: Places) -> str | None:
    """Return why a layer of somebody else is left alone, or None."""
    if not (isinstance(module, GGUFLinear) or is_diffusers_gguf(module) or type(module) is nn.Linear):
        return f"a {type(module).__module__}.{type(module).__name__}, not a plain nn.Linear"
    if "weight" not in module._parameters and not isinstance(module, GGUFLinear):
        return "its weight is computed (weight_norm, pruning)"
    merged = any(attribute == "base_layer" and getattr(parent, "merged", False) for parent, attribute in places)
    if merged and not isinstance(module, GGUFLinear):  # a packed layer keeps merged adapters in its branch
        return "an adapter is merged into it"
    return None


def _mode_of_packed(names: list[str], module: GGUFLinear, request: Request) -> str:
    """Return the mode asked for; a fused layer, whose parts' names come last, is exact where its parts would differ."""
    if not isinstance(module, FusedLinear):
        return request.compute_of(names)
    count = len(module.parts)
    modes = {request.compute_of([*names[:-count], part]) for part in names[-count:]}
    return modes.pop() if len(modes) == 1 else "exact"


def _plan_update(step: Step, module: GGUFLinear, request: Request) -> Step:
    compute = _mode_of_packed(step.names, module, request)
    check_runnable(request.backend, compute, module.qweight.device, get_format(module.format), module.in_features)

    def make() -> nn.Module:
        module.backend, module.compute = request.backend, compute
        return module.arrange()

    step.row = replace(
        step.row,
        was_compute=module.compute if compute == "exact" != module.compute else "",
        was_backend=module.backend if request.backend == "auto" != module.backend else "",
    )
    return _swapped(step, make, "already packed", request, compute)


def _plan_take_over(step: Step, module: nn.Linear, request: Request) -> Step:
    name = step.row.name
    _check_untouched(name, module)
    if not hasattr(module.weight, "quant_type"):
        step.row = replace(step.row, detail="diffusers holds its weight unpacked")
        return step
    row = packed_type(module.weight, name)
    if not isinstance(row, BlockFormat):
        step.row = replace(step.row, detail=f"{row.name} is not a block type: now a plain nn.Linear")
        step.make = lambda: carry_over(module, unpack_plain(module))
        return step
    compute = request.compute_of(step.names)
    check_runnable(request.backend, compute, module.weight.device, row, module.in_features)
    row.row_bytes(module.in_features, name)
    return _swapped(step, lambda: take_over(module, request.backend, compute).arrange(), "taken over", request, compute)


def _plan_quantize(step: Step, module: nn.Linear, request: Request) -> Step:
    name = step.row.name
    format = request.format_of(step.names)
    if format is None:
        reason = "no pattern of format= matches" if request.format else "not quantized; format= would quantize it"
        step.row = replace(step.row, detail=reason)
        return step
    _check_untouched(name, module)
    fmt, weight, compute = get_format(format), module.weight, request.compute_of(step.names)
    size = fmt.row_bytes(module.in_features, name) * module.out_features
    check_runnable(request.backend, compute, weight.device, fmt, module.in_features)
    if weight.device.type != "meta" and not torch.isfinite(weight).all():
        raise FormatError(f'{name} holds NaN or infinity and cannot be quantized. Leave it out with exclude="{name}".')
    step.row = replace(step.row, format=fmt.name, bytes=size)
    return _swapped(
        step, lambda: quantize_layer(module, format, request.backend, compute).arrange(), "quantized", request, compute
    )


def _swapped(step: Step, make: Callable[[], nn.Module], detail: str, request: Request, compute: str) -> Step:
    old = step.old
    step.make = lambda: make() if isinstance(old, GGUFLinear) else carry_over(old, make())
    asked = request.format_of(step.names)
    unmet = "" if asked is None or get_format(asked).name == step.row.format else get_format(asked).name
    step.row = replace(step.row, action="swapped", detail=detail, backend=request.backend, compute=compute, unmet=unmet)
    return step


def _check_untouched(name: str, module: nn.Linear) -> None:
    """Raise ValueError where offloading or casting hooks already own the layer's weight."""
    offloaded = hasattr(module, "_hf_hook") and any(parameter.device.type == "meta" for parameter in module.parameters())
    if offloaded or hasattr(module, "_diffusers_hook"):
        raise ValueError(
            f"{name} is under offloading or casting hooks. Call swap_linear first, then enable offloading or layerwise casting."
        )


def matches(names: list[str], pattern: str) -> bool:
    """Tell whether an fnmatch pattern matches one of a layer's names."""
    return any(fnmatchcase(name, pattern) for name in names)


def first_match(value, names: list[str], default):
    """Return `value`, or in a map of patterns the value of the first pattern that matches."""
    if not isinstance(value, Mapping):
        return value
    return next((found for pattern, found in value.items() if matches(names, pattern)), default)
