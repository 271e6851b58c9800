"""Launch the Triton kernels.

The only module that `ops` imports from here, and only when the triton backend is asked for.

The decoder contract. Each format's row owns `decode_tile`, a JIT function that every kernel takes as a constexpr:

    decode_tile(row_ptr, block, i, table_ptr, NUM_BLOCKS, PLANES) -> float32 [BLOCK_N, 32]

row_ptr    [BLOCK_N] uint8 pointers to row starts (rows are NUM_BLOCKS blocks, contiguous)
block      index of the first block of the current tile (run time)
i          constexpr: which 32-weight slice, counted from the start of `block`
table_ptr  uint8 pointer to the format's lookup table (BlockFormat.table), unused where it has none
PLANES     constexpr: rows are stored field by field (Layout.to_planes)

The tile decoder must give the same float32 bits as the row's torch decode. A function is passed, never the row object:
Triton's cache key covers the source of a constexpr function, but not of a Python object's methods.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..compute import Branch, mode_of_call
from ..formats import Packed
from . import int8, two_stage
from .choice import choose
from .launching import aligned, device_of
from .modes import MODES
from .problem import Problem, Run

MODULES: dict[str, Any] = {mode: import_module(f".{mode}", __name__) for mode in MODES}
"""Compute mode -> the module that runs it, which has its name."""


def dequantize(weight: Packed, dtype: torch.dtype) -> Tensor:
    """Decode a weight to [N, K] of `dtype`; float32 bit-equal to the reference, 16 bit rounded once."""
    with device_of(weight.data):
        return two_stage.unpack(aligned(weight), dtype)


def linear(
    x: Tensor,
    weight: Packed,
    bias: Tensor | None,
    compute: str,
    branch: Branch | None = None,
    outliers: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Compute x [M, K] @ weight.T + bias + branch -> [M, N] in x's dtype, in a compute mode.

    The branch is added before y is rounded. `outliers` (index [k], weight [N, k]) are input channels that "int8" computes in
    x's dtype; the other modes compute all of them in it.
    """
    y = torch.empty(x.shape[0], weight.n, dtype=x.dtype, device=x.device)
    if y.numel():
        x = x if x.stride(-1) == 1 else x.contiguous()
        bias = None if bias is None else bias.contiguous()
        with device_of(weight.data):
            MODULES[mode_of_call(compute, x.shape[0])].linear(x, aligned(weight), bias, y, branch, outliers)
    return y


def row_scale(weight: Packed) -> Tensor | None:
    """Return what "int8" needs to know of all rows of a weight and may keep: their scales, float32 [N].

    None where calls on this device never use scales of whole rows.
    """
    if not weight.n or not int8.takes_row_scale(weight.fmt, weight.n, weight.k, weight.data.device):
        return None
    with device_of(weight.data):
        return int8.row_scale(aligned(weight))


def prepare(problem: Problem, compute: str) -> Run:
    """Return what computes a product in a compute mode, M and N at least 1.

    The tensors it is given later are what `problem` says, contiguous, the rows at a 16-byte address, on the current device.
    """
    compute = mode_of_call(compute, problem.m)
    shape = problem.m, problem.n, problem.k
    choice = choose(compute, problem.fmt, *shape, problem.device, problem.dtype, problem.rank > 0)
    return MODULES[compute].prepare(problem, choice)
