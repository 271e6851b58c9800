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
from ..formats import Packed

CHUNK_WEIGHTS = 1 << 19  # weights decoded at a time: 2 MiB in float32


def decode_rows(weight: Packed) -> Tensor:
    """Decode packed rows at once to float32 [..., K], bit-equal to libggml."""
    fmt = weight.fmt
    fields = fmt.layout.split(weight.data, weight.planes)
    if fmt.table is not None:
        fields["table"] = fmt.table_on(weight.data.device)
    return fmt.decode(**fields).flatten(-2)


def dequantize(weight: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decode packed rows to `dtype`.

    Args:
        weight: [..., N, K] or one row, whole blocks in the last dimension.
        dtype: of the result; float32 is bit-equal to libggml, a 16-bit type is the float32 value rounded once.

    Returns:
        [..., N, K], contiguous.
    """
    k, data = weight.k, weight.data
    shape = (*data.shape[:-1], k)
    if torch.compiler.is_compiling():
        return decode_rows(weight).to(dtype)
    rows = weight._replace(data=data.reshape(-1, data.shape[-1]))
    step = _rows_per_chunk(k)
    if rows.n <= step:
        return decode_rows(rows).to(dtype).reshape(shape)
    out = torch.empty(rows.n, k, dtype=dtype, device=data.device)
    for start in range(0, rows.n, step):
        out[start : start + step] = decode_rows(rows.rows(slice(start, start + step)))
    return out.reshape(shape)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, branch: Branch | None) -> Tensor:
    """Compute x @ weight.T + bias + hidden @ up.T of a weight [N, K] that was decoded to x's dtype.

    A branch runs as further columns of K, [x, hidden] @ [weight, up].T: one product, rounded once.
    """
    if branch is not None:
        x, weight = torch.cat([x, branch[0]], -1), torch.cat([weight, branch[1]], -1)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _rows_per_chunk(k: int) -> int:
    """Return how many rows of `k` weights make one chunk (at least 1)."""
    return max(1, CHUNK_WEIGHTS // k)
