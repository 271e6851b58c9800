"""compute="fp16_accumulate": scale tokens to fp16, then the fused GEMM with fp16 accumulation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from ..compute import DATACENTER, Branch
from ..formats import SUPERBLOCK, Packed
from .activations import scale_to_fp16_kernel
from .candidates import Candidate, fitting_memory, tiles_of, ways_to_load
from .fp16_gemm import fp16_gemm_kernel
from .launching import Launch, all_aligned, pointers, table_of
from .problem import Call, Choice, Problem, Run
from .tiles import SCALE_BLOCK, fp16_tile


def linear(
    x: Tensor,
    weight: Packed,
    bias: Tensor | None,
    y: Tensor,
    branch: Branch | None = None,
    outliers: tuple[Tensor, Tensor] | None = None,
    *,
    choice: Choice,
) -> None:
    """Write x [M, K] @ weight.T + bias + branch to y [M, N].

    x has unit stride along K, K is a multiple of 64.

    `outliers` are not needed: every channel is computed in fp16.
    """
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


def default(call: Call) -> Choice:
    """Choose for a call where no measurement says otherwise."""
    return Choice("fused", fp16_tile(call.fmt, call.k, call.capability, call.branch), "decodes in registers")


def candidates(call: Call) -> Iterator[Candidate]:
    """Yield what tuning tries for a call."""
    # The mode is refused there.
    if call.capability in DATACENTER:
        return
    # Sums in fp16 and in float32: 128 x 128 spills for superblocks (112 and 153 accesses on sm_86), larger tiles for all.
    most = 128 * 128 - (call.fmt.block_size == SUPERBLOCK)
    tiles = [tile for tile in tiles_of(call) if tile.block_m * tile.block_n <= most]
    tried = (Candidate("fused", tile) for tile in tiles if tile.tile_k % 64 == 0)
    yield from fitting_memory(call, ways_to_load(call, tried), torch.float16.itemsize)
