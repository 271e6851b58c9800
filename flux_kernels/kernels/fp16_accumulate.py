"""compute="fp16_accumulate": scale tokens to fp16, then the fused GEMM with fp16 accumulation."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..compute import Branch
from ..formats import Packed
from .activations import scale_to_fp16_kernel
from .choice import Choice, choose
from .fp16_gemm import fp16_gemm_kernel
from .launching import Launch, all_aligned, pointers, table_of
from .problem import Problem, Run
from .tiles import SCALE_BLOCK


def linear(
    x: Tensor,
    weight: Packed,
    bias: Tensor | None,
    y: Tensor,
    branch: Branch | None = None,
    outliers: tuple[Tensor, Tensor] | None = None,
    choice: Choice | None = None,
) -> None:
    """Write x [M, K] @ weight.T + bias + branch to y [M, N].

    x has unit stride along K, K is a multiple of 64.

    `outliers` are not needed: every channel is computed in fp16.
    """
    choice = choice or choose("fp16_accumulate", weight.fmt, *y.shape, x.shape[1], x.device, x.dtype, branch is not None)
    prepare(Problem.of(x, weight, bias, branch), choice)(x, weight, bias, y, branch)


@lru_cache(maxsize=4096)
def prepare(problem: Problem, choice: Choice) -> Run:
    """Return what scales x and multiplies as chosen: everything but the tensors is looked up once."""
    m, n, k, tile = problem.m, problem.n, problem.k, choice.kernel_tile
    scaling = Launch(scale_to_fp16_kernel, (m,), (problem.stride,), dict(K=k, BLOCK_K=SCALE_BLOCK))
    blocks = dict(BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, TILE_K=tile.tile_k, LDMATRIX=tile.ldmatrix)
    constants, integers = problem.format_constants | blocks, (m, n, problem.rank)
    gemm = Launch(fp16_gemm_kernel, (tile.programs(m, n),), integers, constants, tile.options)

    def run(x: Tensor, weight: Packed, bias: Tensor | None, y: Tensor, branch: Branch | None) -> None:
        hidden, up = pointers(branch)
        scaled = torch.empty(m, k, dtype=torch.float16, device=x.device)
        scale = torch.empty(m, dtype=torch.float32, device=x.device)
        scaling(all_aligned(x), x, scaled, scale)
        operands = (scaled, scale, weight.data, table_of(weight), bias, hidden, up, y)
        gemm(all_aligned(weight.data, bias, hidden, up, y), *operands)

    return run
