"""Check the odd tiles: each row speaks of what exists, says why, and is in effect."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace

import pytest

from bench.aot.cards import CARDS
from flux_kernels.formats import FORMATS
from flux_kernels.kernels.odd_tiles import odd_changes, odd_tiles
from flux_kernels.kernels.tiles import Tile, fp16_tile, fused_tile, loads_by_ldmatrix, small_m_tile, split_k_tile

from ..made_up_format import FORMAT as MADE_UP

CAPABILITIES = [divmod(card, 10) for card in CARDS]
TILES = {"narrow", "medium", "wide", "split_k", "small_m", "small_m_codes", "fp16", "fp16_short", "every"}


def test_every_row_speaks_of_what_exists_and_says_why():
    members = {field.name for field in fields(Tile)}
    assert odd_tiles()
    for row in odd_tiles():
        assert set(row.tile.split()) <= TILES and set(row.formats) <= FORMATS.keys() and set(row.cards) <= set(CAPABILITIES)
        assert row.formats and row.changes and row.changes.keys() <= members and row.why


def test_no_two_rows_speak_of_one_case():
    """Else the order of rows would decide; a row without cards speaks of all of them."""
    cases = Counter(
        (tile, row.branch, name, card)
        for row in odd_tiles()
        for tile in row.tile.split()
        for name in row.formats
        for card in row.cards or CAPABILITIES
    )
    assert {case for case, rows in cases.items() if rows > 1} == set()


def test_mxfp4_with_a_branch_takes_four_warps_on_sm_120_only():
    tiles = {card: fp16_tile(FORMATS["MXFP4"], 3072, card, branch=True) for card in ((8, 6), (8, 9), (12, 0))}
    assert {card: (tile.block_m, tile.num_warps) for card, tile in tiles.items()} == {
        (8, 6): (64, 8),
        (8, 9): (64, 8),
        (12, 0): (64, 4),
    }


def chosen(name: str, fmt, capability, branch: bool) -> Tile:
    """Return the tile of a name, for shapes that ask for it."""
    if name in ("narrow", "medium", "wide"):
        return fused_tile(fmt, {"narrow": 16, "medium": 64, "wide": 512}[name], 3072, 3072, capability, branch)
    if name == "split_k":
        return split_k_tile(fmt, 512, 3072, 3072, capability)
    if name.startswith("fp16"):
        return fp16_tile(fmt, 64 if name == "fp16_short" else 3072, capability, branch)
    return small_m_tile(fmt, 3072, name == "small_m_codes", capability)


@pytest.mark.parametrize("row", odd_tiles(), ids=lambda row: f"{row.where}-{'-'.join(row.formats)}")
def test_every_row_is_in_effect(row):
    for fmt in map(FORMATS.get, row.formats):
        for capability in row.cards or CAPABILITIES:
            if row.tile == "every":
                assert not loads_by_ldmatrix(fmt, capability)
                continue
            for name in row.tile.split():
                tile = chosen(name, fmt, capability, row.branch)
                assert replace(tile, **row.changes) == tile


def test_a_format_without_a_row_takes_the_defaults_and_one_that_gathers_the_smaller():
    assert not any(odd_changes(name, MADE_UP.name, (8, 6), branch) for name in TILES for branch in (False, True))
    gathering = replace(MADE_UP, gathers=True)
    large, small = (fused_tile(fmt, 512, 3072, 3072, (8, 6)) for fmt in (MADE_UP, gathering))
    assert (large.block_m, large.block_n, large.ldmatrix) == (128, 128, True)
    assert (small.block_m, small.block_n, small.ldmatrix) == (64, 64, False)
    assert fp16_tile(gathering, 3072, (8, 6)).block_n < fp16_tile(MADE_UP, 3072, (8, 6)).block_n
