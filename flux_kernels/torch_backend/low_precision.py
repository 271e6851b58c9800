"""Torch twins of the int8 and fp16_accumulate kernels.

The same rounding steps, for CPU, tests and fidelity reports.

int8 products of one group are summed exactly here as in the kernel (the sums fit float32's 24 bits). fp16 accumulation is
modelled as tensor cores do it: products of 16 along K are summed exactly and added to the fp16 accumulator with one
rounding; the hardware's own order within those 16 is not documented.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..compute import PROMOTE_K, Branch, group_width
from ..formats import Packed
from .reference import dequantize

_SMALLEST, _STEPS = 1e-30, 1 / 127  # see kernels/activations.py
_MMA_K = 16
_CHUNK_PRODUCTS = 1 << 22  # partial sums held at a time


def quantize_groups(values: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Quantize float [..., K] to int8 codes in groups of K.

    Codes are held in float32 [..., K // group, group], scales are [..., K // group, 1].

    Symmetric: scale = amax / 127, codes = value / scale rounded to nearest even. A group that holds NaN or Inf gets the scale
    NaN. Bits are those of the compiled kernels: 1 / scale is correctly rounded, its product with a value is rounded once, to an
    integer (exact in float64 before that).
    """
    grouped = values.float().unflatten(-1, (-1, group))
    amax = grouped.abs().amax(-1, keepdim=True)
    scale = torch.where(amax > _SMALLEST, amax * _STEPS, 0.0) + amax * 0.0
    inverse = torch.where(scale > 0.0, 1.0 / torch.where(scale > 0.0, scale, 1.0), 0.0)
    codes = torch.round(grouped.double() * inverse.double()).float()
    return torch.nan_to_num(codes, nan=0.0), scale


def linear_int8(
    x: Tensor,
    weight: Packed,
    bias: Tensor | None,
    branch: Branch | None = None,
    row_scales: bool = False,
) -> Tensor:
    """Compute x [M, K] @ W.T + bias + branch with x and W quantized to int8 in groups of K.

    With `row_scales` a row of W has one scale, as cards whose int8 loop would be bound by the scales compute it.
    """
    group = group_width(x.shape[-1])
    codes, scale = quantize_groups(x, group)
    y = torch.empty(x.shape[0], weight.n, dtype=x.dtype, device=x.device)
    step = max(1, _CHUNK_PRODUCTS // max(1, x.shape[0] * codes.shape[1]))
    for start in range(0, weight.n, step):
        rows = slice(start, start + step)
        decoded = dequantize(weight.rows(rows), torch.float32)
        w_codes, w_scale = quantize_groups(decoded, weight.k if row_scales else group)
        w_codes = w_codes.flatten(1).unflatten(1, (-1, group))
        products = torch.einsum("mgk,ngk->gmn", codes, w_codes)
        scaled = products * scale.permute(1, 0, 2) * w_scale.permute(1, 2, 0)
        y[:, rows] = _with_bias(scaled.sum(0), bias, rows, branch).to(x.dtype)
    return y


def scale_to_fp16(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale tokens of x [M, K] by a power of two to |x| < 2.

    The results are float16 [M, K], and the undoing scale float32 [M, 1].
    """
    amax = x.float().abs().amax(-1, keepdim=True)
    exponent = (amax.view(torch.int32) >> 23 & 0xFF).clamp(1, 253)
    down, up = ((254 - exponent) << 23).view(torch.float32), (exponent << 23).view(torch.float32)
    return (x.float() * down).half(), up


def linear_fp16_accumulate(x: Tensor, weight: Packed, bias: Tensor | None, branch: Branch | None = None) -> Tensor:
    """Compute x [M, K] @ W.T + bias + branch in fp16.

    Sums over PROMOTE_K of K are added in float32; the result has x's dtype.
    """
    scaled, up = scale_to_fp16(x)
    steps = PROMOTE_K // _MMA_K
    parts = scaled.float().unflatten(-1, (-1, steps, _MMA_K))
    y = torch.empty(x.shape[0], weight.n, dtype=x.dtype, device=x.device)
    step = max(1, _CHUNK_PRODUCTS // max(1, x.shape[0] * parts.shape[1]))
    for start in range(0, weight.n, step):
        rows = slice(start, start + step)
        decoded = dequantize(weight.rows(rows), torch.float16).float().unflatten(-1, (-1, steps, _MMA_K))
        sums = torch.zeros((), dtype=torch.float16, device=x.device)
        for i in range(steps):
            sums = (sums.float() + torch.einsum("mgk,ngk->gmn", parts[:, :, i], decoded[:, :, i])).half()
        y[:, rows] = _with_bias(sums.float().sum(0) * up, bias, rows, branch).to(x.dtype)
    return y


def _with_bias(y: Tensor, bias: Tensor | None, rows: slice, branch: Branch | None) -> Tensor:
    """Add the bias and the branch of some output rows to y [M, rows] in float32."""
    y = y if bias is None else y + bias[rows].float()
    return y if branch is None else torch.addmm(y, branch[0].float(), branch[1][rows].float().T)
