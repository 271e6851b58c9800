"""Refine a plan by measuring it as a whole.

Costs of single tensors do not add, so they are corrected where the plan stands. A round measures the plan jointly, and again
with one group of its tensors (a class such as all `img_mlp.0`, or a block) left unquantized at a time. The difference is what
that group adds to this plan; the costs of its tensors are scaled so that they add up to it, and the plan is solved again. The
best plan that was measured is kept, so that a round can do no harm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..mixed.file_layout import Options
from ..mixed.plan_file import Plan
from ..models.names import tensor_class
from .constraints import Costs
from .knapsack import TIME_LIMIT
from .problem import Problem, as_plan, plan_within

Measure = Callable[[Options], float]
"""Returns the joint cost of {tensor: option}; tensors that are not named stay unquantized."""
# A round changes no cost by more than this factor: marginal costs are noisy where a group costs little.
MOST = 4.0


@dataclass(frozen=True)
class Round:
    """Hold one measured plan: what the costs of that round predicted, and what was measured."""

    plan: Plan
    predicted: float
    measured: float


@dataclass(frozen=True)
class Refined:
    """Hold the best plan measured, and every round; `rounds[0]` is the plan from the table as it is."""

    plan: Plan
    rounds: list[Round]


def refine(
    problem: Problem,
    budget: int,
    measure_joint: Measure,
    rounds: int = 2,
    *,
    group_of: Callable[[str], object] = tensor_class,
    time_limit: float = TIME_LIMIT,
    on_measured: Callable[[str, float], None] = lambda what, cost: None,
) -> Refined:
    """Plan within a budget, measure the plan, correct the costs and plan again; return the best plan.

    Args:
        problem: the decisions, with costs of single tensors.
        budget: bytes of the whole file.
        measure_joint: see Measure.
        rounds: of correction; 0 only measures. A round takes one measurement more than there are groups.
        group_of: tensor name -> its group; the tensors of a group share a correction.
        time_limit: in seconds, of each solution.
        on_measured: called after every joint measurement with what was measured, and its cost.
    """

    def measured(what: str, options: Options) -> float:
        cost = measure_joint(options)
        on_measured(what, cost)
        return cost

    done: list[Round] = []
    costs = problem.costs
    for number in range(rounds + 1):
        plan = plan_within(replace(problem, costs=costs), budget, time_limit=time_limit)
        options = {name: option for name, option in plan.by_tensor().items() if name in problem.costs}
        if any(before.plan.by_tensor() == plan.by_tensor() for before in done):
            break
        joint = measured(f"round {number}", options)
        done.append(Round(replace(plan, joint_cost=joint), plan.cost, joint))
        if number < rounds:
            costs = _corrected(costs, options, joint, measured, group_of)
    best = min(done, key=lambda measurement: measurement.measured)
    history = [{"predicted": one.predicted, "measured": one.measured, "bytes": one.plan.bytes} for one in done]
    # With the cost that the table predicts, not the corrected costs.
    about = {**best.plan.options, "budget": budget, "rounds": history}
    plan = as_plan(problem, best.plan.by_tensor(), about)
    return Refined(replace(plan, joint_cost=best.measured), done)


def _corrected(
    costs: Costs,
    options: Options,
    joint: float,
    measured: Callable[[str, Options], float],
    group_of: Callable[[str], object],
) -> Costs:
    """Scale every group's costs to what the group adds to the plan, by at most MOST either way."""
    groups: dict[object, list[str]] = {}
    for name in options:
        groups.setdefault(group_of(name), []).append(name)
    scaled = dict(costs)
    for group, names in groups.items():
        predicted = sum(costs[name][options[name]] for name in names)
        if predicted <= 0:
            continue
        without = measured(f"without {group}", {name: option for name, option in options.items() if name not in names})
        factor = min(MOST, max(1 / MOST, (joint - without) / predicted))
        for name in names:
            scaled[name] = {option: cost * factor for option, cost in costs[name].items()}
    return scaled
