"""fuse_projections: compute layers of an attention or a block that share an input in one product.

q, k and v (and in the single blocks of FLUX.1 the MLP's input too) read the same activation. Fused, it is read, and in int8
quantized, once. The rows move as they are packed, so nothing else changes.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from ..errors import FormatError
from .adapters import base_layer_of, replace_base_layer
from .fused_linear import FusedLinear, FusedPart, difference, join_layers
from .linear import GGUFLinear

Join = Callable[[list[str]], Tensor | None]
# Single blocks in which the output of `norm` goes to the attention and to `proj_mlp` and nowhere else
_BLOCKS_WITH_LINEAR1 = ("FluxSingleTransformerBlock", "ChromaSingleTransformerBlock")
_LINEAR1 = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
_KINDS = ("qkv", "linear1")


@dataclass
class FuseReport:
    """Say what was fused and what was not; print it for a list.

    Attributes:
        fused: names of the layers that were made.
        left: name of an attention or block -> why it stays as it is.
    """

    fused: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} fused, {len(self.left)} left as they are"]
        return "\n".join(lines + [f"{name}: {reason}" for name, reason in self.left.items()])


@dataclass(frozen=True)
class _Group:
    """Plan one fused layer: at `home`, named `name`, of the layers at `paths`."""

    home: Any
    name: str
    paths: tuple[str, ...]

    def layers(self) -> dict[str, Any]:
        """Return path -> layer, adapters taken off; None where the module has no such layer."""
        layers = {path: attrgetter(path)(self.home) for path in self.paths}
        return {path: None if layer is None else base_layer_of(layer) for path, layer in layers.items()}


def fuse_projections(model: nn.Module, single_blocks: str = "qkv", *, rows_of: Join | None = None) -> FuseReport:
    """Fuse the packed projections of a model, in place.

    Every layer is checked before the first is touched. Attention modules of diffusers get `to_qkv` (and `to_added_qkv`, `to_kv`), as `model.fuse_qkv_projections()` makes them.
    Outputs change by the order of sums at most. Parts keep their names: adapters go on and come off as before, and while any
    is on, its group is computed part by part. State dicts name the fused layers; `save_gguf` writes the parts. Packed memory is
    the same: each group's rows are copied together once, and its parts let go.

    Args:
        model: a model with GGUFLinear layers, such as `pipe.transformer`, not under offloading hooks yet.
        single_blocks: "qkv", or "linear1" to compute q, k, v and the MLP input of the single blocks of FLUX.1 in one product.
            Attention processors of your own that read hidden_states otherwise than through the projections need "qkv".
        rows_of: takes the layer names of a group, returns their packed rows where they lie together already, or None.

    Returns:
        What was fused, and what was left with the reason: parts of different types cannot be joined.

    Raises:
        FormatError: where linear1 was asked for and a block's parts differ, in type or otherwise.
        ValueError: where layers are under offloading hooks, or `single_blocks` is another word.
    """
    if single_blocks not in _KINDS:
        raise ValueError(f"single_blocks must be one of {', '.join(map(repr, _KINDS))}, got {single_blocks!r}.")
    _check_no_group_offload(model)
    names = {module: name for name, module in model.named_modules()}
    report, plan = FuseReport(), []
    whole = [module for module in names if single_blocks == "linear1" and type(module).__name__ in _BLOCKS_WITH_LINEAR1]
    for block in whole:
        group = _Group(block, "linear1", _LINEAR1)
        if not _is_fused(group):
            _check_linear1(group, names[block])
            plan.append([group])
    inside = {block.attn for block in whole}
    for attention in (module for module in names if hasattr(module, "fuse_projections") and module not in inside):
        if _is_candidate(attention):
            groups = _groups(attention)
            reason = _obstacle(groups)
            if reason is None:
                plan.append(groups)
            else:
                report.left[names[attention]] = reason
    for groups in plan:
        _fuse(groups, names, rows_of)
        report.fused += [_join_names(names[group.home], group.name) for group in groups]
    return report


def unfuse_projections(model: nn.Module) -> None:
    """Give every part of a fused layer its own packed rows again, bit for bit, in place.

    Raises:
        ValueError: where layers are under offloading hooks, or a fused layer itself carries an adapter.
    """
    _check_no_group_offload(model)
    fused = [(module, name) for module in model.modules() for name, child in module._modules.items() if _holds_fused(child)]
    for home, name in fused:
        _check_unfusable(home, name)
    for home, name in fused:
        _unfuse(home, name)


class FuseMethod:
    """Stand in for `fuse_projections` or `unfuse_projections` of a packed attention module.

    The method of diffusers would decode the rows into an ordinary linear. This object lies in the instance, where it hides the
    method of the class, because it has to survive deepcopy and pickle.
    """

    def __init__(self, attention: nn.Module, fuse: bool):
        # Weak: a cycle would keep the layers of a deleted model.
        self._attention, self.fuse = weakref.ref(attention), fuse

    @property
    def attention(self) -> nn.Module:
        """The module this lies in."""
        return self._attention()  # type: ignore[return-value]

    def __getstate__(self) -> tuple[nn.Module, bool]:
        """Hand the module on, which is being copied or pickled around this."""
        return self.attention, self.fuse

    def __setstate__(self, state: tuple[nn.Module, bool]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def __call__(self, *args, **kwargs) -> None:
        """Fuse or unfuse as diffusers would; warn where the parts cannot be joined and stay as they are."""
        attention = self.attention
        if not _is_packed(attention):
            getattr(type(attention), "fuse_projections" if self.fuse else "unfuse_projections")(attention, *args, **kwargs)
        elif not self.fuse:
            unfuse_projections(attention)
        elif _is_candidate(attention):
            groups, name = _groups(attention), type(attention).__name__
            reason = _obstacle(groups)
            if reason is None:
                _fuse(groups, {attention: name}, None)
            else:
                warnings.warn(f"{name} is not fused: {reason}.", stacklevel=2)


def offer_fusing(model: nn.Module) -> None:
    """Make `model.fuse_qkv_projections()` of diffusers join packed rows instead of decoding them."""
    for module in model.modules():
        if hasattr(module, "fuse_projections") and _is_packed(module):
            for name in ("fuse_projections", "unfuse_projections"):
                if hasattr(type(module), name):
                    module.__dict__[name] = FuseMethod(module, name == "fuse_projections")


class ProjectAfterNorm:
    """Forward hook on a single block's `norm`: hand on linear1 of its output.

    The parts select their columns from it. With an adapter around a part the output goes on as it is, and each part computes its own rows.
    """

    def __init__(self, block: Any):
        self.block = block

    def __call__(self, norm: nn.Module, arguments: tuple, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return (linear1(x), gate) for (x, gate)."""
        linear1 = self.block.linear1
        return output if linear1.adapted() else (linear1(output[0]), output[1])


