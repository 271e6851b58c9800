"""Cases of test_launches.py, for a process in which kernels can be compiled (see test_stand_in.py)."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

import flux_kernels as fk
from bench.stand_in import CARDS, counting_compiler, stand_in
from flux_kernels.formats import FORMATS, Packed
from flux_kernels.kernels import exact, fp16_accumulate, int8, two_stage
from flux_kernels.kernels.choice import Choice, default_choice, tile_of
from flux_kernels.kernels.tiles import split_k_tile
from flux_kernels.machine.random_rows import random_rows

CAPABILITY = (8, 9)
TALL = 70_000  # rows of x, more than a grid's second axis takes


def tensors(format: str, m: int, n: int = 256, k: int = 256, dtype=torch.bfloat16):
    fmt = FORMATS[format]
    data = random_rows(fmt, n, k, fmt.planes)
    return torch.empty(m, k, dtype=dtype), data, torch.empty(n, dtype=dtype), torch.empty(m, n, dtype=dtype), fmt


@pytest.mark.parametrize("algorithm", ["small_m", "fused", "split_k", "two_stage", "fp16", "int8", "row_scales"])
def test_no_grid_ends_before_the_call_does(algorithm):
    """More than 65,535 rows of x, by every algorithm: only a grid's first axis takes as many programs."""
    with stand_in(CARDS["RTX 4090"], counting_compiler(Counter())):
        x, data, bias, y, fmt = tensors("Q4_K", TALL)
        if algorithm in ("int8", "row_scales"):
            tile = default_choice("int8", fmt, TALL, 256, 256, CAPABILITY).tile
            chosen = Choice("two_stage" if algorithm == "int8" else algorithm, tile, "")
            int8.linear(x, Packed(data, fmt, fmt.planes), bias, y, choice=chosen)
        elif algorithm == "fp16":
            chosen = default_choice("fp16_accumulate", fmt, TALL, 256, 256, CAPABILITY)
            fp16_accumulate.linear(x, Packed(data, fmt, fmt.planes), bias, y, choice=chosen)
        elif algorithm == "split_k":
            tile = replace(split_k_tile(fmt, TALL, 256, 256, CAPABILITY), tile_k=128, splits=2)
            exact.linear(x, Packed(data, fmt, fmt.planes), bias, y, choice=Choice(algorithm, tile, ""))
        else:
            chosen = Choice(algorithm, tile_of(algorithm, fmt, TALL, 256, 256, CAPABILITY), "")
            exact.linear(x, Packed(data, fmt, fmt.planes), bias, y, choice=chosen)


def test_a_program_for_every_row_is_for_few_rows():
    """The small-M kernel of tables and float32 has rows on its second axis: a driver refuses so many."""
    with stand_in(CARDS["RTX 4090"], counting_compiler(Counter())):
        x, data, bias, y, fmt = tensors("IQ4_NL", TALL)
        chosen = Choice("small_m", tile_of("small_m", fmt, TALL, 256, 256, CAPABILITY), "")
        with pytest.raises(RuntimeError, match="invalid argument"):
            exact.linear(x, Packed(data, fmt, fmt.planes), bias, y, choice=chosen)


def test_no_grid_ends_before_the_weight_does():
    """2.2 million output features decode (a grid's second axis is along K); no such weight is multiplied."""
    with stand_in(CARDS["RTX 4090"], counting_compiler(Counter())) as card:
        fmt = FORMATS["Q8_0"]
        two_stage.unpack(Packed(torch.empty(2_200_000, fmt.row_bytes(32), dtype=torch.uint8), fmt, fmt.planes), torch.float16)
        assert sum(card.launches.values()) == 1


@pytest.mark.parametrize("compute", ["exact", "int8", "fp16_accumulate"])
@pytest.mark.parametrize(("format", "m"), [("Q4_K", 1), ("IQ3_S", 64), ("Q4_K", 4608)])
def test_a_call_can_be_captured_after_one_eager_call(compute, format, m):
    """Nothing is compiled, loaded, read back or waited for then, and a lookup table is where it is needed."""
    with stand_in(CARDS["RTX 4090"]) as card, torch.no_grad():
        x, data, bias, _, fmt = tensors(format, m)
        layer = fk.GGUFLinear.from_packed(data, format, bias, planes=fmt.planes, compute=compute)
        layer(x)
        before = Counter(card.launches)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            layer(x)
        assert sum(card.launches.values()) == 2 * sum(before.values())


def test_tables_are_uploaded_when_a_layer_moves():
    """Not at its first call, which may be inside a CUDA graph's private pool."""
    with stand_in(CARDS["RTX 4090"], counting_compiler(Counter())):
        fmt = FORMATS["IQ3_S"]
        fmt._tables.pop(torch.device("cuda", 0), None)
        _, data, bias, _, _ = tensors("IQ3_S", 1)
        layer = fk.GGUFLinear.from_packed(data, "IQ3_S", bias, planes=fmt.planes)
        layer.to("cuda")
        assert torch.device("cuda", 0) in fmt._tables
        del fmt._tables[torch.device("cuda", 0)]


@pytest.mark.parametrize("compute", ["exact", "fp16_accumulate", "int8"])
def test_ranks_of_a_branch_share_their_kernels(compute):
    """Ranks 1, 16, 17 and 64 share kernels: the rank is not compiled in.

    Triton would take 1 and multiples of 16 for kernels of their own.
    """
    names: Counter[str] = Counter()
    with stand_in(CARDS["RTX 4090"], counting_compiler(names)):
        x, data, bias, _, fmt = tensors("Q4_K", 64)
        for rank in (16, 1, 17, 64):
            branch = torch.empty(64, rank, dtype=x.dtype), torch.empty(256, rank, dtype=x.dtype)
            torch.ops.flux_kernels.linear(x, data, bias, "Q4_K", "triton", compute, fmt.planes, *branch)
    assert names and set(names.values()) == {1}


@pytest.mark.parametrize("m", [1, 16, 17, 4608])
@pytest.mark.parametrize("format", ["Q4_K", "Q6_K", "IQ4_XS", "Q5_0"])  # all formats: bench/results/aot.csv
def test_float32_fits_every_geforce(format, m):
    """The library's own launch fits a card of 99 KiB shared memory; wide tiles took up to 170 KiB."""
    with stand_in(CARDS["RTX 3090"]) as card, torch.no_grad():
        x, data, bias, _, fmt = tensors(format, m, dtype=torch.float32)
        fk.linear(x, data, format, bias, planes=fmt.planes)
        assert card.launches
