"""The torch backend: decode packed rows in float32 and multiply, on any torch device, without Triton.

The decode of a row chunk writes several intermediates as large as the chunk. Row chunks keep them in the CPU's cache (and
bound the peak memory to the result plus a few chunks), which is worth a factor of 4 to 6 there: 3072 x 3072 of
Q4_K to bfloat16 on one core take 10 ms instead of 66.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compute import Branch
from ..formats import BlockFormat

CHUNK_WEIGHTS = 1 << 19  # weights decoded at a time: 2 MiB in float32


def decode_rows(data: Tensor, fmt: BlockFormat, planes: bool = False) -> Tensor:
    """Decode packed rows in one piece: uint8 [..., row bytes] -> float32 [..., K], bit-equal to libggml."""
    fields = fmt.layout.split(data, planes)
    if fmt.table is not None:
        fields["table"] = fmt.table_on(data.device)
    return fmt.decode(**fields).flatten(-2)


def dequantize(data: Tensor, fmt: BlockFormat, dtype: torch.dtype = torch.float32, planes: bool = False) -> Tensor:
    """Decode packed rows to `dtype`.

    Args:
        data: uint8 [..., N, row bytes], whole blocks in the last dimension.
        fmt: the row of the block type.
        dtype: of the result; float32 is bit-equal to libggml, a 16-bit type is the float32 value rounded once.
        planes: whether the rows are stored field by field (`Layout.to_planes`).

    Returns:
        [..., N, K], contiguous.
    """
    k = fmt.row_weights(data.shape[-1])
    shape = (*data.shape[:-1], k)
    if torch.compiler.is_compiling():
        return decode_rows(data, fmt, planes).to(dtype)
    rows = data.reshape(-1, data.shape[-1])
    step = _rows_per_chunk(k)
    if rows.shape[0] <= step:
        return decode_rows(rows, fmt, planes).to(dtype).reshape(shape)
    out = torch.empty(rows.shape[0], k, dtype=dtype, device=data.device)
    for start in range(0, rows.shape[0], step):
        out[start : start + step] = decode_rows(rows[start : start + step], fmt, planes)
    return out.reshape(shape)


def linear(
    x: Tensor,
    data: Tensor,
    fmt: BlockFormat,
    bias: Tensor | None = None,
    planes: bool = False,
    branch: Branch | None = None,
) -> Tensor:
    """Compute x @ W.T + bias + hidden @ up.T with W decoded to x's dtype.

    A branch runs as further columns of K, x beside hidden and W beside up: one product, rounded once.

    Args:
        x: [..., K] of a floating dtype, in which the product is computed.
        data: uint8 [N, row bytes].
        bias: [N] or None, cast to x's dtype.
        branch: hidden [..., r] and up [N, r] of x's dtype, or None.

    Returns:
        [..., N] of x's dtype.
    """
    return multiply(x, dequantize(data, fmt, x.dtype, planes), bias, branch)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, branch: Branch | None) -> Tensor:
    """Compute x @ weight.T + bias + hidden @ up.T of a weight [N, K] that was decoded to x's dtype."""
    if branch is not None:
        x, weight = torch.cat([x, branch[0]], -1), torch.cat([weight, branch[1]], -1)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _rows_per_chunk(k: int) -> int:
    """Return how many rows of `k` weights make one chunk (at least one)."""
    return max(1, CHUNK_WEIGHTS // k)
