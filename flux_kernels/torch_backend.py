"""The torch backend, on any device without Triton: the reference for "exact", the twins for the other compute modes.

Same two functions, with the same signatures, as flux_kernels/kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import low_precision, reference
from .compute import WEIGHT_ONLY_M
from .formats import BlockFormat


def dequantize(data: Tensor, fmt: BlockFormat, dtype: torch.dtype, planes: bool = False) -> Tensor:
    """Decode packed rows uint8 [N, row bytes] to [N, K] of `dtype`."""
    return reference.dequantize(data, fmt, dtype, planes)


def linear(x: Tensor, data: Tensor, bias: Tensor | None, fmt: BlockFormat, compute: str, planes: bool = False) -> Tensor:
    """Compute x [M, K] @ decode(data [N, row bytes]).T + bias -> [M, N] in x's dtype, in a compute mode."""
    if compute == "exact" or x.shape[0] <= WEIGHT_ONLY_M:
        return reference.linear(x, data, fmt, bias, planes)
    twin = low_precision.linear_int8 if compute == "int8" else low_precision.linear_fp16_accumulate
    return twin(x, data, fmt, bias, planes)
