"""Adapters of peft, which go around a layer: the layer inside, and its name without them."""

from __future__ import annotations

from typing import Any

from torch import nn

# What peft calls the layer inside an adapter.
_BASE = "base_layer"
# Components that peft and torch.compile put into names.
_ADDED = {_BASE, "_orig_mod"}


def without_adapters(name: str) -> str:
    """Return a module's name without what peft's layers and torch.compile put into it."""
    return ".".join(part for part in name.split(".") if part not in _ADDED) or name


def has_adapter(module: nn.Module) -> bool:
    """Tell whether a module is an adapter around a layer."""
    return _BASE in module._modules


def base_layer_of(module: Any) -> Any:
    """Return the layer that adapters are around, or the module itself where there are none."""
    while has_adapter(module):
        module = module._modules[_BASE]
    return module


def is_merged_into(layer: nn.Module, parent: nn.Module) -> bool:
    """Tell whether `parent` is an adapter around `layer` that is merged into its weight."""
    return parent._modules.get(_BASE) is layer and bool(getattr(parent, "merged", False))


def adapter_parts(model: nn.Module) -> set[nn.Module]:
    """Return the modules of a model that belong to adapters: all inside them but their base layers."""
    adapters = filter(has_adapter, model.modules())
    parts = [part for adapter in adapters for key, part in adapter._modules.items() if key != _BASE and part is not None]
    return {module for part in parts for module in part.modules()}


def replace_base_layer(home: nn.Module, path: str, new: nn.Module) -> None:
    """Put `new` at `path` inside `home`, inside the adapters that stand there."""
    parent_path, _, name = path.rpartition(".")
    parent: Any = home.get_submodule(parent_path)
    while has_adapter(parent._modules[name]):
        parent, name = parent._modules[name], _BASE
    parent._modules[name] = new
