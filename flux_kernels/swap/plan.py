"""Decide what swap_linear does with each layer, and check that it can, before anything is changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import check_runnable
from ..compute import dtype_name
from ..errors import FormatError
from ..formats import BlockFormat, get_format
from ..layers.adapters import adapter_parts, is_merged_into, without_adapters
from ..layers.fused_linear import FusedPart
from ..layers.linear import GGUFLinear
from ..layers.takeover import is_diffusers_gguf, packed_type, quantize_layer, take_over, unpack_plain
from .report import SwapRow
from .request import Request, Wish

# Modules that hold a matrix `weight` and multiply nothing by it.
_NO_PRODUCTS = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)


@dataclass
class LinearLayer:
    """Hold one linear layer of a model with its names and places.

    Attributes:
        module: the layer; after the swap the layer in its place.
        of_adapter: whether it is a part of an adapter.
        names: those it has in the model, without what adapters add.
        part_names: of the layers whose rows a fused layer holds.
        places: (parent, attribute) wherever it hangs.
    """

    module: Any
    of_adapter: bool
    names: list[str] = field(default_factory=list)
    part_names: list[str] = field(default_factory=list)
    places: list[tuple[nn.Module, str]] = field(default_factory=list)

    @property
    def stored(self) -> Tensor:
        """The weight as it is stored."""
        return self.module.qweight if isinstance(self.module, GGUFLinear) else self.module.weight


@dataclass
class Step:
    """Hold what is to happen to one layer.

    Attributes:
        layer: the layer and its places.
        row: what the report says of it.
        make: gives the layer that comes in its place, ready for it; None where it stays.
    """

    layer: LinearLayer
    row: SwapRow
    make: Callable[[], nn.Module] | None = None


@dataclass(frozen=True)
class SwapPlan:
    """Hold what a swap is going to do.

    Attributes:
        steps: a step for each linear layer.
        others: rows of modules that no step is for.
        unmatched: the user's patterns that match no layer.
    """

    steps: list[Step]
    others: list[SwapRow]
    unmatched: list[str]


def plan_swap(model: nn.Module, request: Request) -> SwapPlan:
    """Decide what happens to each linear layer and check that it can; nothing is changed.

    Raises:
        FormatError, BackendUnavailable, ValueError, TypeError: as `swap_linear`.
    """
    layers = linear_layers(model)
    wishes, unmatched = request.wishes((layer.names, layer.part_names) for layer in layers)
    if isinstance(model, nn.Linear):
        raise TypeError(
            'swap_linear replaces layers inside a model; for a single nn.Linear use GGUFLinear.from_linear(layer, "Q8_0").'
        )
    steps = [_plan_layer(layer, wish) for layer, wish in zip(layers, wishes, strict=True)]
    _note_ties(model, steps)
    return SwapPlan(steps, _other_products(model), unmatched)


def _note_ties(model: nn.Module, steps: list[Step]) -> None:
    """Write into the rows which modules stay as they are and hold the weight of a layer that is quantized."""
    swapped = {step.layer.module for step in steps if step.make is not None}
    stay = {name: module for name, module in model.named_modules() if module not in swapped}
    holders = {id(weight): name for name, module in stay.items() for weight in module._parameters.values()}
    for step in steps:
        if step.make is not None and type(step.layer.module) is nn.Linear:
            step.row = replace(step.row, tied=holders.get(id(step.layer.module.weight), ""))


def linear_layers(model: nn.Module) -> list[LinearLayer]:
    """List every nn.Linear of a model once, in the order of the model.

    Parts of a fused layer go with the layer.
    """
    adapters = adapter_parts(model)
    layers: dict[nn.Module, LinearLayer] = {}
    part_names: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, FusedPart):
            part_names.setdefault(module.whole, []).append(without_adapters(path))
        elif isinstance(module, nn.Linear):
            layer = layers.setdefault(module, LinearLayer(module, module in adapters))
            prefix, _, attribute = path.rpartition(".")
            layer.names.append(without_adapters(path))
            layer.places.append((model.get_submodule(prefix), attribute))
    for module, layer in layers.items():
        layer.part_names += part_names.get(module, [])
    return list(layers.values())


def _other_products(model: nn.Module) -> list[SwapRow]:
    """Describe the modules that multiply by a matrix and are no nn.Linear, such as GPT-2's Conv1D."""
    rows = []
    for name, module in model.named_modules():
        weight = module._parameters.get("weight", module._parameters.get("in_proj_weight"))
        if weight is not None and weight.dim() == 2 and not isinstance(module, (nn.Linear, *_NO_PRODUCTS)):
            about, shape = _class_of(module), (weight.shape[0], weight.shape[1])
            rows.append(SwapRow(without_adapters(name), "skipped", about, dtype_name(weight.dtype), shape, _nbytes(weight)))
    return rows


