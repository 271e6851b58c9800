"""The torch backend, on any device without Triton.

The reference for "exact", the twins for the other compute modes.

Same functions, with the same signatures, as flux_kernels/kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..compute import Branch, join, mode_of_call, outlier_branch
from ..formats import Packed
from . import cpu_decode, cpu_linear, cpu_threads, low_precision, reference


def dequantize(weight: Packed, dtype: torch.dtype) -> Tensor:
    """Decode a weight to [N, K] of `dtype`."""
    if cpu_decode.serves(weight, dtype):
        return cpu_decode.dequantize(weight, dtype)
    return reference.dequantize(weight, dtype)


def row_scale(weight: Packed, compute: str) -> Tensor | None:
    """Return None: no mode keeps anything here."""
    return None


def linear(
    x: Tensor,
    weight: Packed,
    bias: Tensor | None,
    compute: str,
    branch: Branch | None = None,
    outliers: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Compute x [M, K] @ weight.T + bias + branch -> [M, N] in x's dtype, in a compute mode.

    `outliers` (index [k], weight [N, k]) are input channels that "int8" computes in x's dtype; the other modes need none.
    Scales of whole rows are not used: here groups of K have theirs.
    """
    compute = mode_of_call(compute, x.shape[0])
    if compute == "exact":
        if branch is None and cpu_linear.serves(x, weight):
            return cpu_linear.linear(x, weight, bias)
        return reference.multiply(x, _decoded(weight, x.dtype), bias, branch)
    if compute == "fp16_accumulate":
        return low_precision.linear_fp16_accumulate(x, weight, bias, branch)
    if outliers is not None:
        branch = join(branch, outlier_branch(x, outliers))
        x = x.index_fill(1, outliers[0].long(), 0.0)
    return low_precision.linear_int8(x, weight, bias, branch)


def _decoded(weight: Packed, dtype: torch.dtype) -> Tensor:
    """Decode a weight for one product.

    The result may be this thread's scratch, which the next call overwrites.
    """
    if cpu_decode.serves(weight, dtype):
        kept = cpu_threads.scratch().tensor("whole weight", dtype, weight.n, weight.k)
        return cpu_decode.dequantize(weight, dtype, kept)
    return reference.dequantize(weight, dtype)
