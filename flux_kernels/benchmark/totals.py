"""Sum the linear calls of one step by provider, from rows, with the spread of their repeats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

TWINS = "On a CPU fp16_accumulate and int8 are imitated in torch for their rounding, not for speed."


class Total(NamedTuple):
    """Hold milliseconds a step: the sums of the 20th, 50th and 80th percentiles of its calls."""

    p20: float
    p50: float
    p80: float

    def differs(self, other: Total) -> bool:
        """Return whether the spreads lie apart: where p20 to p80 overlap, nobody can say which is faster; one repeat has none."""
        if self.p20 == self.p80 or other.p20 == other.p80:
            return False
        return self.p80 < other.p20 or other.p80 < self.p20


def totals(rows: Sequence[Mapping]) -> dict[str, Total]:
    """Return the time of a step by provider, of the rows of one format and size; only providers with a time for every call."""
    found = {}
    for provider in dict.fromkeys(row["provider"] for row in rows):
        mine = [row for row in rows if row["provider"] == provider]
        if all(row["p50_ms"] for row in mine):
            columns = ("p20_ms", "p50_ms", "p80_ms")
            found[provider] = Total(*(sum(float(row[name]) * int(row["calls"]) for row in mine) for name in columns))
    return found


def by_step(rows: Sequence[Mapping]) -> dict[tuple[str, str], list[Mapping]]:
    """Group rows by size of the step and format."""
    found: dict[tuple[str, str], list[Mapping]] = {}
    for row in rows:
        found.setdefault((row["size"], row["format"]), []).append(row)
    return found
