"""Chunked two-stage: unpack a chunk of output features into a scratch that stays in L2, then torch's own matmul.

For cards whose tensor cores are too fast for a fused decode to hide behind (A100, H100, H200), and for Turing, where
Triton has no tensor-core code. The scratch comes from torch's caching allocator on the current stream, so it is safe on several
streams and under CUDA graphs; it holds at most a third of L2.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .._triton import triton
from ..formats import BlockFormat
from ..low_rank import Branch
from .dequantize import dequantize_kernel
from .launching import format_constants, table_of
from .tuning import UNPACK_ROWS, largest_tile_k

_UNKNOWN_L2 = 24 << 20  # bytes, where the device does not tell
_WHOLE_TILES = 128  # chunks are multiples of this many rows, as GEMM tiles are


def linear(
    x: Tensor, data: Tensor, bias: Tensor | None, y: Tensor, fmt: BlockFormat, planes: bool, branch: Branch | None = None
) -> None:
    """Write x [M, K] @ decode(data).T + bias + branch to y [M, N] chunk by chunk along N.

    A branch is written to y first, rounded on its own, and added inside the product (cuBLAS adds in float32, rounds once).
    """
    if branch is not None:
        hidden, up = branch
        torch.mm(hidden, up.T, out=y) if bias is None else torch.addmm(bias.to(x.dtype), hidden, up.T, out=y)
    rows = rows_per_chunk(x.shape[1], x.element_size(), x.device)
    for start in range(0, data.shape[0], rows):
        chunk = slice(start, start + rows)
        weight = unpack(data[chunk], fmt, x.dtype, planes)
        if branch is not None:
            y[:, chunk].addmm_(x, weight.T)
        elif bias is None:
            torch.mm(x, weight.T, out=y[:, chunk])
        else:
            torch.addmm(bias[chunk].to(x.dtype), x, weight.T, out=y[:, chunk])


def unpack(data: Tensor, fmt: BlockFormat, dtype: torch.dtype, planes: bool) -> Tensor:
    """Decode packed rows uint8 [N, row bytes] to [N, K] of `dtype`; float32 bit-equal to the reference, 16 bit rounded once."""
    n, row_bytes = data.shape
    constants = format_constants(fmt, row_bytes, planes)
    y = torch.empty(n, constants["K"], dtype=dtype, device=data.device)
    if y.numel():
        tile_k = largest_tile_k(fmt, constants["K"])
        grid = (triton.cdiv(n, UNPACK_ROWS), constants["K"] // tile_k)
        dequantize_kernel[grid](data, table_of(fmt, data), y, n, **constants, BLOCK_N=UNPACK_ROWS, TILE_K=tile_k)
    return y


@cache
def rows_per_chunk(k: int, itemsize: int, device: torch.device) -> int:
    """Return how many rows of `k` weights of `itemsize` bytes fill a third of L2, in whole tiles."""
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    l2 = getattr(properties, "L2_cache_size", 0) or _UNKNOWN_L2
    return max(1, l2 // 3 // (k * itemsize) // _WHOLE_TILES) * _WHOLE_TILES
