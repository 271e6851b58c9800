"""compute="int8": quantize x, unpack the weight (or a chunk of its output features) to int8, and multiply.

The algorithm "two_stage" gives a weight one scale per row and group of K, "row_scales" one per row (see
tuning.choose_int8_algorithm); chunks.py says how much of the weight is unpacked at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._triton import triton
from ..compute import group_width
from ..formats import BlockFormat
from ..low_rank import Branch, join, outlier_branch
from .activations import quantize_activation_kernel
from .choice import Choice, choose
from .chunks import chunks_of
from .int8_gemm import int8_gemm_kernel
from .launching import format_constants, pointers, table_of
from .tuning import QUANTIZE_ROWS, UNPACK_ROWS, Tile, largest_tile_k
from .unpack_int8 import row_largest_kernel, unpack_int8_kernel


def linear(
    x: Tensor,
    data: Tensor,
    bias: Tensor | None,
    y: Tensor,
    fmt: BlockFormat,
    planes: bool,
    branch: Branch | None = None,
    outliers: tuple[Tensor, Tensor] | None = None,
    choice: Choice | None = None,
) -> None:
    """Write x [M, K] @ decode(data).T + bias + branch to y [M, N], both operands rounded to int8 with group scales.

    The input channels of `outliers` (index [k], weight [N, k]) are left out of the int8 product and join the branch.
    """
    n, k = data.shape[0], fmt.row_weights(data.shape[1])
    keep = None
    if outliers is not None:
        branch = join(branch, outlier_branch(x, outliers))
        keep = torch.ones(k, dtype=torch.uint8, device=x.device).index_fill_(0, outliers[0].long(), 0)
    hidden, up, _ = pointers(branch)
    x_codes, x_scale = quantize_activation(x, group_width(k), keep)
    choice = choice or choose("int8", fmt, x.shape[0], n, k, x.device, x.dtype, branch is not None)
    row_scales = choice.algorithm == "row_scales"
    for chunk in chunks_of(n, choice.rows):
        w_codes, w_scale = unpack_weight(data[chunk], fmt, group_width(k), planes, row_scales)
        bias_chunk, up_chunk = (None if part is None else part[chunk] for part in (bias, up))
        _gemm(x_codes, x_scale, w_codes, w_scale, bias_chunk, hidden, up_chunk, y[:, chunk], choice.tile)
        del w_codes, w_scale  # or the next chunk's scratch would be allocated beside them


def quantize_activation(x: Tensor, group: int, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize x [M, K] to int8 codes [M, K] and float32 scales [K // group, M]; channels with keep [K] = 0 become zeros."""
    m, k = x.shape
    codes = torch.empty(m, k, dtype=torch.int8, device=x.device)
    scale = torch.empty(k // group, m, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(m, QUANTIZE_ROWS), k // group)
    quantize_activation_kernel[grid](x, keep, codes, scale, m, x.stride(0), K=k, GROUP=group, BLOCK_M=QUANTIZE_ROWS)
    return codes, scale


def unpack_weight(data: Tensor, fmt: BlockFormat, group: int, planes: bool, row_scales: bool = False) -> tuple[Tensor, Tensor]:
    """Unpack packed rows to int8 codes [N, K] and float32 scales [K // group, N], or [1, N] with `row_scales`."""
    n = data.shape[0]
    constants = format_constants(fmt, data.shape[1], planes)
    k, table = constants["K"], table_of(fmt, data)
    codes = torch.empty(n, k, dtype=torch.int8, device=data.device)
    scale = torch.empty(1 if row_scales else k // group, n, dtype=torch.float32, device=data.device)
    tile_k = max(group, largest_tile_k(fmt, k))
    grid = (triton.cdiv(n, UNPACK_ROWS), k // tile_k)
    blocks = dict(BLOCK_N=UNPACK_ROWS, TILE_K=tile_k)
    largest = None
    if row_scales:
        parts = torch.empty(k // tile_k, n, dtype=torch.float32, device=data.device)
        row_largest_kernel[grid](data, table, parts, n, **constants, **blocks)
        largest = parts.amax(0)  # torch's maximum keeps NaN
    unpack_int8_kernel[grid](data, table, largest, codes, scale, n, **constants, GROUP=group, **blocks)
    return codes, scale


def _gemm(x_codes, x_scale, w_codes, w_scale, bias, hidden, up, y: Tensor, tile: Tile) -> None:
    m, n = y.shape
    rank = 0 if hidden is None else hidden.shape[1]
    grid = (triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)
    k, group = x_codes.shape[1], x_codes.shape[1] // x_scale.shape[0]
    int8_gemm_kernel[grid](
        *(x_codes, x_scale, w_codes, w_scale, bias, hidden, up, y, m, n, rank, y.stride(0)),
        K=k,
        GROUP=group,
        ROW_SCALES=w_scale.shape[0] == 1 and k > group,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
