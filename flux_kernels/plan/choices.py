"""Decisions of a plan as numbers: bytes and costs of options, and a choice among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """Hold the options of one decision: bytes and cost of each."""

    sizes: tuple[int, ...]
    costs: tuple[float, ...]


@dataclass(frozen=True)
class Solution:
    """Hold a choice.

    Attributes:
        picks: index of the chosen option of every group.
        bytes: in all.
        cost: in all.
        gap: how far the cost may be above the least possible one, as a fraction of it; 0 where it was proved.
    """

    picks: tuple[int, ...]
    bytes: int
    cost: float
    gap: float = 0.0


def total(groups: Sequence[Group], picks: Sequence[int], gap: float = 0.0) -> Solution:
    """Add up a choice."""
    size = sum(group.sizes[pick] for group, pick in zip(groups, picks))
    return Solution(tuple(picks), size, sum(group.costs[pick] for group, pick in zip(groups, picks)), gap)


def useful(group: Group) -> list[int]:
    """Return the options of a group that no other beats in bytes and cost, smallest first."""
    kept: list[int] = []
    for index in sorted(range(len(group.sizes)), key=lambda index: (group.sizes[index], group.costs[index])):
        if not kept or group.costs[index] < group.costs[kept[-1]]:
            kept.append(index)
    return kept
