"""Chunks of unpacked weights: whole wherever memory allows, else few, balanced, and chosen by waves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_kernels.kernels.chunks import (
    MOST_SCRATCH,
    bounded_rows,
    candidate_rows,
    chunk_sizes,
    chunks_of,
    wave_efficiency,
    waves,
)
from flux_kernels.models.calls import step_calls

CARDS = {"RTX 3060": 28, "RTX 3090": 82, "RTX 4090": 128, "RTX 5090": 170, "A100": 108, "H100": 132}


@pytest.mark.parametrize("itemsize", [1, 2, 4])
def test_no_weight_of_flux_is_cut(itemsize):
    """No chunk is larger than allowed, fused projections included.

    In int8, 16 bit and float32; a step's largest weight has 66 million weights.
    """
    shapes = {(call.m, call.n, call.k) for call in step_calls()} | {(4608, 3 * 3072 + 12288, 3072)}
    assert all(bounded_rows(*shape, itemsize, 82) is None for shape in shapes)


@pytest.mark.parametrize("processors", CARDS.values(), ids=CARDS)
def test_a_step_keeps_the_multiprocessors_busy(processors):
    """At M >= 4096 at least 89 % of the tiles' time is work.

    Chunks of a third of L2 left 59 % on an RTX 3090.
    """
    calls = [call for call in step_calls() if call.m >= 4096]
    work = sum(call.m * call.n * call.k * call.calls for call in calls)
    spent = 0.0
    for call in calls:
        rows = bounded_rows(call.m, call.n, call.k, 1, processors)
        spent += call.m * call.n * call.k * call.calls / wave_efficiency(call.m, call.n, rows, processors)
    assert work / spent >= 0.89


def test_small_chunks_are_what_wave_efficiency_punishes():
    """36 tiles on 82 multiprocessors: 44 % at most."""
    assert wave_efficiency(4608, 3072, 128, 82) == pytest.approx(36 / 82)
    assert waves(4608, 3072, 128, 82) == 24
    assert waves(4608, 3072, None, 82) == 11


SIZES = dict(
    m=st.integers(1, 9000),
    n=st.integers(1, 120_000),
    k=st.integers(1, 1000).map(lambda blocks: 32 * blocks),
    itemsize=st.sampled_from([1, 2, 4]),
    processors=st.one_of(st.none(), st.integers(1, 200)),
)


@given(**SIZES)
def test_chunks_are_balanced_within_memory_and_cover_every_row_once(m, n, k, itemsize, processors):
    rows = bounded_rows(m, n, k, itemsize, processors)
    sizes = chunk_sizes(n, rows)
    assert sum(sizes) == n
    chunks = chunks_of(n, rows)
    assert [chunk.stop for chunk in chunks[:-1]] == [chunk.start for chunk in chunks[1:]]
    assert (chunks[0].start, chunks[-1].stop) == (0, n)
    if rows is None:
        assert n * k * itemsize <= MOST_SCRATCH
        return
    assert rows % 128 == 0 or rows == n
    assert rows * k * itemsize <= MOST_SCRATCH or rows <= 128
    assert len(sizes) <= 2 * -(-n * k * itemsize // MOST_SCRATCH) or rows <= 128


@given(**SIZES)
def test_candidates_differ_begin_with_the_default_and_fit(m, n, k, itemsize, processors):
    candidates = candidate_rows(m, n, k, itemsize, processors)
    assert candidates[0] == bounded_rows(m, n, k, itemsize, processors)
    assert len(set(candidates)) == len(candidates)
    assert all(rows is None or 0 < rows <= max(n, 128) for rows in candidates)


def test_a_weight_that_must_be_cut_is_cut_where_waves_are_whole():
    """No other allowed number of chunks makes fewer waves of FLUX.2-dev's fused linear1.

    It is 55296 x 6144 in 16 bit (648 MiB).
    """
    m, n, k = 4608, 55296, 6144
    rows = bounded_rows(m, n, k, 2, 132)
    assert rows is not None
    others = [-(-n // (parts * 128)) * 128 for parts in range(3, 7)]
    assert waves(m, n, rows, 132) == min(waves(m, n, other, 132) for other in others)
