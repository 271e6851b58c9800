"""fuse_lora and unfuse_lora: adapters as a side branch of packed layers, exact and removable.

On request they are re-quantized into the rows instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import FormatError
from ..formats import Packed, get_format
from ..layers.fused_linear import FusedPart
from ..layers.linear import GGUFLinear
from ..ops import dequantize
from ..packing import quantize, quantizer
from .lora_merge import check_fusable, install, packed_lora_layers


@dataclass(frozen=True)
class FusedLayer:
    """Hold what happened to one layer.

    Attributes:
        layer: its name.
        format: ggml type name of the packed rows.
        adapters: what was fused.
        rank: of the branch now, 0 after re-quantizing.
        added_error: relative RMS difference between the merged weight and its re-quantized form (a fraction); 0 for a branch.
    """

    layer: str
    format: str
    adapters: tuple[str, ...]
    rank: int
    added_error: float = 0.0


class LoraReport:
    """Hold a row for each packed layer; print it for a table."""

    def __init__(self, rows: list[FusedLayer]):
        self.rows = rows

    def __str__(self) -> str:
        lines = [f"{'layer':<56} {'format':<8} {'rank':>5} {'added error':>12}  adapters"]
        for row in self.rows:
            error = f"{100 * row.added_error:.3f} %"
            lines.append(f"{row.layer:<56} {row.format:<8} {row.rank:>5} {error:>12}  {', '.join(row.adapters)}")
        return "\n".join(lines)


def fuse_lora(
    model: nn.Module,
    adapter_names: Iterable[str] | None = None,
    *,
    scale: float = 1.0,
    safe: bool = True,
    requantize: bool = False,
) -> LoraReport:
    """Fuse LoRA adapters into a model, as `pipe.fuse_lora()` does, and report on each packed layer.

    In a packed layer the adapters become one low-rank branch: the numbers of the unfused model, one product whatever the number of
    adapters, removable with `unfuse_lora`. Plain layers merge as peft does it. Every layer is checked before the first is touched.

    Args:
        model: a model with adapters, such as `pipe.transformer`.
        adapter_names: which adapters; None means the active ones.
        scale: multiplies the adapters' own scales.
        safe: whether to refuse adapters that hold NaN or infinity.
        requantize: whether to quantize the merged weight again, in the layer's own type, instead of keeping a branch: no extra
            work per step, at the error that the report states, and not removable.

    Raises:
        FormatError: where no packed layer has an adapter, for a DoRA, or with `requantize` for a type without a quantizer.
        ValueError: with `safe`, for NaN or infinity in an adapter.
    """
    install()
    layers = dict(packed_lora_layers(model))
    if not layers:
        raise FormatError("No packed layer of this model has a LoRA adapter. Load one first: pipe.load_lora_weights(...).")
    names = None if adapter_names is None else list(adapter_names)
    check_fusable(model, names, safe=safe)
    if requantize:
        for name, layer in layers.items():
            _check_requantizable(name, layer.get_base_layer())
    _merge_all(model, names, scale, safe)
    rows = []
    for name, layer in layers.items():
        base, fused = layer.get_base_layer(), tuple(layer.merged_adapters)
        error = _requantize(name, layer) if requantize else 0.0
        rows.append(FusedLayer(name, base.format, fused, base.rank, error))
    return LoraReport(rows)


def unfuse_lora(model: nn.Module) -> None:
    """Take all fused adapters out again.

    Packed layers are bit for bit what they were, and the adapters active as before.

    Raises:
        FormatError: where adapters were re-quantized into a layer; nothing is changed then.
    """
    install()
    for name, layer in packed_lora_layers(model):
        if getattr(layer, "_requantized", False):
            raise FormatError(f"The adapters of {name} were re-quantized into its weight. Load the model again.")
    for adapter in _adapters_of(model):
        if adapter.merged:
            adapter.unmerge()


def _adapters_of(model: nn.Module) -> Iterator[Any]:
    """Yield peft's layers, around packed layers and others."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return (module for module in model.modules() if isinstance(module, BaseTunerLayer))


def _merge_all(model: nn.Module, names: list[str] | None, scale: float, safe: bool) -> None:
    for adapter in _adapters_of(model):
        if scale != 1.0:
            adapter.scale_layer(scale)
        adapter.merge(safe_merge=safe, adapter_names=names)


def _check_requantizable(name: str, base: GGUFLinear) -> None:
    quantizer(get_format(base.format))
    if isinstance(base, FusedPart):
        raise FormatError(
            f"{name} is part of a fused layer. Call unfuse_projections(model) before re-quantizing adapters into it."
        )
    if base.qweight.is_meta:
        raise FormatError(f"{name} is offloaded. Re-quantize adapters before offloading is enabled.")


def _requantize(name: str, layer: Any) -> float:
    """Quantize a packed weight with its fused adapters again; return the relative RMS error.

    The adapters leave the branch. Without any there is nothing to do, and the error is 0.
    """
    base: GGUFLinear = layer.get_base_layer()
    branch, fused_rank = base._branch(), getattr(layer, "_fused_rank", 0)
    if branch is None or not fused_rank:
        return 0.0
    keep, (down, up) = base.rank - fused_rank, (factor.detach() for factor in branch)
    packed = base.file_bytes()
    added = up[:, keep:].float() @ down[keep:].float()
    merged = dequantize(packed, base.format, torch.float32, backend="torch") + added
    rows = quantize(merged, base.format, name=name)
    difference = dequantize(rows, base.format, torch.float32, backend="torch") - merged
    arranged = Packed(rows, get_format(base.format)).arranged(base.planes)
    base.qweight = nn.Parameter(arranged.data, requires_grad=False)
    if keep:
        base.set_low_rank(down[:keep], up[:, :keep].contiguous())
    else:
        base.set_low_rank(None, None)
    layer._fused_rank, layer._requantized = 0, True
    return (difference.norm() / merged.norm()).item()
