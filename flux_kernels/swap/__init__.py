"""swap_linear: put packed layers into any model, in place, all or nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from ..layers.fuse import offer_fusing
from ..layers.linear import GGUFLinear
from .model_quantizer import attach_quantizer
from .plan import Step, plan_swap
from .report import SwapReport, SwapRow
from .request import Patterns, Request
from .runs import runs_as


def swap_linear(
    model: nn.Module,
    backend: str = "auto",
    compute: str | Mapping[str, str] = "exact",
    *,
    format: str | Mapping[str, str] | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> SwapReport:
    """Replace linear layers by packed layers, in place.

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
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap_linear takes a torch module such as pipe.transformer, got {type(model).__name__}.")
    plan = plan_swap(model, Request(backend, compute, format, include, exclude))
    try:
        _carry_out(plan.steps)
    finally:
        offer_fusing(model)
        attach_quantizer(model)
    return SwapReport([*map(_row_now, plan.steps), *plan.others], plan.unmatched)


def _carry_out(steps: list[Step]) -> None:
    """Install the new layers in turn, and let go of each old layer; shared weights stay shared."""
    weights = [step.layer.module._parameters.get("weight") for step in steps]
    count = Counter(map(id, weights))
    shared = {id(weight): weight for weight in weights if count[id(weight)] > 1}
    del weights
    packed: dict[tuple[int, str], nn.Parameter] = {}
    for step in steps:
        _install(step, shared, packed)


def _install(step: Step, shared: Mapping[int, object], packed: dict[tuple[int, str], nn.Parameter]) -> None:
    """Put a step's new layer, if any, in all places of the old layer, which is let go."""
    if step.make is None:
        return
    old, new = step.layer.module, step.make()
    if new is not old:
        weight = id(old._parameters.get("weight"))
        if weight in shared and isinstance(new, GGUFLinear):
            new.qweight = packed.setdefault((weight, new.format), new.qweight)
        for parent, attribute in step.layer.places:
            parent._modules[attribute] = new
    step.layer.module, step.make = new, None


def _row_now(step: Step) -> SwapRow:
    """Return a step's row, with what runs the layer that is there now."""
    layer = step.layer.module
    return replace(step.row, runs=runs_as(layer)) if step.row.action == "swapped" else step.row
