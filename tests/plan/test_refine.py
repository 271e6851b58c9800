"""Refinement: where costs do not add, measuring the plan as a whole and correcting the costs pays."""

from __future__ import annotations

import pytest

from flux_kernels.mixed.file_layout import embedded_shapes, layout_of_shapes
from flux_kernels.models.names import block_of
from flux_kernels.plan.problem import make_problem, plan_within
from flux_kernels.plan.refine import refine

from ..mixed.made_costs import made_table

BUDGET = 3_600_000


@pytest.fixture(scope="module")
def problem():
    return make_problem(made_table(), layout_of_shapes(embedded_shapes(), "embedded"))


def coupled(problem):
    """Return a joint cost in which errors of the image stream add up in amplitude, above their sum."""

    def measure(types):
        image = [problem.costs[name][kind] for name, kind in types.items() if "img_" in name]
        others = [problem.costs[name][kind] for name, kind in types.items() if "img_" not in name]
        return sum(cost**0.5 for cost in image) ** 2 + sum(others)

    return measure


def test_corrected_costs_find_a_better_plan(problem):
    found = refine(problem, BUDGET, coupled(problem), rounds=2)
    assert len(found.rounds) >= 2
    assert found.plan.joint_cost == min(one.measured for one in found.rounds) < found.rounds[0].measured
    assert found.plan.bytes <= BUDGET
    assert found.plan.options["rounds"][0]["measured"] == found.rounds[0].measured
    assert found.plan.cost == pytest.approx(
        sum(problem.costs[n][o] for n, o in found.plan.by_tensor().items() if n in problem.costs)
    )


def test_where_costs_add_the_first_plan_stays(problem):
    found = refine(problem, BUDGET, lambda types: sum(problem.costs[name][kind] for name, kind in types.items()), rounds=3)
    first = plan_within(problem, BUDGET)
    assert found.plan.types == first.types
    assert found.plan.joint_cost == pytest.approx(first.cost)
    # The corrected costs lead to the same plan, which is not measured twice.
    assert len(found.rounds) == 1


def test_no_round_measures_once(problem):
    measured = []
    found = refine(problem, BUDGET, coupled(problem), rounds=0, on_measured=lambda what, cost: measured.append(what))
    assert measured == ["round 0"] and len(found.rounds) == 1


def test_no_round_does_harm(problem):
    """A measure by which every whole plan but the first is bad: the first is kept."""
    first = {name: option for name, option in plan_within(problem, BUDGET).by_tensor().items() if name in problem.costs}
    cost = coupled(problem)

    def contrary(asked):
        return 1.0 if len(asked) == len(first) and asked != first else cost(asked)

    found = refine(problem, BUDGET, contrary, rounds=1, group_of=lambda name: block_of(name) or name)
    assert [one.measured for one in found.rounds] == [cost(first), 1.0]
    assert first.items() <= found.plan.by_tensor().items() and found.plan.joint_cost == cost(first)
