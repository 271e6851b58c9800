"""The greedy optimiser of MixedQuantFlux, as a baseline, and the curve of best plans it walks along.

Per group the options are thinned out until the steps from the largest to the smallest get steeper and steeper; the step that
saves most bits for the cost it adds is taken first, until the wanted number of bits is gone. Its last step is taken whole, so
it ends below the size that was wanted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .choices import Group, Solution, total, useful


@dataclass(frozen=True)
class Step:
    """Hold one step of a group to its next smaller option: bytes saved and cost added."""

    before: int
    after: int
    saved: int
    added: float


def steps(group: Group) -> list[Step]:
    """Return the convex steps of a group, largest option first: each adds more cost a byte than the last."""
    hull: list[int] = []
    for index in reversed(useful(group)):
        while len(hull) > 1 and _slope(group, hull[-2], hull[-1]) >= _slope(group, hull[-1], index):
            hull.pop()
        hull.append(index)
    return [
        Step(before, after, group.sizes[before] - group.sizes[after], group.costs[after] - group.costs[before])
        for before, after in pairwise(hull)
    ]


def _slope(group: Group, before: int, after: int) -> float:
    return (group.costs[after] - group.costs[before]) / (group.sizes[before] - group.sizes[after])


def walk(groups: Sequence[Group]) -> Iterator[Solution]:
    """Yield the plans from the largest to the smallest, one step apart; each is the best of its size."""
    picks = [useful(group)[-1] for group in groups]
    largest = total(groups, picks)
    yield largest
    numbered = [(number, position, step) for number, group in enumerate(groups) for position, step in enumerate(steps(group))]
    size, cost = largest.bytes, largest.cost
    for number, _, step in sorted(numbered, key=lambda entry: (entry[2].added / entry[2].saved, *entry[:2])):
        picks[number] = step.after
        size, cost = size - step.saved, cost + step.added
        yield Solution(tuple(picks), size, cost)


def greedy(groups: Sequence[Group], wanted: int) -> Solution:
    """Take the best steps first until at most `wanted` bytes are left, or no step is."""
    for solution in walk(groups):
        if solution.bytes <= wanted:
            break
    return total(groups, solution.picks)
