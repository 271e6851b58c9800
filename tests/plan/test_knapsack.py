"""The exact choice against solvers that are not scipy's: brute force, and dynamic programming."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_kernels import FormatError
from flux_kernels.plan.choices import Group, total, useful
from flux_kernels.plan.greedy import greedy, steps, walk
from flux_kernels.plan.knapsack import solve

# The solver's absolute gap is 1e-10 of the scaled optimum; sums of doubles add some 1e-15.
RELATIVE = 1e-9


@st.composite
def groups(draw, most: int = 5):
    made = []
    for _ in range(draw(st.integers(1, most))):
        count = draw(st.integers(1, 5))
        sizes = draw(st.lists(st.integers(1, 60), min_size=count, max_size=count))
        costs = draw(st.lists(st.floats(0, 1e-3, allow_subnormal=False), min_size=count, max_size=count))
        made.append(Group(tuple(32 * size for size in sizes), tuple(costs)))
    return made


def cheapest_by_trying(items: list[Group], budget: int) -> float | None:
    every = (total(items, picks) for picks in itertools.product(*(range(len(item.sizes)) for item in items)))
    return min((found.cost for found in every if found.bytes <= budget), default=None)


def cheapest_by_table(items: list[Group], budget: int, unit: int) -> float:
    """Dynamic programming: the least cost at every number of units, one group after the other."""
    least = np.zeros(budget // unit + 1)
    for item in items:
        following = np.full_like(least, np.inf)
        for size, cost in zip(item.sizes, item.costs):
            taken = -(-size // unit)
            if taken < len(least):
                following[taken:] = np.minimum(following[taken:], least[: len(least) - taken] + cost)
        least = following
    return float(least[-1])


@settings(max_examples=60, deadline=None)
@given(groups(), st.integers(32, 6000))
def test_the_choice_is_the_best_of_all(items, budget):
    best = cheapest_by_trying(items, budget)
    if best is None:
        with pytest.raises(FormatError, match="smallest options take"):
            solve(items, budget)
        return
    found = solve(items, budget)
    assert found.bytes <= budget and found.gap == 0
    assert found == total(items, found.picks)
    assert found.cost == pytest.approx(best, rel=RELATIVE, abs=1e-18)


@settings(max_examples=60, deadline=None)
@given(groups(), st.integers(32, 6000))
def test_the_greedy_is_never_better(items, budget):
    found = greedy(items, budget)
    if found.bytes <= budget:
        assert solve(items, budget).cost <= found.cost * (1 + RELATIVE) + 1e-18
        assert solve(items, found.bytes).cost <= found.cost * (1 + RELATIVE) + 1e-18


@settings(max_examples=60, deadline=None)
@given(groups())
def test_every_plan_on_the_curve_is_the_best_of_its_size(items):
    for point in walk(items):
        best = cheapest_by_trying(items, point.bytes)
        assert point.cost == pytest.approx(best, rel=RELATIVE, abs=1e-15)


@settings(max_examples=100, deadline=None)
@given(groups(1))
def test_steps_are_convex_and_useful_options_are_not_beaten(items):
    (group,) = items
    kept = useful(group)
    assert all(group.sizes[a] < group.sizes[b] and group.costs[a] > group.costs[b] for a, b in itertools.pairwise(kept))
    for index in range(len(group.sizes)):
        assert any(group.sizes[k] <= group.sizes[index] and group.costs[k] <= group.costs[index] for k in kept)
    slopes = [step.added / step.saved for step in steps(group)]
    assert slopes == sorted(slopes)


def flux_like(count: int = 120) -> list[Group]:
    """Draw decisions of a model's size: matrices of three shapes in the usual types, costs over decades."""
    rng = np.random.default_rng(0)
    bits = np.array([2.625, 3.4375, 4.25, 4.5, 5.5, 6.5625, 8.5, 16])
    made = []
    for number in range(count):
        weights = (768, 1024, 1536)[number % 3] * 3072
        costs = 10 ** rng.uniform(-4, 0) * 4.0 ** -(bits - 2.625) * rng.uniform(0.7, 1.4, len(bits))
        made.append(Group(tuple(int(weights * b / 8) for b in bits), (*costs[:-1], 0.0)))
    return made


@pytest.mark.parametrize("share", [0.18, 0.3, 0.45])
def test_a_large_choice_agrees_with_dynamic_programming(share):
    items = flux_like()
    budget = int(share * sum(max(item.sizes) for item in items))
    found = solve(items, budget)
    # Divides every size above, so that the table rounds nothing.
    unit = 6144
    assert all(size % unit == 0 for item in items for size in item.sizes)
    assert found.bytes <= budget and found.gap == 0
    assert found.cost == pytest.approx(cheapest_by_table(items, budget, unit), rel=1e-9)


def test_tiny_costs_are_told_apart():
    """Costs of 1e-12 are far below the solver's tolerances; they are scaled."""
    items = [Group((10, 20), (3e-12, 1e-12)), Group((10, 20), (5e-12, 1e-12))]
    assert solve(items, 30).picks == (0, 1)


def test_where_everything_fits_the_cheapest_is_taken_and_ties_go_to_the_smaller():
    assert solve([Group((10, 20, 30), (1.0, 0.0, 0.0))], 100).picks == (1,)


def test_when_the_time_is_up_the_best_so_far_comes_with_a_true_gap():
    items = flux_like(300)
    budget = int(0.3 * sum(max(item.sizes) for item in items))
    hurried, best = solve(items, budget, time_limit=1e-3), solve(items, budget)
    assert hurried.bytes <= budget and hurried.cost <= greedy(items, budget).cost
    assert hurried.gap > 0 and best.gap == 0
    assert hurried.cost * (1 - hurried.gap) <= best.cost <= hurried.cost


def test_the_solver_keeps_standard_output_clean(capfd):
    solve(flux_like(30), int(0.3 * sum(max(item.sizes) for item in flux_like(30))))
    print("after")
    assert capfd.readouterr().out == "after\n"
