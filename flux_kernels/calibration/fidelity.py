"""Measure what each compute mode costs in accuracy, layer by layer, on a user's own activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..backends import check_names
from ..compute import COMPUTE_MODES, WEIGHT_ONLY_M, check_mode
from ..errors import FormatError
from ..layers.eager import dispatched
from ..layers.lazy_weight import decode_whole
from ..layers.linear import GGUFLinear
from .fidelity_report import FidelityReport, LayerError
from .listen import Inputs, check_inputs, listen, packed_layers, run
from .outliers import ChannelSizes

# A compute mode, and the outlier channels that it keeps in 16 bit.
Measured = tuple[str, Tensor | None]
# Rows of one call that are measured, evenly spread: errors are averages over tokens.
_MAX_TOKENS = 512


@dataclass
class _Sums:
    """Add up squared errors and squared outputs over calls."""

    error: float = 0.0
    signal: float = 0.0
    calls: int = 0

    @property
    def relative_error(self) -> float:
        """RMS error over RMS output; 0 where both are."""
        if self.signal == 0:
            return 0.0 if self.error == 0 else math.inf
        return math.sqrt(self.error / self.signal)


def fidelity(
    model: nn.Module,
    inputs: Inputs,
    computes: str | Iterable[str] = tuple(COMPUTE_MODES),
    *,
    outliers: float = 0.0,
) -> FidelityReport:
    """Run the model and compare every packed layer's output in each compute mode with float64.

    Both see the same activations. The model itself runs as it is set up: errors are each layer's own, they are not fed forward.

    Args:
        model: a module with GGUFLinear layers (after swap_linear or load_flux).
        inputs: one forward call (a dict of keyword arguments, a tensor, or a tuple of positional arguments), a list of calls, or a
            function that runs the model (a pipeline call).
        computes: the modes to measure.
        outliers: share of a layer's input channels (0.01 is 1 %) that int8 may compute in 16 bit. The inputs then run twice: once
            to find the channels that stand out, once to measure; layers where no share of at most this pays are measured without.
            Channels that `keep_outliers` has set are measured in any case.

    Modes are measured as the device at hand runs them. On an H100 and newer data-center cards int8 has one scale per weight
    row for types of up to 6 bits, elsewhere one per group of 128: weights with heavy tails cost more there, so measure on the
    kind of card that will run.
    Calls of up to 16 rows run as "exact" whatever the mode; here they show what the mode itself would cost.

    Raises:
        FormatError: where the model has no packed layers, they are offloaded or never run, `inputs` are no calls, or `outliers` is
            no share.
        BackendUnavailable: where a mode cannot run on the layer's device and backend.
    """
    layers = packed_layers(model)
    if isinstance(outliers, bool) or not isinstance(outliers, (int, float)) or not 0 <= outliers < 1:
        raise FormatError(f"outliers is a share of the channels from 0 to below 1, such as 0.01, got {outliers!r}.")
    inputs = check_inputs(inputs)
    computes = (computes,) if isinstance(computes, str) else tuple(computes)
    for mode in computes:
        check_names("auto", mode)
    kept = {name: layer.outlier_index.detach() for name, layer in layers.items() if layer.outlier_index is not None}
    channels = kept | (_find_channels(model, layers, inputs, outliers) if outliers and "int8" in computes else {})
    measured: dict[str, list[Measured]] = {name: [(mode, None) for mode in computes] for name in layers}
    for name, index in channels.items():
        if "int8" in computes:
            measured[name].append(("int8", index))
    sums = {(name, mode, _count(index)): _Sums() for name in layers for mode, index in measured[name]}
    hooks = [listen(layer, _measure(name, layer, measured[name], sums)) for name, layer in layers.items()]
    try:
        run(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    rows = []
    for (name, mode, count), total in sums.items():
        if total.calls:
            rows.append(LayerError(name, layers[name].format, mode, total.relative_error, total.calls, count))
    if not rows:
        raise FormatError("The inputs ran no packed layer, so there is nothing to measure.")
    return FidelityReport(rows, channels)


def _find_channels(model: nn.Module, layers: Mapping[str, GGUFLinear], inputs: Inputs, share: float) -> dict[str, Tensor]:
    """Run the inputs once and return layer -> outlier channels."""
    sizes = ChannelSizes(layers)
    try:
        run(model, inputs)
    finally:
        sizes.remove()
    return sizes.outliers(share)


def _measure(
    name: str, layer: GGUFLinear, measured: list[Measured], sums: Mapping[tuple[str, str, int], _Sums]
) -> Callable[[Tensor], None]:
    """Return a function of a call's tokens that measures a layer on them and adds to `sums`."""

    def add(tokens: Tensor) -> None:
        x = _sample(tokens)
        packed = layer.packed
        weight = decode_whole(packed, torch.float32, layer.backend)
        oracle = x.double() @ weight.double().T
        for mode, index in measured:
            try:
                check_mode(mode, layer.in_features)
            except FormatError:
                # The mode cannot take this layer: no row, and `modes` will not choose it.
                continue
            outlying = (None, None) if index is None else (index, weight[:, index.long()])
            # A call of few rows runs as "exact" in every mode; what the mode costs shows with more, so zeros are put below.
            rows = nn.functional.pad(x, (0, 0, 0, max(0, WEIGHT_ONLY_M + 1 - x.shape[0])))
            y = dispatched(rows, packed, None, layer.backend, mode, outliers=outlying)[: x.shape[0]]
            total = sums[name, mode, _count(index)]
            total.error += (y.double() - oracle).square().sum().item()
            total.signal += oracle.square().sum().item()
            total.calls += 1

    return add


def _sample(tokens: Tensor) -> Tensor:
    if tokens.shape[0] <= _MAX_TOKENS:
        return tokens
    return tokens[torch.linspace(0, tokens.shape[0] - 1, _MAX_TOKENS, device=tokens.device).long()]


def _count(index: Tensor | None) -> int:
    return 0 if index is None else len(index)
