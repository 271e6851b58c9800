"""Two-stage: unpack the weight (or a chunk of its output features) into a scratch, then torch's own matmul.

For cards whose tensor cores are too fast for a fused decode to hide behind (A100, H100, H200), for float32 activations, and for
Turing, where Triton has no tensor-core code. The scratch comes from torch's caching allocator on the current stream, so it is
safe on several streams and under CUDA graphs; chunks.py says how large it gets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._triton import triton
from ..formats import BlockFormat
from ..low_rank import Branch
from .chunks import chunks_of
from .dequantize import dequantize_kernel
from .launching import format_constants, table_of
from .tuning import UNPACK_ROWS, largest_tile_k


def linear(
    x: Tensor,
    data: Tensor,
    bias: Tensor | None,
    y: Tensor,
    fmt: BlockFormat,
    planes: bool,
    branch: Branch | None = None,
    rows: int | None = None,
) -> None:
    """Write x [M, K] @ decode(data).T + bias + branch to y [M, N], `rows` rows of the weight at a time (None: all at once).

    A branch is written to y first, rounded on its own, and added inside the product (cuBLAS adds in float32, rounds once).
    """
    bias = None if bias is None else bias.to(x.dtype)
    if branch is not None:
        hidden, up = branch
        torch.mm(hidden, up.T, out=y) if bias is None else torch.addmm(bias, hidden, up.T, out=y)
    for chunk in chunks_of(data.shape[0], rows):
        weight = unpack(data[chunk], fmt, x.dtype, planes)
        out = y[:, chunk]  # contiguous where the chunk is the whole weight, which cuBLAS's epilogue asks for to add a bias
        if branch is not None:
            out.addmm_(x, weight.T)
        elif bias is None:
            torch.mm(x, weight.T, out=out)
        else:
            torch.addmm(bias[chunk], x, weight.T, out=out)
        del weight  # or the next chunk's scratch would be allocated beside it


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
