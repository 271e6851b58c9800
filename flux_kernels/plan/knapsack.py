"""Choose one option of every group at the least cost within a number of bytes: exact, by scipy's mixed-integer solver (HiGHS)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from math import gcd

from ..errors import FormatError
from ..machine.silence import STDOUT, silenced
from .choices import Group, Solution, total, useful
from .greedy import greedy, steps

TIME_LIMIT = 120.0  # seconds; FLUX.1-dev takes about one
_SCALE = 1e4  # the optimum in the solver's units: its absolute gap of 1e-6 then is 1e-10 of the cost


def solve(groups: Sequence[Group], budget: int, *, time_limit: float = TIME_LIMIT) -> Solution:
    """Return the choice of the least cost that takes at most `budget` bytes.

    Args:
        groups: the decisions; every cost is finite and not negative.
        budget: in bytes.
        time_limit: in seconds; where it ends the search, the best choice so far is returned with the gap that is left.

    Raises:
        FormatError: where even the smallest options are larger.
        ImportError: where scipy is missing.
    """
    kept = [useful(group) for group in groups]
    smallest = total(groups, [options[0] for options in kept])
    if smallest.bytes > budget:
        raise FormatError(
            f"The smallest options take {smallest.bytes:,} bytes, {smallest.bytes - budget:,} more than there are."
        )
    largest = total(groups, [options[-1] for options in kept])
    if largest.bytes <= budget:
        return largest
    unit = reduce(gcd, (group.sizes[i] - group.sizes[options[0]] for group, options in zip(groups, kept) for i in options), 0)
    room = (budget - smallest.bytes) // unit
    while True:
        found = _milp(groups, kept, unit, room, time_limit)
        if found.bytes <= budget:
            return found
        room -= 1  # the solver holds integers to a tolerance, so a unit too many can slip through


def _milp(groups: Sequence[Group], kept: Sequence[list[int]], unit: int, room: int, time_limit: float) -> Solution:
    """Solve in whole units above the smallest options, with costs scaled to the solver's tolerances."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array, csr_array

    owner = np.array([number for number, options in enumerate(kept) for _ in options])
    units = np.array([(g.sizes[i] - g.sizes[options[0]]) // unit for g, options in zip(groups, kept) for i in options], float)
    costs = np.array([group.costs[i] - group.costs[options[-1]] for group, options in zip(groups, kept) for i in options])
    typical = _bound(groups, kept, unit, room)
    scaled = costs * (_SCALE / typical) if typical > 0 else costs
    one_each = coo_array((np.ones(len(owner)), (owner, np.arange(len(owner)))), shape=(len(groups), len(owner)))
    # The solver's notes would go where `--json` has its place.
    with silenced(STDOUT):
        result = milp(
            scaled,
            integrality=np.ones(len(owner)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(csr_array(units[None]), -np.inf, room)],
            options={"mip_rel_gap": 0.0, "time_limit": time_limit},
        )
    lower = sum(group.costs[options[-1]] for group, options in zip(groups, kept)) + typical
    if result.x is None:
        return _proved(_fallback(groups, kept, unit, room), lower)
    picks, start = [], 0
    for options in kept:
        stop = start + len(options)
        picks.append(options[int(np.argmax(result.x[start:stop]))])
        start = stop
    done = total(groups, picks)
    if result.status == 0:
        return done
    return _proved(min(done, _fallback(groups, kept, unit, room), key=lambda found: found.cost), lower)


def _fallback(groups: Sequence[Group], kept: Sequence[list[int]], unit: int, room: int) -> Solution:
    """Return the greedy's choice, for when the time is up."""
    return greedy(groups, sum(group.sizes[options[0]] for group, options in zip(groups, kept)) + unit * room)


def _proved(found: Solution, lower: float) -> Solution:
    """State how far a choice may be from the best, by the bound of plans that may mix two options of a group."""
    return replace(found, gap=max(0.0, 1 - lower / found.cost)) if found.cost else found


def _bound(groups: Sequence[Group], kept: Sequence[list[int]], unit: int, room: int) -> float:
    """Return the least that the optimum can cost above the largest options: the best steps, of which the last may be a part."""
    spent = 0.0
    free = room
    parts = [steps(Group(tuple(g.sizes[i] for i in o), tuple(g.costs[i] for i in o))) for g, o in zip(groups, kept)]
    for step in sorted((step for part in parts for step in part), key=lambda step: step.added / step.saved, reverse=True):
        taken = min(1.0, free * unit / step.saved) if free > 0 else 0.0
        free -= taken * step.saved / unit
        spent += (1 - taken) * step.added
    return spent
