"""FusedLinear: the packed rows of several layers that share an input, as one layer.

FusedPart stands for each of those layers, without bytes.

Rows of one type are a matrix wherever they follow each other, so joining them changes no value and needs no memory.
The parts stay in the model under their own names: adapters, `save_gguf` and patterns find them there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import FormatError
from ..formats import get_format
from . import eager
from .linear import GGUFLinear
from .low_rank import PARAMETERS as BRANCH


@dataclass(frozen=True)
class Rows:
    """Name the rows [start, stop) of a fused layer that are the layer at `path`.

    The path is seen from the module that holds both.
    """

    path: str
    start: int
    stop: int


class FusedLinear(GGUFLinear):
    """Compute several packed layers on one input at once.

    It maps [..., K] to [..., sum of their N], in their order.

    Attributes:
        parts: the rows of each layer.
        home: the module from which the parts' paths start.
    """

    parts: tuple[Rows, ...]

    def join(self, home: nn.Module, parts: tuple[Rows, ...]) -> FusedLinear:
        """Set the parts of a layer that `from_packed` made, and the module they are in."""
        self.parts = parts
        # In a list, so that torch does not register the parent as a child.
        self._home = [home]
        return self

    @property
    def home(self) -> nn.Module:
        """The module from which the parts' paths start."""
        return self._home[0]

    def adapted(self) -> bool:
        """Tell whether a part must compute for itself.

        It has an adapter around it, or outlier channels.
        """
        return not all(type(part) is FusedPart and part.outlier_index is None for part in self._modules_of_parts())

    def forward(self, input: Tensor, part: FusedPart | None = None) -> Tensor:
        """Compute all rows in one product, or part by part where `adapted`.

        Low-rank branches of parts are in the product.

        With `part`, its rows alone: parts compute through this layer, so that the hooks of offloading see every use of it.
        """
        if part is not None:
            return GGUFLinear.forward(part, input)
        parts = self._modules_of_parts()
        if self.adapted():
            return torch.cat([part(input) for part in parts], dim=-1)
        branches = [part._branch() for part in parts]
        if not any(branches):
            return super().forward(input)
        hidden = F.linear(input, torch.cat([branch[0].to(input.dtype) for branch in branches if branch]))
        up = [branch[1] if branch else input.new_empty(part.out_features, 0) for branch, part in zip(branches, parts)]
        weight = self._packed_with_scale()
        branch = hidden, torch.block_diag(*up).to(hidden.dtype)
        return eager.dispatched(input, weight, self.bias, self.backend, self.compute, branch)

    def _modules_of_parts(self) -> list[Any]:
        """Look the parts up as they are now; `get_submodule` would take 27 us for four, every call."""
        modules = []
        for rows in self.parts:
            module: Any = self._home[0]
            for name in rows.path.split("."):
                module = module._modules[name]
            modules.append(module)
        return modules

    def set_low_rank(self, down: Tensor | None, up: Tensor | None, *, trainable: bool = False) -> None:
        """Refuse: a branch belongs to a part, which keeps it when it is separated."""
        raise FormatError(f"A fused layer takes no low-rank branch. Put it on a part: {', '.join(self._paths())}.")

    def keep_outliers(self, index: Tensor | None) -> None:
        """Refuse: outlier channels belong to a part, which keeps them when it is separated."""
        raise FormatError(f"A fused layer takes no outlier channels. Set them on a part: {', '.join(self._paths())}.")

    def _paths(self) -> list[str]:
        return [rows.path for rows in self.parts]

    def separate(self, part: FusedPart) -> GGUFLinear:
        """Make a layer of its own, with its own bytes, of a part."""
        qweight, bias = part.qweight.clone(), part.bias
        if bias is not None:
            bias = nn.Parameter(bias.detach().clone(), requires_grad=self.bias.requires_grad)
        names: dict[str, Any] = dict(backend=self.backend, compute=self.compute, compute_dtype=self.compute_dtype)
        layer = GGUFLinear.from_packed(qweight, self.format, bias, planes=self.planes, **names).train(part.training)
        layer._kept_row_scale()
        return _with_branch_of(part, layer)

    def extra_repr(self) -> str:
        """Show the layer and its parts."""
        return f"{super().extra_repr()}, parts={self._paths()}"


