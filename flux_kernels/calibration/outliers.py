"""Outlier channels: the few input channels of a layer that set the int8 scale of their neighbours.

An activation group of 128 shares one int8 scale, so one channel 30 times larger than its neighbours costs them five bits. Left
out of the int8 product and computed in 16 bit, k channels cost k / K of the layer's products at half or a quarter of the rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from ..compute import group_width
from ..errors import FormatError
from ..layers.adapters import without_adapters
from ..layers.fused_linear import FusedLinear
from ..layers.linear import GGUFLinear
from ..layers.low_rank import check_outliers
from .listen import listen

# Channels at a time: the shortest K of a tensor-core product, to which kernels pad.
STEP = 16
# Share of the expected squared error that further channels must save: sampled sizes alone scatter by a fifth.
MIN_GAIN = 0.5


def find_outliers(rms: Tensor, share: float) -> Tensor | None:
    """Choose the channels to leave out of an int8 product.

    The error of a group grows with the square of its largest channel, so channels are taken by size, STEP at a time, where
    that saves MIN_GAIN of the sum over groups of their largest remaining channel squared.

    Args:
        rms: [K], root mean square of each channel over tokens.
        share: of K at most, rounded up to whole steps; 0.01 is 1 %.

    Returns:
        int32 [k], sorted, or None where no step pays.
    """
    k = rms.shape[0]
    order = rms.argsort(descending=True)
    most = min(k, -int(-share * k // STEP) * STEP)

    def expected(count: int) -> float:
        left = rms.double().index_fill(0, order[:count], 0.0)
        return left.unflatten(0, (-1, group_width(k))).amax(1).square().sum().item()

    best, error = 0, expected(0)
    for count in range(STEP, most + 1, STEP):
        smaller = expected(count)
        if smaller < (1 - MIN_GAIN) * error:
            best, error = count, smaller
    return order[:best].sort().values.to(torch.int32) if best else None


def keep_outliers(model: nn.Module, channels: Mapping[str, Tensor]) -> None:
    """Let compute="int8" compute some input channels of some layers in the activations' dtype.

    All layers are checked before the first is touched. Layers that are not named keep none. The channels of a layer cost 16 bits per channel and output feature of memory.

    Args:
        model: a model with packed layers.
        channels: layer name -> integers [k], such as `FidelityReport.outliers(threshold)`; empty undoes all.

    Raises:
        FormatError: for a name that is no packed layer, channels that do not fit, and layers that are offloaded now.
    """
    layers = {without_adapters(name): layer for name, layer in model.named_modules() if isinstance(layer, GGUFLinear)}
    if not isinstance(channels, Mapping):
        raise FormatError(
            f"channels is a map of layer names to channels, as report.outliers(0.02) of a FidelityReport gives it, got "
            f"{type(channels).__name__}; an empty map undoes all."
        )
    channels = {without_adapters(name): torch.as_tensor(index) for name, index in channels.items()}
    for name, index in channels.items():
        layer = layers.get(name)
        if layer is None:
            raise FormatError(f"{name!r} is no packed layer of this model. Names are those of model.named_modules().")
        if isinstance(layer, FusedLinear):
            raise FormatError(
                f"{name!r} is a fused layer, which takes no outlier channels. Call unfuse_projections(model) first."
            )
        if layer.qweight.is_meta and hasattr(layer, "_hf_hook"):
            raise FormatError(f"{name!r} is offloaded. Call keep_outliers before offloading is enabled.")
        if index.numel():
            check_outliers(index, layer.in_features)
    for name, layer in layers.items():
        if not isinstance(layer, FusedLinear):
            layer.keep_outliers(channels.get(name))


class ChannelSizes:
    """Sum up the squares of each input channel of each layer over the calls of a model, by hooks."""

    def __init__(self, layers: Mapping[str, GGUFLinear]):
        """Start to listen; call `remove` when the model has run."""
        self.sums: dict[str, tuple[Tensor, int]] = {}
        listened = ((name, layer) for name, layer in layers.items() if not isinstance(layer, FusedLinear))
        self._hooks = [listen(layer, partial(self._add, name)) for name, layer in listened]

    def _add(self, name: str, x: Tensor) -> None:
        total, count = self.sums.get(name, (0.0, 0))
        self.sums[name] = (total + x.float().square().sum(0).double(), count + x.shape[0])

    def remove(self) -> None:
        """Stop listening."""
        for hook in self._hooks:
            hook.remove()

    def outliers(self, share: float) -> dict[str, Tensor]:
        """Return layer -> channels for the layers where leaving some out pays."""
        rms = {name: (total / count).sqrt() for name, (total, count) in self.sums.items() if count}
        channels = {name: find_outliers(sizes, share) for name, sizes in rms.items()}
        return {name: index for name, index in channels.items() if index is not None}
