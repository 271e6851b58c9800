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

import torch
from torch import Tensor

from ..compute import Branch, mode_of_call
from ..formats import Packed
from . import two_stage
from .choice import choose
from .launching import aligned, device_of
from .modes import MODES
from .problem import Problem, Run

# M of the calls that a layer is asked about before it is called: a record may choose one algorithm for some and another for others.
_ROWS_ASKED = tuple(2**power for power in range(5, 15))


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

    The branch is added before y is rounded. `outliers` (index [k], weight [N, k]) are input channels that a mode which
    rounds x computes in x's dtype; the other modes compute all of them in it.
    """
    y = torch.empty(x.shape[0], weight.n, dtype=x.dtype, device=x.device)
    if y.numel():
        x = x if x.stride(-1) == 1 else x.contiguous()
        bias = None if bias is None else bias.contiguous()
        name = mode_of_call(compute, x.shape[0])
        mode = MODES[name]
        outliers = outliers if mode.takes_outliers else None
        # Channels that are left to x's dtype are added as a branch.
        added = branch is not None or outliers is not None
        with device_of(weight.data):
            choice = choose(name, weight.fmt, *y.shape, x.shape[1], x.device, x.dtype, added)
            mode.linear(x, aligned(weight), bias, y, branch, outliers, choice=choice)
    return y


def row_scale(weight: Packed, compute: str) -> Tensor | None:
    """Return what a mode needs to know of all rows of a weight and may keep: their scales, float32 [N].

    None where calls on this device never use scales of whole rows.
    """
    if not weight.n:
        return None
    for m in _ROWS_ASKED:
        chosen = choose(compute, weight.fmt, m, weight.n, weight.k, weight.data.device)
        if find := MODES[compute].row_scales.get(chosen.algorithm):
            with device_of(weight.data):
                return find(aligned(weight))
    return None


def prepare(problem: Problem, compute: str) -> Run:
    """Return what computes a product in a compute mode, M and N at least 1.

    The tensors it is given later are what `problem` says, contiguous, the rows at a 16-byte address, on the current device.
    """
    compute = mode_of_call(compute, problem.m)
    shape = problem.m, problem.n, problem.k
    choice = choose(compute, problem.fmt, *shape, problem.device, problem.dtype, problem.rank > 0)
    return MODES[compute].prepare(problem, choice)
