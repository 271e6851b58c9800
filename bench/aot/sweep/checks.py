"""Run a case on an absent card and compare: each check is an error and the bound it must keep.

Bounds count roundings. A float32 sum of n terms in any order is off by at most n u times the sum of their magnitudes, u = 2^-24;
the result is then rounded once to the dtype of y. The interpreter sums the 16 products of one tensor-core instruction exactly, so
a product of K has K / 16 roundings there; float32 products on the plain units have K.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import sqrt

import torch
from torch import Tensor

from flux_kernels import kernels
from flux_kernels.compute import PROMOTE_K, group_width
from flux_kernels.kernels import exact, int8
from flux_kernels.kernels.choice import Choice, choose, tile_of
from flux_kernels.kernels.tiles import codes_serve, int8_tile, split_k_tile
from flux_kernels.torch_backend import low_precision

from ..ptx.driver import AbsentCard
from .cases import Case
from .inputs import RANK, Inputs, K

_UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # largest relative rounding error
_SMALLEST = {torch.float32: 2.0**-150, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}  # half a subnormal step
_MMA_K = 16
SPLITS = 2
# Codes that one fused multiply-add rounds to the other side of a tie differ by 1, which is sqrt(12) times the RMS of a rounding
# error; with at most 1 % of them (0.14 % were counted) results differ by sqrt(12 * 0.01) = 0.35 of the quantization error.
_FLIPPED = sqrt(12 * 0.01)


@dataclass(frozen=True)
class Check:
    """Hold what was compared, the largest error over its bound (at most 1 is right), and the error itself."""

    what: str
    ratio: float
    error: float


def check(case: Case, inputs: Inputs, card: AbsentCard) -> list[Check]:
    """Run a case on the active card; raise Fault where its code does what a GPU would not forgive."""
    return _CHECKS[case.kernel.removesuffix("_branch")](case, inputs, card)


def _within(what: str, y: Tensor, expected: Tensor, bound: Tensor | float) -> Check:
    error = (y.double() - expected.double()).abs()
    error = torch.where(error.isnan(), torch.inf, error)
    ratio = error / bound if isinstance(bound, Tensor) else error / (bound or 2.0**-200)
    return Check(what, float(torch.nan_to_num(ratio, nan=0.0, posinf=torch.inf).max()), float(error.max()))


def _same(what: str, y: Tensor, expected: Tensor) -> Check:
    wrong = (y != expected) & ~(y.isnan() & expected.isnan())
    return Check(what, torch.inf if wrong.any() else 0.0, float(wrong.sum()))


def _rounded_once(y: Tensor, dtype: torch.dtype, error: Tensor) -> Tensor:
    """Return the bound of a result that is off by `error` before it is rounded to `dtype`."""
    return error + _UNIT[dtype] * (y.abs() + error) + _SMALLEST[dtype]


def _dequantize(case: Case, inputs: Inputs, card: AbsentCard) -> list[Check]:
    y = kernels.dequantize(inputs.packed, inputs.dtype)
    return [_same("weights rounded once", card.allocations.check(y), inputs.weight.to(inputs.dtype))]


def _exact(roundings: Callable[[Inputs], int], choice: Callable[[Case, Inputs], Choice]):
    def run(case: Case, inputs: Inputs, card: AbsentCard) -> list[Check]:
        y = torch.empty(inputs.x.shape[0], inputs.data.shape[0], dtype=inputs.dtype)
        operands = (inputs.x, inputs.packed, inputs.bias, y, inputs.branch)
        exact.linear(*operands, choice=choice(case, inputs))
        expected, magnitude = inputs.exact(inputs.dtype)
        bound = _rounded_once(expected, inputs.dtype, roundings(inputs) * 2.0**-24 * magnitude)
        return [_within("y", card.allocations.check(y), expected, bound)]

    return run


def _mma_roundings(inputs: Inputs) -> int:
    each = 1 if inputs.dtype == torch.float32 else _MMA_K
    return K // each + -(-RANK // each) + SPLITS + 1


def _small_m_roundings(inputs: Inputs) -> int:
    # Slices of 32 reduced in 5 levels, a product each, branch and bias.
    return K // 32 + 5 + 1 + RANK + 1


def _small_m(case: Case, inputs: Inputs, card: AbsentCard) -> list[Check]:
    """Bound the error by that of torch, which rounds weights and result: codes are not rounded before."""
    if not codes_serve(inputs.fmt, divmod(case.capability, 10), inputs.dtype):
        return _exact(_small_m_roundings, _shipped)(case, inputs, card)
    y = kernels.linear(inputs.x, inputs.packed, inputs.bias, "exact", inputs.branch)
    expected, _ = inputs.exact(torch.float32)
    rounded, _ = inputs.exact(inputs.dtype)
    return [_no_worse("against rounded weights", card.allocations.check(y), rounded.to(inputs.dtype), expected, 1.0)]


def _shipped(case: Case, inputs: Inputs) -> Choice:
    """Return what such a call launches."""
    shape = (inputs.x.shape[0], inputs.data.shape[0], K)
    return choose("exact", inputs.fmt, *shape, inputs.x.device, inputs.dtype, inputs.branch is not None)


def _fused(case: Case, inputs: Inputs) -> Choice:
    """Return the fused kernel, which such calls launch on some cards and tuning tries on the others."""
    shape, capability = (inputs.x.shape[0], inputs.data.shape[0], K), divmod(case.capability, 10)
    return Choice("fused", tile_of("fused", inputs.fmt, *shape, capability, inputs.branch is not None), "named by the sweep")


def _split(case: Case, inputs: Inputs) -> Choice:
    tile = split_k_tile(inputs.fmt, inputs.x.shape[0], inputs.data.shape[0], K, divmod(case.capability, 10))
    return Choice("split_k", replace(tile, splits=SPLITS), "named by the sweep")


def _fp16(case: Case, inputs: Inputs, card: AbsentCard) -> list[Check]:
    """Sums of 64 products are rounded to fp16 four times; x is rounded to fp16 after scaling (|x| < 2)."""
    y = kernels.linear(inputs.x, inputs.packed, inputs.bias, "fp16_accumulate", inputs.branch)
    expected, magnitude = inputs.exact(torch.float16)
    half = _UNIT[torch.float16]
    largest = inputs.x.double().abs().amax(1, keepdim=True)
    scaled_away = largest * _SMALLEST[torch.float16] * inputs.weight.double().abs().sum(1)
    error = (half * (PROMOTE_K // _MMA_K + 1) + _mma_roundings(inputs) * 2.0**-24) * magnitude * (1 + half) + scaled_away
    twin = low_precision.linear_fp16_accumulate(inputs.x, inputs.packed, inputs.bias, inputs.branch)
    bound = _rounded_once(expected, inputs.dtype, error)
    return [_within("y", card.allocations.check(y), expected, bound), _no_worse("against the twin", y, twin, expected, 2.0)]


def _no_worse(what: str, y: Tensor, twin: Tensor, expected: Tensor, times: float) -> Check:
    ours, theirs = (float((result.double() - expected).square().mean().sqrt()) for result in (y, twin))
    return Check(what, ours / (times * theirs), ours)


def _int8(row_scales: bool):
    def run(case: Case, inputs: Inputs, card: AbsentCard) -> list[Check]:
        y = torch.empty(inputs.x.shape[0], inputs.data.shape[0], dtype=inputs.dtype)
        choice = Choice("row_scales" if row_scales else "two_stage", int8_tile(y.shape[0]), "named by the sweep")
        operands = (inputs.x, inputs.packed, inputs.bias, y, inputs.branch)
        int8.linear(*operands, choice=choice)
        twin = low_precision.linear_int8(inputs.x, inputs.packed, inputs.bias, inputs.branch, row_scales)
        expected, _ = inputs.exact(torch.float32)
        apart = (card.allocations.check(y).double() - twin.double()).square().mean().sqrt()
        quantized = (twin.double() - expected).square().mean().sqrt()
        same = Check("against the twin", float(apart / (_FLIPPED * quantized)), float(apart))
        return [_no_worse("y", y, twin, expected, 2.0), same]

    return run


def compare_codes(what: str, codes: Tensor, scale: Tensor, values: Tensor, group: int) -> list[Check]:
    """Hold int8 codes [N, K] and scales [K // group, N] to the twin, bit for bit.

    A fused multiply-add is one rounding, as there. Where a scale is NaN the codes mean nothing.
    """
    twin_codes, twin_scale = low_precision.quantize_groups(values, group)
    meant = (~twin_scale.isnan()).expand_as(twin_codes).flatten(-2)
    codes = torch.where(meant, codes.float(), twin_codes.flatten(-2))
    return [_same(f"{what} scales", scale.T, twin_scale.squeeze(-1)), _same(f"{what} codes", codes, twin_codes.flatten(-2))]


def _unpack(row_scales: bool):
    def run(case: Case, inputs: Inputs, card: AbsentCard) -> list[Check]:
        group = group_width(K)
        codes, scale = int8.unpack_weight(inputs.packed, group, row_scales)
        codes, scale = card.allocations.check(codes), card.allocations.check(scale)
        return compare_codes("weight", codes, scale, inputs.weight, K if row_scales else group)

    return run


def _quantize_activation(case: Case, inputs: Inputs, card: AbsentCard) -> list[Check]:
    group = group_width(K)
    codes, scale = int8.quantize_activation(inputs.x, group)
    codes, scale = card.allocations.check(codes), card.allocations.check(scale)
    return compare_codes("activation", codes, scale, inputs.x.float(), group)


_CHECKS = {
    "dequantize": _dequantize,
    "narrow": _exact(_mma_roundings, _shipped),
    **dict.fromkeys(("medium", "wide"), _exact(_mma_roundings, _fused)),
    "split_k": _exact(_mma_roundings, _split),
    "small_m": _small_m,
    "fp16": _fp16,
    "unpack_int8": _unpack(row_scales=False),
    "unpack_int8_rows": _unpack(row_scales=True),
    "quantize_activation": _quantize_activation,
    "int8": _int8(row_scales=False),
    "int8_rows": _int8(row_scales=True),
}
