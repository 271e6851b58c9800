"""Sum the linear calls of a step by provider, with the spread of their repeats, and compare sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TWINS = "On a CPU fp16_accumulate and int8 are imitated in torch for their rounding, not for speed."


LEAST_REPEATS = 3  # fewer have no spread that means anything
UNKNOWN = f"spread unknown with fewer than {LEAST_REPEATS} repeats"
_SAME = "no difference seen"
_SIGNS = {"": "", _SAME: "~", UNKNOWN: "?"}  # of what `doubt` says
MARKS = {"~": f"{_SAME} (p20 to p80 of both overlap)", "?": UNKNOWN}


@dataclass(frozen=True)
class Total:
    """Hold milliseconds a step: sums of the 20th, 50th and 80th percentiles of its calls, and repeats.

    `repeats` is 0 where rows do not say, as older rows do not.
    """

    p20: float
    p50: float
    p80: float
    repeats: int = 0

    @classmethod
    def of(cls, *rows: Mapping) -> Total:
        """Add the times of rows, each as often as a step has its call."""
        p20, p50, p80 = (
            sum(float(row[name]) * int(row.get("calls", 1)) for row in rows) for name in ("p20_ms", "p50_ms", "p80_ms")
        )
        return cls(p20, p50, p80, min(int(row.get("repeats") or 0) for row in rows))

    @property
    def known(self) -> bool:
        """Return whether there are repeats enough for a spread."""
        return self.p20 != self.p80 and not 0 < self.repeats < LEAST_REPEATS

    def differs(self, other: Total) -> bool:
        """Return whether the spreads p20 to p80 are known and lie apart: else nobody can say which is faster."""
        return self.known and other.known and (self.p80 < other.p20 or other.p80 < self.p20)

    def speed(self, base: Total) -> Total:
        """Return how many times as fast as `base` it is: the least (slow runs to fast runs), median, most.

        The speeds of two steps that were timed with bases of their own differ where these spreads lie apart.
        """
        repeats = min(self.repeats, base.repeats) or max(self.repeats, base.repeats)
        return Total(base.p20 / self.p80, base.p50 / self.p50, base.p80 / self.p20, repeats)


def doubt(mine: Total, other: Total) -> str:
    """Say why nothing tells two times apart; "" where they differ."""
    if not (mine.known and other.known):
        return UNKNOWN
    return "" if mine.differs(other) else _SAME


def speed_text(mine: Total, base: Total, unit: str = "") -> str:
    """Write a speed with `base` as 1, `unit` after the number, and why that may be no difference."""
    why = doubt(mine, base)
    return f"{base.p50 / mine.p50:.2f}{unit}{f' ({why})' if why else ''}"


def marked(mine: Total, base: Total) -> str:
    """Write a speed with `base` as 1, "~" before it where no difference was seen, "?" without a spread."""
    return f"{'' if mine == base else _SIGNS[doubt(mine, base)]}{base.p50 / mine.p50:.2f}"


def totals(rows: Sequence[Mapping]) -> dict[str, Total]:
    """Return a step's time by provider with a time for every call; rows are of one format and size."""
    sums, calls = {}, {_call(row) for row in rows}
    for provider in dict.fromkeys(row["provider"] for row in rows):
        mine = [row for row in rows if row["provider"] == provider]
        # Some sides run at few rows of x only.
        if {_call(row) for row in mine} == calls and all(row["p50_ms"] for row in mine):
            sums[provider] = Total.of(*mine)
    return sums


def _call(row: Mapping) -> tuple:
    return tuple(row.get(name) for name in ("where", "m", "n", "k"))


def by_step(rows: Sequence[Mapping]) -> dict[tuple[str, str], list[Mapping]]:
    """Group rows by size of the step and format."""
    groups: dict[tuple[str, str], list[Mapping]] = {}
    for row in rows:
        groups.setdefault((row["size"], row["format"]), []).append(row)
    return groups
