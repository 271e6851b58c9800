"""swap_linear: put packed layers into any model, in place, all or nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from ..backends import check_names
from ..formats import get_format
from ..layers.linear import GGUFLinear
from ..packing import quantizer
from .guard import guard
from .plan import Request, Step, linear_layers, matches, plan_layer
from .report import SwapReport, SwapRow
from .runs import runs_as

Patterns = str | Sequence[str] | None


def swap_linear(
    model: nn.Module,
    backend: str = "auto",
    compute: str | Mapping[str, str] = "exact",
    *,
    format: str | Mapping[str, str] | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> SwapReport:
    """Replace linear layers by packed ones, in place.

    Layers that diffusers loaded from a GGUF file are taken over: their bytes are moved, not copied and not decoded. Plain
    nn.Linear layers are quantized where `format` says so. Layers that are packed already keep their type and get the new backend
    and compute mode, the defaults where none are given; the report says where that took another from them. Every layer is
    checked before the first is touched.

    Args:
        model: any module that contains linear layers, such as `pipe.transformer`.
        backend: "auto", "triton" or "torch".
        compute: "exact", "fp16_accumulate" or "int8", or a map of fnmatch pattern -> mode ("exact" where none matches).
        format: type to quantize plain nn.Linear layers to, on their device: a name such as "Q4_K", or a map of fnmatch
            pattern -> name, of which the first match counts. None leaves them as they are. Packed layers keep their type.
        include: fnmatch pattern or patterns of the layer names to consider; None means all.
        exclude: fnmatch pattern or patterns of the layer names to leave out.

    Returns:
        A report with a row for each linear layer; print it for a table.

    Raises:
        FormatError: where a weight does not fit the format asked for.
        BackendUnavailable: where the backend or a compute mode cannot run here.
        ValueError: where a layer was offloaded or cast by hooks before the swap.
        TypeError: where `model` is not a module that contains layers.
    """
    request = _check_request(model, backend, compute, format, include, exclude)
    steps = [plan_layer(*layer, request) for layer in linear_layers(model)]
    names = [name for step in steps for name in step.names]
    unmatched = [pattern for pattern in request.patterns() if pattern != "*" and not matches(names, pattern)]
    try:
        _carry_out(steps)
    finally:
        guard(model)
    return SwapReport([_with_runs(step) for step in steps], unmatched)


def _with_runs(step: Step) -> SwapRow:
    """Return a step's row, with what runs the layer that is there now."""
    layer = step.places[0][0]._modules[step.places[0][1]]
    return (
        replace(step.row, runs=runs_as(layer)) if isinstance(layer, GGUFLinear) and step.row.action == "swapped" else step.row
    )


def _check_request(model, backend, compute, format, include, exclude) -> Request:
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap_linear takes a torch module such as pipe.transformer, got {type(model).__name__}.")
    if isinstance(model, nn.Linear):
        raise TypeError("swap_linear replaces layers inside a model; use GGUFLinear.from_linear for a single nn.Linear.")
    for mode in compute.values() if isinstance(compute, Mapping) else (compute,):
        check_names(backend, mode)
    for name in format.values() if isinstance(format, Mapping) else (format,):
        if name is not None:
            quantizer(get_format(name))
    return Request(backend, compute, format, _as_tuple(include, ("*",)), _as_tuple(exclude, ()))


def _carry_out(steps: list[Step]) -> None:
    """Make and install the new layers one at a time, and let go of each old one; shared weights stay shared."""
    weights = [step.old._parameters.get("weight") for step in steps]
    count = Counter(map(id, weights))
    shared = {id(weight): weight for weight in weights if count[id(weight)] > 1}
    del weights
    packed: dict[tuple[int, str], nn.Parameter] = {}
    for step in steps:
        if step.make is None:
            continue
        new, key = step.make(), (id(step.old._parameters.get("weight")), step.row.format)
        if key[0] in shared and isinstance(new, GGUFLinear) and not isinstance(step.old, GGUFLinear):
            new.qweight = packed.setdefault(key, new.qweight)
        for parent, attribute in step.places:
            parent._modules[attribute] = new
        step.forget()


def _as_tuple(patterns: Patterns, default: tuple[str, ...]) -> tuple[str, ...]:
    if patterns is None:
        return default
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)
