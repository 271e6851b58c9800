"""Read odd_tiles.csv: where a default tile does not serve a format, what differs and why.

A row is the result of a compilation, as a tuning record is of a measurement: chosen because the default of tiles.py spilled or took
too much shared memory (docs/decisions/compile-time-report.md, gpu-readiness.md). Its columns:

tile        which default it changes: narrow, medium, wide, split_k, small_m, small_m_codes, fp16, fp16_short, or every
branch      yes: on top of that, in calls with a low-rank branch
formats     ggml types, cards: compute capabilities, all where empty
block_m to ldmatrix     members of `Tile` that differ, empty where as in the default
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_PACKAGED = Path(__file__).with_name("odd_tiles.csv")
_SIZES = ("block_m", "block_n", "tile_k", "num_warps", "num_stages", "splits")


@dataclass(frozen=True)
class OddTile:
    """Describe one row of odd_tiles.csv.

    Attributes:
        tile: the default it changes.
        branch: whether for calls with a low-rank branch, on top of the change without a branch.
        formats: names of ggml types.
        cards: compute capabilities, empty for all.
        changes: member of `Tile` -> value; a `tile_k` is never longer than the default's.
        why: one phrase.
    """

    tile: str
    branch: bool
    formats: tuple[str, ...]
    cards: tuple[tuple[int, int], ...]
    changes: dict[str, int]
    why: str

    @property
    def where(self) -> str:
        """Name the default it changes, the cards, and the branch, such as "fp16 with a branch on sm_86"."""
        cards = ", ".join(f"sm_{major}{minor}" for major, minor in self.cards)
        return f"{self.tile}{' with a branch' if self.branch else ''}{f' on {cards}' if cards else ''}"


@cache
def odd_tiles() -> tuple[OddTile, ...]:
    """Return all rows, in the file's order."""
    with _PACKAGED.open(encoding="utf-8", newline="") as file:
        return tuple(_row(columns) for columns in csv.DictReader(file))


def _row(columns: dict[str, str]) -> OddTile:
    changes: dict[str, int] = {name: int(columns[name]) for name in _SIZES if columns[name]}
    if columns["ldmatrix"]:
        changes["ldmatrix"] = columns["ldmatrix"] == "yes"
    cards = [tuple(map(int, card.split("."))) for card in columns["cards"].split()]
    return OddTile(
        tile=columns["tile"],
        branch=columns["branch"] == "yes",
        formats=tuple(columns["formats"].split()),
        cards=tuple((major, minor) for major, minor in cards),
        changes=changes,
        why=columns["why"],
    )


@cache
def _changes() -> dict[tuple, dict[str, int]]:
    """Map (tile, format, card or None, branch) to changes; a test holds the file to one row a case."""
    return {
        (tile, name, card, row.branch): row.changes
        for row in odd_tiles()
        for tile in row.tile.split()
        for name in row.formats
        for card in row.cards or (None,)
    }


def odd_changes(tile: str, format: str, capability: tuple[int, int] | None, branch: bool = False) -> dict[str, int]:
    """Return the members of a default tile that differ for a format on a card.

    Empty where the default serves.
    """
    changes = _changes()
    return changes.get((tile, format, None, branch)) or changes.get((tile, format, capability, branch), {})
