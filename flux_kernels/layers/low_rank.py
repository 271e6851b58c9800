"""The low-rank branch of a packed layer, and outlier channels in the same slot.

y = x @ W.T + bias + (x @ down.T) @ up.T.

A fused LoRA, a stored correction of the quantization error and the outlier channels of compute="int8" are one thing to the
kernels: a product hidden [M, r] @ up [N, r].T that is added in float32 before the result is rounded.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compute import Branch
from ..errors import FormatError
from .packed_rows import PackedRows

PARAMETERS = ("low_rank_down", "low_rank_up", "outlier_index", "outlier_weight")


def check_outliers(index: Tensor, k: int) -> Tensor:
    """Return outlier channels as int32 [count], sorted.

    Raises FormatError where they are no distinct channels of a row of k.
    """
    channels = index.detach().flatten().unique(sorted=True)
    integral = not index.dtype.is_floating_point and index.dtype != torch.bool
    if not integral or channels.numel() != index.numel() or channels[0] < 0 or channels[-1] >= k:
        raise FormatError(
            f"Outlier channels must be distinct integers from 0 to {k - 1}, got {index.dtype} {list(index.shape)} from "
            f"{channels[0].item()} to {channels[-1].item()}."
        )
    return channels.to(torch.int32)


class LowRankLayer(PackedRows):
    """Give a packed layer its optional branch.

    Its tensors are plain parameters of the layer itself, so that offloading moves them.

    Attributes:
        low_rank_down: [r, K] of a floating dtype, or None.
        low_rank_up: [N, r] of the same dtype, or None.
        outlier_index: int32 [k], the input channels that compute="int8" leaves to x's dtype, or None.
        outlier_weight: [N, k], the decoded columns of W at `outlier_index`, or None.
    """

    in_features: int
    out_features: int
    low_rank_down: nn.Parameter | None
    low_rank_up: nn.Parameter | None
    outlier_index: nn.Parameter | None
    outlier_weight: nn.Parameter | None

    def _no_branch(self) -> None:
        for name in PARAMETERS:
            self.register_parameter(name, None)

    @property
    def rank(self) -> int:
        """Return the rank of the branch, 0 where there is none."""
        return 0 if self.low_rank_down is None else self.low_rank_down.shape[0]

    def set_low_rank(self, down: Tensor | None, up: Tensor | None, *, trainable: bool = False) -> None:
        """Put a branch (x @ down.T) @ up.T on the packed weight; None removes it.

        It takes the place of the branch that was there.

        Args:
            down: [r, K] of a floating dtype, on the layer's device.
            up: [N, r] of the same dtype.
            trainable: whether the two require gradients.

        Raises:
            FormatError: on shapes, dtypes or devices that do not fit.
        """
        if down is None or up is None or down.numel() == 0:
            if (down is None) != (up is None):
                raise FormatError("A low-rank branch needs both down [r, K] and up [N, r], got only half of it.")
            self.low_rank_down = self.low_rank_up = None
            return
        problem = _misfit(self.in_features, self.out_features, {"low_rank_down": down, "low_rank_up": up})
        if problem is None and {down.device, up.device} != {self.qweight.device}:
            problem = f"low_rank_down is on {down.device}, low_rank_up on {up.device} and the layer on {self.qweight.device}."
        if problem is not None:
            raise FormatError(problem)
        for name, value in (("low_rank_down", down), ("low_rank_up", up)):
            setattr(self, name, nn.Parameter(value.detach(), requires_grad=trainable))

    def _hidden(self, x: Tensor) -> Tensor | None:
        """Return x @ down.T in x's dtype (autocast applies), or None."""
        return None if self.low_rank_down is None else F.linear(x, self.low_rank_down.to(x.dtype))

    def _branch(self) -> Branch | None:
        """Return (down [r, K], up [N, r]), or None."""
        if self.low_rank_down is None or self.low_rank_up is None:
            return None
        return self.low_rank_down, self.low_rank_up

    def _make_room(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """Make this layer fit a saved layer, its branch too."""
        return super()._make_room(state_dict, prefix) or self._fit_branch(state_dict, prefix)

    def _fit_branch(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """Make room for the branch of a saved layer; return what is wrong with it as a sentence, or None."""
        saved = {name: state_dict[prefix + name] for name in PARAMETERS if prefix + name in state_dict}
        problem = _misfit(self.in_features, self.out_features, saved)
        if problem is not None:
            return f'"{prefix}low_rank_down": {problem}'
        for name, value in saved.items():
            held = self._parameters.get(name)
            if held is None or held.shape != value.shape:
                self.register_parameter(
                    name, nn.Parameter(torch.empty_like(value, device=self.qweight.device), requires_grad=False)
                )
        return None


def _misfit(k: int, n: int, tensors: dict[str, Tensor]) -> str | None:
    """Return why the tensors of a branch do not belong to a layer [n, k], or None."""
    for first, second in (("low_rank_down", "low_rank_up"), ("outlier_index", "outlier_weight")):
        if (first in tensors) != (second in tensors):
            return f"{first} and {second} belong together, and the other is missing."
    if "low_rank_down" in tensors:
        down, up = tensors["low_rank_down"], tensors["low_rank_up"]
        if down.dim() != 2 or up.shape != (n, down.shape[0]) or down.shape[1] != k:
            return f"A branch of this layer has low_rank_down [r, {k}] and low_rank_up [{n}, r], got {_shapes(down, up)}."
        if not down.dtype.is_floating_point or up.dtype != down.dtype:
            return f"low_rank_down and low_rank_up must share a floating dtype, got {down.dtype} and {up.dtype}."
    if "outlier_index" in tensors:
        index, weight = tensors["outlier_index"], tensors["outlier_weight"]
        if index.dim() != 1 or index.dtype != torch.int32 or weight.shape != (n, index.shape[0]):
            return f"Outliers of this layer have outlier_index int32 [k] and outlier_weight [{n}, k], got {_shapes(index, weight)}."
    return None


def _shapes(first: Tensor, second: Tensor) -> str:
    return f"{list(first.shape)} and {list(second.shape)}"
