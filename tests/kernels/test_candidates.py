"""What is tried: legal candidates, none twice, and none that the compile-time report rules out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from bench.aot.cards import CARDS
from flux_kernels.benchmark.record import CHECKOUT, read_csv
from flux_kernels.formats import FORMATS
from flux_kernels.kernels import record
from flux_kernels.kernels.candidates import Candidate, least_shared_bytes, shared_limit
from flux_kernels.kernels.choice import candidates
from flux_kernels.kernels.int8 import shared_bytes
from flux_kernels.kernels.problem import Call
from flux_kernels.kernels.tiles import Tile

GEFORCE, HOPPER = ((8, 6), 82), ((9, 0), 132)
RECORDED = [
    row
    for row in read_csv(CHECKOUT / "bench" / "results" / "aot.csv")
    if row["kernel"].startswith(("fused_gemm", "fp16_gemm", "split_k")) and row["format"] in FORMATS
]


def tried(compute: str, name: str, m: int, n: int = 3072, k: int = 3072, card=GEFORCE, dtype=torch.bfloat16) -> list[Candidate]:
    return candidates(compute, Call(FORMATS[name], m, n, k, *card, dtype))


@pytest.mark.parametrize("compute", ["exact", "fp16_accumulate", "int8"])
@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "NVFP4", "IQ3_S"])
@pytest.mark.parametrize("card", [GEFORCE, HOPPER, ((7, 5), 68), (None, 1)], ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 18432, 3072), (512, 3072, 3072), (4608, 3072, 15360), (64, 64, 256)])
def test_every_candidate_would_be_read_back(compute, name, card, m, n, k):
    """A candidate that won makes a row that `TuningRecord.load` takes.

    The default comes first, and no candidate twice.
    """
    listed = tried(compute, name, m, n, k, card)
    assert listed and len(listed) == len(set(listed))
    for algorithm, tile, rows in listed:
        data = dict(compute=compute, format=name, m=m, n=n, k=k, algorithm=algorithm, tile=tile and vars(tile), rows=rows)
        record._row(data | dict(ms=1.0, default_ms=1.0, triton="", kernel_hash="", dtype="bfloat16"))


def test_splitting_k_is_tried_where_waves_are_few():
    def algorithms(m: int, n: int) -> set[str]:
        return {one.algorithm for one in tried("exact", "Q4_K", m, n)}

    assert "split_k" in algorithms(512, 3072) and "split_k" not in algorithms(4608, 3072)
    assert algorithms(1, 18432) == {"small_m"}


def test_a_data_center_card_spends_little_on_fused_tiles_at_large_m():
    fused = [one for one in tried("exact", "Q4_K", 4608, card=HOPPER) if one.algorithm == "fused"]
    assert 0 < len(fused) <= 4
    assert {"fused", "split_k"} <= {one.algorithm for one in tried("exact", "Q4_K", 128, card=HOPPER)}
    assert "split_k" not in {one.algorithm for one in tried("exact", "Q4_K", 129, card=HOPPER)}
    # The mode is refused there.
    assert len(tried("fp16_accumulate", "Q4_K", 4608, card=HOPPER)) == 1


def test_float32_tries_no_fused_tile():
    """They spill 304 to 850 times a step, or do not fit a GeForce."""
    assert {one.algorithm for one in tried("exact", "Q4_K", 512, dtype=torch.float32)} == {"two_stage"}
    assert {one.algorithm for one in tried("exact", "Q4_K", 3, dtype=torch.float32)} == {"small_m", "two_stage"}


@pytest.mark.parametrize(("compute", "algorithm"), [("exact", "two_stage"), ("int8", "two_stage"), ("int8", "row_scales")])
def test_the_weight_is_tried_whole_and_in_chunks(compute, algorithm):
    """N = 12288: halves of 6144 rows, and at M = 512 chunks of two waves on 132 multiprocessors."""
    card = HOPPER if algorithm == "row_scales" else GEFORCE
    rows = [one.rows for one in tried(compute, "Q4_K", 512, 12288, card=card) if one.algorithm == algorithm]
    assert None in rows and 6144 in rows and len(set(rows)) == 3


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("card", [GEFORCE, HOPPER], ids=str)
def test_both_ways_to_load_x_are_tried(name, card):
    ways = {one.tile.ldmatrix for one in tried("exact", name, 512, card=card) if one.algorithm == "fused"}
    assert ways == {False, True}


SHAPES = [(128, 256), (256, 128)]
SPILLS = """
import json
from bench.aot.compile import compile_launch
from bench.aot.launches import launched
from flux_kernels.formats import FORMATS
from flux_kernels.kernels.choice import Choice
from flux_kernels.kernels.tiles import Tile

def spills(compute, name, capability, algorithm, tile):
    launches = launched(compute, FORMATS[name], (4608, 3072, 3072), "bf16", False, Choice(algorithm, tile, ""))
    return max(compile_launch(launch, capability).code.spills for launch in launches if "gemm" in launch.name)