class FusedPart(GGUFLinear):
    """Stand where a layer was whose rows a FusedLinear holds.

    It computes with those rows and has no parameters but a branch.

    An input as wide as the fused layer's output is that output: its columns are selected (see `fuse.ProjectAfterNorm`).
    """

    def __init__(self, whole: FusedLinear, rows: Rows, layer: GGUFLinear):
        """Take the place of `layer`, whose rows are these of `whole`."""
        nn.Module.__init__(self)
        # In a list, so that torch does not register it as a child.
        self._whole = [whole]
        self.rows = rows
        self.train(layer.training)
        _with_branch_of(layer, self)

    @property
    def whole(self) -> FusedLinear:
        """The layer that holds the rows."""
        return self._whole[0]

    in_features = property(lambda self: self.whole.in_features)
    out_features = property(lambda self: self.rows.stop - self.rows.start)
    format = property(lambda self: self.whole.format)
    planes = property(lambda self: self.whole.planes)
    backend = property(lambda self: self.whole.backend)
    compute = property(lambda self: self.whole.compute)
    compute_dtype = property(lambda self: self.whole.compute_dtype)

    @property
    def qweight(self) -> Tensor:  # type: ignore[override]
        """The rows of this layer: uint8 [N, row bytes], a view into the fused layer's."""
        return self.whole.qweight[self.rows.start : self.rows.stop]

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The bias of this layer, a view into the fused layer's."""
        return None if self.whole.bias is None else self.whole.bias[self.rows.start : self.rows.stop]

    def forward(self, input: Tensor) -> Tensor:
        """Compute with the rows of this layer.

        Where `input` is the fused layer's output, its columns are selected.
        """
        if input.shape[-1] == self.whole.out_features != self.in_features:
            return input[..., self.rows.start : self.rows.stop]
        return self.whole(input, part=self)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter of a branch; refuse rows and bias, which the fused layer holds."""
        if name in ("qweight", "bias"):
            raise FormatError(
                f"The {name} of this layer is part of a fused layer and cannot be replaced. Call "
                "unfuse_projections(model) first."
            )
        super().register_parameter(name, param)

    def _kept_row_scale(self, qweight: Tensor | None = None) -> Tensor | None:
        """Return the scales of these rows, a view into the fused layer's."""
        kept = self.whole._kept_row_scale()
        return None if kept is None else kept[self.rows.start : self.rows.stop]

    def arrange(self) -> FusedPart:
        """Leave the rows as the fused layer arranged them."""
        return self

    def _apply(self, fn, recurse: bool = True):
        return nn.Module._apply(self, fn, recurse)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        """Load the branch; refuse the rows of an unfused model."""
        if prefix + "qweight" in state_dict:
            error_msgs.append(
                f'"{prefix}qweight": the model is fused and the state dict is not. Call unfuse_projections(model) first, load, '
                "and fuse again."
            )
            return
        if state_dict.pop(prefix + "weight", None) is None:
            missing_keys.append(prefix + "weight")
        problem = self._fit_branch(state_dict, prefix)
        if problem is not None:
            error_msgs.append(problem)
            return
        nn.Module._load_from_state_dict(
            self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        """Show which rows of what these are."""
        return f"rows {self.rows.start} to {self.rows.stop} of a FusedLinear"


def _with_branch_of(old: GGUFLinear, new: GGUFLinear) -> GGUFLinear:
    for name in BRANCH:
        new.register_parameter(name, old._parameters[name])
    return new


def difference(layers: dict[str, nn.Module]) -> str | None:
    """Return why layers cannot be joined, as a clause, or None where they can.

    Args:
        layers: name -> what computes there, adapters taken off.
    """
    for name, layer in layers.items():
        if type(layer) is not GGUFLinear:
            return f"{name} is a {type(layer).__name__}, not a packed layer of its own"
        if layer._forward_hooks or layer._forward_pre_hooks:
            return f"{name} has hooks, which would not be called"
    for what, of in _MUST_AGREE.items():
        values = {name: of(layer) for name, layer in layers.items()}
        if len(set(values.values())) > 1:
            return f"they differ in {what}: " + ", ".join(f"{name} {value}" for name, value in values.items())
    return None


_MUST_AGREE = {
    "type": lambda layer: layer.format,
    "input width": lambda layer: layer.in_features,
    "backend": lambda layer: layer.backend,
    "compute mode": lambda layer: layer.compute,
    "dtype": lambda layer: layer.compute_dtype,
    "device": lambda layer: layer.qweight.device,
    "arrangement": lambda layer: layer.planes,
    "bias": lambda layer: "none" if layer.bias is None else str(layer.bias.dtype),
}


def join_layers(layers: dict[str, GGUFLinear], home: nn.Module, qweight: Tensor | None = None) -> FusedLinear:
    """Make one layer of layers that `difference` has no objection to.

    Args:
        layers: path from `home` -> layer, in the order of the rows.
        home: the module that holds them all.
        qweight: their packed rows together, where a caller has them so; otherwise they are copied together.

    Raises:
        FormatError: where `qweight` does not have the shape of the rows together.
    """
    first, rows, start = next(iter(layers.values())), [], 0
    for path, layer in layers.items():
        rows.append(Rows(path, start, start + layer.out_features))
        start += layer.out_features
    if qweight is None:
        qweight = torch.cat([layer.qweight.detach() for layer in layers.values()])
    elif qweight.shape != (start, get_format(first.format).row_bytes(first.in_features)):
        raise FormatError(f"{', '.join(layers)} have {start} rows together, got packed rows of shape {list(qweight.shape)}.")
    bias = None
    if first.bias is not None:
        trained = any(layer.bias.requires_grad for layer in layers.values())
        bias = nn.Parameter(torch.cat([layer.bias.detach() for layer in layers.values()]), requires_grad=trained)
    names: dict[str, Any] = dict(backend=first.backend, compute=first.compute, compute_dtype=first.compute_dtype)
    fused: Any = FusedLinear.from_packed(qweight, first.format, bias, planes=first.planes, **names).train(first.training)
    fused._kept_row_scale()
    return fused.join(home, tuple(rows))