def _plan_layer(layer: LinearLayer, wish: Wish) -> Step:
    module = layer.module
    reason = wish.refusal or ("weights of an adapter" if layer.of_adapter else _foreign(layer))
    if reason is not None:
        return _skip(layer, reason)
    if isinstance(module, GGUFLinear):
        return _plan_update(layer, wish)
    if is_diffusers_gguf(module):
        return _plan_take_over(layer, wish)
    return _plan_quantize(layer, wish)


def _foreign(layer: LinearLayer) -> str | None:
    """Return why a layer of somebody else is left alone, or None."""
    module = layer.module
    if isinstance(module, GGUFLinear):
        # Adapters that are merged into it are in its branch.
        return None
    if not is_diffusers_gguf(module) and type(module) is not nn.Linear:
        return _class_of(module)
    if "weight" not in module._parameters:
        return "its weight is computed (weight_norm, pruning)"
    if any(is_merged_into(module, parent) for parent, _ in layer.places):
        return "an adapter is merged into it"
    return None


def _class_of(module: nn.Module) -> str:
    return f"a {type(module).__module__}.{type(module).__name__}, not a plain nn.Linear"


def _plan_update(layer: LinearLayer, wish: Wish) -> Step:
    module = layer.module
    step = _swap(layer, wish, get_format(module.format), "already packed", _update)
    row = step.row
    step.row = replace(
        row,
        was_compute=module.compute if row.compute == "exact" != module.compute else "",
        was_backend=module.backend if wish.backend == "auto" != module.backend else "",
    )
    return step


def _update(module: GGUFLinear, backend: str, compute: str) -> GGUFLinear:
    module.backend, module.compute = backend, compute
    return module.arrange()


def _plan_take_over(layer: LinearLayer, wish: Wish) -> Step:
    module = layer.module
    _check_untouched(layer)
    if not hasattr(module.weight, "quant_type"):
        return _skip(layer, "diffusers holds its weight unpacked")
    fmt = packed_type(module.weight, layer.names[0])
    if not isinstance(fmt, BlockFormat):
        step = _skip(layer, f"{fmt.name} is not a block type: now a plain nn.Linear")
        step.make = partial(unpack_plain, module)
        return step
    return _swap(layer, wish, fmt, "taken over", take_over)


def _plan_quantize(layer: LinearLayer, wish: Wish) -> Step:
    module, name = layer.module, layer.names[0]
    if wish.format is None:
        return _skip(layer, "no pattern of format= matches" if wish.any_format else "not quantized; format= would quantize it")
    _check_untouched(layer)
    step = _swap(layer, wish, wish.format, "quantized", partial(quantize_layer, format=wish.format.name))
    if not module.weight.is_meta and not torch.isfinite(module.weight).all():
        raise FormatError(f'{name} holds NaN or infinity and cannot be quantized. Leave it out with exclude="{name}".')
    return step


def _swap(layer: LinearLayer, wish: Wish, fmt: BlockFormat, detail: str, make: Callable[..., nn.Module]) -> Step:
    """Plan to replace a layer by `make(module, backend=, compute=)`.

    Raises:
        FormatError, BackendUnavailable: where the new layer could not run.
    """
    module = layer.module
    size = fmt.row_bytes(module.in_features, layer.names[0]) * module.out_features
    check_runnable(wish.backend, wish.compute, layer.stored.device, fmt, module.in_features)
    asked = fmt if wish.format is None else wish.format
    row = replace(
        _describe(layer, "swapped", detail),
        format=fmt.name,
        bytes=size,
        backend=wish.backend,
        compute=wish.compute,
        unmet="" if asked is fmt else asked.name,
    )
    return Step(layer, row, partial(make, module, backend=wish.backend, compute=wish.compute))


def _skip(layer: LinearLayer, reason: str) -> Step:
    return Step(layer, _describe(layer, "skipped", reason))


def _describe(layer: LinearLayer, action: str, detail: str) -> SwapRow:
    """Describe a layer as it is now."""
    module, weight, name = layer.module, layer.stored, layer.names[0]
    if isinstance(module, GGUFLinear):
        format = module.format
    else:
        format = packed_type(weight, name).name if hasattr(weight, "quant_type") else dtype_name(weight.dtype)
    return SwapRow(name, action, detail, format, (module.out_features, module.in_features), _nbytes(weight))


def _nbytes(weight: Tensor) -> int:
    return weight.numel() * weight.element_size()


def _check_untouched(layer: LinearLayer) -> None:
    """Raise ValueError where offloading or casting hooks already own the layer's weight."""
    module = layer.module
    offloaded = hasattr(module, "_hf_hook") and any(parameter.is_meta for parameter in module.parameters())
    if offloaded or hasattr(module, "_diffusers_hook"):
        raise ValueError(
            f"{layer.names[0]} is under offloading or casting hooks. Call swap_linear first, then enable offloading or layerwise "
            "casting."
        )
