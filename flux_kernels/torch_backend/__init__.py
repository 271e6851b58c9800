"""The torch backend, on any device without Triton: the reference for "exact", the twins for the other compute modes.

Same functions, with the same signatures, as flux_kernels/kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..compute import Branch, join, mode_of_call, outlier_branch
from ..formats import BlockFormat
from . import cpu_decode, cpu_linear, cpu_threads, low_precision, reference


def dequantize(data: Tensor, fmt: BlockFormat, dtype: torch.dtype, planes: bool = False) -> Tensor:
    """Decode packed rows uint8 [N, row bytes] to [N, K] of `dtype`."""
    if cpu_decode.serves(data, dtype, planes):
        return cpu_decode.dequantize(data, fmt, dtype)
    return reference.dequantize(data, fmt, dtype, planes)


def row_scale(data: Tensor, fmt: BlockFormat, planes: bool = False) -> Tensor | None:
    """Return None: "int8" keeps nothing here."""
    return None


def linear(
    x: Tensor,
    data: Tensor,
    bias: Tensor | None,
    fmt: BlockFormat,
    compute: str,
    planes: bool = False,
    branch: Branch | None = None,
    outliers: tuple[Tensor, Tensor] | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """Compute x [M, K] @ decode(data [N, row bytes]).T + bias + branch -> [M, N] in x's dtype, in a compute mode.

    `outliers` (index [k], weight [N, k]) are input channels that "int8" computes in x's dtype; the other modes need none.
    `row_scale` is for kernels that give a row of the weight one scale: here groups of K have theirs.
    """
    compute = mode_of_call(compute, x.shape[0])
    if compute == "exact":
        if branch is None and cpu_linear.serves(x, data, fmt, planes):
            return cpu_linear.linear(x, data, bias, fmt)
        return reference.multiply(x, _weight(data, fmt, x.dtype, planes), bias, branch)
    if compute == "fp16_accumulate":
        return low_precision.linear_fp16_accumulate(x, data, fmt, bias, planes, branch)
    if outliers is not None:
        branch = join(branch, outlier_branch(x, outliers))
        x = x.index_fill(1, outliers[0].long(), 0.0)
    return low_precision.linear_int8(x, data, fmt, bias, planes, branch)


def _weight(data: Tensor, fmt: BlockFormat, dtype: torch.dtype, planes: bool) -> Tensor:
    """Decode a weight for one product; the result may be this thread's scratch, which the next call overwrites."""
    if cpu_decode.serves(data, dtype, planes):
        kept = cpu_threads.scratch().tensor("whole weight", dtype, data.shape[0], fmt.row_weights(data.shape[1]))
        return cpu_decode.dequantize(data, fmt, dtype, kept)
    return reference.dequantize(data, fmt, dtype, planes)