print(json.dumps([
    *(spills("int8", "Q4_K", capability, algorithm, Tile(*shape, 128, 8, 3))
      for capability in (86, 90) for shape in {shapes} for algorithm in ("two_stage", "row_scales")),
    spills("exact", "Q8_0", 86, "fused", Tile(128, 256, 128, 8, 2, ldmatrix=True)),
]))
"""


@pytest.mark.slow
def test_the_tiles_that_are_left_out_spill():
    """Compiled in a process of its own: in this one the kernels belong to the interpreter."""
    command = [sys.executable, "-c", SPILLS.format(shapes=SHAPES)]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert min(json.loads(done.stdout)) > 0
    for card in (GEFORCE, HOPPER):
        assert not set(SHAPES) & {(one.tile.block_m, one.tile.block_n) for one in tried("int8", "Q4_K", 4608, card=card)}
    assert (128, 256) not in {(one.tile.block_m, one.tile.block_n) for one in tried("exact", "Q8_0", 4608) if one.tile}


def test_limits_are_those_of_the_report():
    for card in CARDS.values():
        assert shared_limit(divmod(card.capability, 10)) == card.shared_per_block


@pytest.mark.parametrize("card", [GEFORCE, HOPPER, ((8, 0), 108), ((12, 0), 170)], ids=str)
def test_no_tile_needs_more_shared_memory_than_a_program_has(card):
    for name in FORMATS:
        for one in tried("exact", name, 512, card=card)[1:]:
            if one.tile is not None and one.algorithm != "small_m":
                assert least_shared_bytes(FORMATS[name], one.tile, card[0], 2) <= shared_limit(card[0])


def test_memory_is_never_predicted_above_what_a_kernel_takes():
    """Every recorded kernel of more than one step through K: a tile that fits is never left out."""
    # The record grows and is made anew in parts.
    assert len(RECORDED) > 100
    for row in RECORDED:
        sizes = re.match(r"(\d+)x(\d+)x(\d+) warps (\d+) stages (\d+)", row["tile"])
        capability = divmod(int(row["capability"]), 10)
        # To fp16, whatever x was.
        scaled = row["kernel"].startswith("fp16_gemm")
        itemsize = 4 if row["dtype"] == "fp32" and not scaled else 2
        tile = Tile(*map(int, sizes.groups()), ldmatrix="ldmatrix" in row["tile"])
        least = least_shared_bytes(FORMATS[row["format"]], tile, capability, itemsize)
        one_step = int(row["k"]) == tile.tile_k * tile.splits
        assert one_step or least <= int(row["shared_bytes"]), row


# Compiled with Triton 3.7.1, 27 November 2026: format, capability, bytes of x's elements, tile, bytes of shared memory.
COMPILED = [
    ("Q4_K", 90, 2, (128, 256, 256, 8, 2), 167936),
    ("Q4_K", 90, 2, (128, 256, 256, 8, 3), 270336),
    ("Q4_K", 90, 2, (128, 128, 256, 8, 2), 149504),
    ("Q4_K", 90, 2, (128, 128, 256, 8, 3), 233472),
    ("Q6_K", 90, 2, (128, 128, 256, 8, 3), 259072),
    ("Q8_0", 90, 2, (64, 128, 256, 8, 3), 180224),
    ("Q8_0", 90, 2, (128, 128, 256, 8, 3), 278528),
    ("Q4_K", 86, 2, (128, 128, 256, 8, 2), 83968),
    ("Q4_K", 86, 2, (128, 128, 256, 8, 3), 167936),
    ("Q6_K", 86, 2, (128, 256, 256, 8, 2), 136192),
    ("Q8_0", 86, 2, (256, 128, 128, 8, 2), 92160),
    ("Q8_0", 86, 2, (256, 128, 128, 8, 3), 176128),
    ("Q8_0", 86, 2, (128, 128, 128, 8, 3), 110592),
    ("Q8_0", 86, 2, (64, 64, 256, 4, 3), 106496),
    ("Q8_0", 90, 2, (256, 128, 128, 8, 3), 241664),
    ("Q4_K", 86, 4, (128, 128, 256, 8, 2), 165888),
    ("Q4_K", 86, 4, (64, 128, 256, 8, 2), 100352),
    ("Q4_K", 86, 4, (64, 128, 256, 8, 3), 184320),
    ("Q8_0", 86, 4, (64, 128, 128, 8, 2), 67584),
]


@pytest.mark.parametrize(("name", "capability", "itemsize", "tile", "took"), COMPILED)
def test_memory_is_predicted_closely_for_large_tiles(name, capability, itemsize, tile, took):
    """Whether a tile fits is predicted right.

    What is not foreseen is a change of layout of one slice (at most 32 KiB).
    """
    card = divmod(capability, 10)
    least = least_shared_bytes(FORMATS[name], Tile(*tile, ldmatrix=name == "Q8_0"), card, itemsize)
    limit = shared_limit(card)
    assert least <= took <= least + (32 << 10)
    assert (least <= limit) == (took <= limit)


# Compiled likewise: groups' scales.
@pytest.mark.parametrize(
    ("capability", "tile", "took"),
    [
        (86, (128, 128, 128, 8, 2), 32768),
        (86, (128, 128, 128, 8, 3), 65536),
        (86, (128, 128, 128, 8, 4), 98304),
        (90, (128, 128, 128, 8, 3), 98304),
        (90, (128, 128, 128, 8, 4), 131072),
    ],
)
def test_memory_of_the_int8_gemm_is_its_operands(capability, tile, took):
    assert shared_bytes(Tile(*tile), divmod(capability, 10)) == took