def _groups(attention: nn.Module) -> list[_Group]:
    """List the fused layers that diffusers gives an attention module."""

    def has(*names: str) -> bool:
        return all(getattr(attention, name, None) is not None for name in names)

    if getattr(attention, "is_cross_attention", False):
        groups = [_Group(attention, "to_kv", ("to_k", "to_v"))]
    else:
        groups = [_Group(attention, "to_qkv", ("to_q", "to_k", "to_v"))]
    if has("add_q_proj", "add_k_proj", "add_v_proj"):
        groups.append(_Group(attention, "to_added_qkv", ("add_q_proj", "add_k_proj", "add_v_proj")))
    elif has("add_k_proj", "add_v_proj"):
        groups.append(_Group(attention, "to_added_kv", ("add_k_proj", "add_v_proj")))
    return groups


def _is_candidate(attention: nn.Module) -> bool:
    """Tell whether an attention module has packed projections of its own that are apart."""
    if not getattr(attention, "_supports_qkv_fusion", True) or not hasattr(attention, "to_v") or not _is_packed(attention):
        return False
    return not getattr(attention, "fused_projections", False) and not _part_of_linear1(attention)


def _obstacle(groups: list[_Group]) -> str | None:
    """Return why the layers of some group cannot be joined, or None.

    Raises:
        ValueError: where a layer is under offloading or casting hooks.
    """
    for group in groups:
        layers = group.layers()
        _check_no_offload(layers)
        reason = difference(layers)
        if reason is not None:
            return reason
    return None


def _check_linear1(group: _Group, block: str) -> None:
    reason = _obstacle([group])
    if getattr(group.home.attn, "fused_projections", False):
        reason = "q, k and v are fused already; call unfuse_projections(model) first"
    if reason is not None:
        raise FormatError(f'{block} cannot have a linear1: {reason}. Use single_blocks="qkv".')


def _check_no_offload(layers: dict[str, nn.Module]) -> None:
    for name, layer in layers.items():
        if hasattr(layer, "_hf_hook") or hasattr(layer, "_diffusers_hook"):
            raise ValueError(f"{name} is under offloading or casting hooks. Fuse or unfuse first, then enable offloading.")


def _check_no_group_offload(model: nn.Module) -> None:
    """Raise ValueError where groups hold on to the parameters of whole blocks."""
    registries = (getattr(module, "_diffusers_hook", None) for module in model.modules())
    if any(registry is not None and registry.get_hook("group_offloading") is not None for registry in registries):
        raise ValueError("The model is under group offloading. Fuse or unfuse first, then enable offloading.")


def _is_packed(attention: nn.Module) -> bool:
    return any(isinstance(base_layer_of(child), GGUFLinear) for child in attention.children())


def _is_fused(group: _Group) -> bool:
    return _holds_fused(group.home._modules.get(group.name))


def _holds_fused(child: nn.Module | None) -> bool:
    return child is not None and isinstance(base_layer_of(child), FusedLinear)


def _part_of_linear1(attention: nn.Module) -> bool:
    part = base_layer_of(getattr(attention, "to_q", attention))
    return isinstance(part, FusedPart) and part.whole.home is not attention


def _fuse(groups: list[_Group], names: dict[nn.Module, str], rows_of: Join | None) -> None:
    """Make the fused layers of one attention or block, and put parts in place of the layers."""
    for group in groups:
        layers = group.layers()
        rows = rows_of([_join_names(names[group.home], path) for path in group.paths]) if rows_of else None
        fused = join_layers(layers, group.home, rows)
        for part in fused.parts:
            replace_base_layer(group.home, part.path, FusedPart(fused, part, layers[part.path]))
        group.home.add_module(group.name, fused)
        if group.name == "linear1":
            group.home.norm.register_forward_hook(ProjectAfterNorm(group.home))
        else:
            group.home.fused_projections = True


def _check_unfusable(home: nn.Module, name: str) -> None:
    fused = home._modules[name]
    if type(fused) is not FusedLinear:
        raise ValueError(f"{name} carries an adapter of its own. Unload it, then unfuse.")
    _check_no_offload({name: fused})


def _unfuse(home: Any, name: str) -> None:
    fused = home._modules[name]
    for rows in fused.parts:
        part = base_layer_of(home.get_submodule(rows.path))
        # A layer that a user put in its place stays.
        if isinstance(part, FusedPart):
            replace_base_layer(home, rows.path, fused.separate(part))
    delattr(home, name)
    if name == "linear1":
        hooks = home.norm._forward_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, ProjectAfterNorm)]:
            del hooks[key]
    elif not any(map(_holds_fused, home.children())):
        home.fused_projections = False


def _join_names(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
