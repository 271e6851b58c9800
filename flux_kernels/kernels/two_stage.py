"""Two-stage: unpack the weight into a scratch, then torch's own matmul.

For calls of so many rows that writing the unpacked weight costs less than a decode which the product waits for (tiles.py has
the rows by card), for float32 activations, and for Turing, where Triton has no tensor-core code. The product is torch's own,
under torch's own flags. The scratch comes from torch's caching allocator on the current stream, so it is safe on several
streams and under CUDA graphs; chunks.py says how large it gets.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._triton import triton
from ..compute import Branch
from ..formats import Packed
from .chunks import chunks_of
from .dequantize import dequantize_kernel
from .launching import Launch, all_aligned, table_of
from .problem import Problem, Run
from .tiles import UNPACK_ROWS, largest_tile_k


def prepare(problem: Problem, rows: int | None) -> Run:
    """Return what computes a product from `rows` rows of the weight at a time (None: all).

    A branch is written to y first, rounded on its own, and added inside the product (cuBLAS adds in float32, rounds once).
    """
    chunks = [(chunk, _unpacking(problem, chunk.stop - chunk.start)) for chunk in chunks_of(problem.n, rows)]
    whole = chunks[0][1] if len(chunks) == 1 else None

    def run(x: Tensor, weight: Packed, bias: Tensor | None, y: Tensor, branch: Branch | None) -> None:
        bias = bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)
        if branch is not None:
            hidden, up = branch
            torch.mm(hidden, up.T, out=y) if bias is None else torch.addmm(bias, hidden, up.T, out=y)
        if whole is not None:
            _multiply(x, whole(weight), bias, y, branch is not None)
            return
        for chunk, unpack_chunk in chunks:
            # Not kept in a variable: the next chunk's scratch would be allocated before it is let go.
            _multiply(
                x, unpack_chunk(weight.rows(chunk)), None if bias is None else bias[chunk], y[:, chunk], branch is not None
            )

    return run


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, add: bool) -> None:
    """Write x @ weight.T + bias to y, or add the product to it.

    cuBLAS's epilogue adds the bias only where y is contiguous.
    """
    if add:
        y.addmm_(x, weight.T)
    elif bias is None:
        torch.mm(x, weight.T, out=y)
    else:
        torch.addmm(bias, x, weight.T, out=y)


def unpack(weight: Packed, dtype: torch.dtype) -> Tensor:
    """Decode a weight to [N, K] of `dtype`; float32 bit-equal to the reference, 16 bit rounded once."""
    if not weight.n * weight.k:
        return torch.empty(weight.n, weight.k, dtype=dtype, device=weight.data.device)
    return _unpacking(Problem.of_rows(weight, dtype), weight.n)(weight)


def _unpacking(problem: Problem, rows: int) -> Callable[[Packed], Tensor]:
    """Return what decodes `rows` packed rows to [rows, K] of the problem's dtype."""
    tile_k = largest_tile_k(problem.fmt, problem.k)
    grid = (triton.cdiv(rows, UNPACK_ROWS), problem.k // tile_k)
    launch = Launch(dequantize_kernel, grid, (rows,), problem.format_constants | dict(BLOCK_N=UNPACK_ROWS, TILE_K=tile_k))

    def run(weight: Packed) -> Tensor:
        y = torch.empty(rows, problem.k, dtype=problem.dtype, device=weight.data.device)
        launch(all_aligned(weight.data), weight.data, table_of(weight), y)
        return y

    return run
