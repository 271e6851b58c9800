"""Run a model on a user's own inputs and see what its packed layers receive."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FormatError
from ..layers.adapters import without_adapters
from ..layers.fused_linear import FusedPart
from ..layers.linear import GGUFLinear

Inputs = Tensor | tuple | Mapping[str, Any] | Iterable[Any] | Callable[[], Any]
_LEGAL = (
    "keyword arguments of a call as a dict, positional arguments as a tensor or tuple, a list of such calls, or a function "
    "that runs the model"
)


def packed_layers(model: nn.Module) -> dict[str, GGUFLinear]:
    """Return the packed layers by name, as `swap_linear` matches names.

    Names are without what peft and torch.compile add. Parts of a fused layer are measured as one layer and left out.

    Raises:
        FormatError: where there are none, or they are offloaded.
    """
    if not isinstance(model, nn.Module):
        raise FormatError(f"model is a torch module with packed layers, got {type(model).__name__}.")
    named = ((without_adapters(name), layer) for name, layer in model.named_modules() if isinstance(layer, GGUFLinear))
    layers = {name: layer for name, layer in named if not isinstance(layer, FusedPart)}
    if not layers:
        raise FormatError("The model has no packed layers (GGUFLinear). Call swap_linear on it first.")
    for name, layer in layers.items():
        if layer.qweight.is_meta:
            raise FormatError(f"{name!r} is offloaded. Measure before offloading is enabled.")
    return layers


def check_inputs(inputs: Inputs) -> Inputs:
    """Return `inputs` as they can be run twice.

    Raises:
        FormatError: where they are no call, calls or function.
    """
    if callable(inputs) or isinstance(inputs, (Mapping, Tensor, tuple)):
        return inputs
    try:
        calls = list(inputs)
    except TypeError:
        raise FormatError(f"inputs are {_LEGAL}; got {type(inputs).__name__}.") from None
    if not calls:
        raise FormatError("inputs are an empty list. Give at least one call.")
    wrong = next((call for call in calls if not isinstance(call, (Mapping, Tensor, tuple))), None)
    if wrong is not None:
        raise FormatError(f"inputs are {_LEGAL}; one of the calls is a {type(wrong).__name__}.")
    return calls


@torch.no_grad()
def run(model: nn.Module, inputs: Inputs) -> None:
    """Run the model on checked inputs."""
    if callable(inputs):
        inputs()
        return
    for call in [inputs] if isinstance(inputs, (Mapping, Tensor, tuple)) else inputs:
        if isinstance(call, Mapping):
            model(**call)
        else:
            model(*((call,) if isinstance(call, Tensor) else call))


def listen(layer: GGUFLinear, receive: Callable[[Tensor], None]) -> torch.utils.hooks.RemovableHandle:
    """Call `receive` with the tokens [M, K] of every call of a layer; return the hook."""

    def hook(module: nn.Module, arguments: tuple, keywords: dict) -> None:
        x = arguments[0] if arguments else keywords["input"]
        receive(x.detach().reshape(-1, x.shape[-1]))

    return layer.register_forward_pre_hook(hook, with_kwargs=True)
