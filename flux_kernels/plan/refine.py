"""Refine a plan by measuring it as a whole: costs of single tensors do not add, so they are corrected where the plan stands.

A round measures the plan jointly, and again with one group of its tensors (a class such as all `img_mlp.0`, or a block) left
unquantized at a time. The difference is what that group adds to this plan; the costs of its tensors are scaled so that they
add up to it, and the plan is solved again. The best plan that was measured is kept, so that a round can do no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from ..flux.names import block_of, tensor_class
from ..mixed.plan_file import Plan
from .constraints import Costs
from .knapsack import TIME_LIMIT
from .problem import Problem, as_plan, options_of, plan_within

Measure = Callable[[Mapping[str, str]], float]  # {tensor: option} of the tensors to quantize -> joint cost
MOST = 4.0  # a round changes no cost by more than this factor: marginal costs are noisy where a group costs little
GROUPINGS: dict[str, Callable[[str], object]] = {"class": tensor_class, "block": lambda name: block_of(name) or name}


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
    rounds: list[Round] = field(default_factory=list)


def refine(
    problem: Problem,
    budget: int,
    measure_joint: Measure,
    rounds: int = 2,
    *,
    grouping: str = "class",
    time_limit: float = TIME_LIMIT,
    starts: Iterable[Plan] = (),
    on_measured: Callable[[str, float], None] = lambda what, cost: None,
) -> Refined:
    """Plan within a budget, measure the plan jointly, correct the costs and plan again; return the best plan measured.

    Args:
        problem: the decisions, with costs of single tensors.
        budget: bytes of the whole file.
        measure_joint: measures {tensor: option}; tensors that are not named stay unquantized.
        rounds: of correction; 0 only measures. A round takes one measurement more than there are groups.
        grouping: a key of GROUPINGS: which tensors share a correction.
        time_limit: in seconds, of each solution.
        starts: more plans within the budget to measure first, such as the greedy's.
        on_measured: called after every joint measurement with what was measured, and its cost.
    """
    done: list[Round] = []
    costs = problem.costs
    plan = plan_within(problem, budget, time_limit=time_limit)
    for number in range(rounds + 1):
        options = {name: option for name, option in options_of(plan).items() if name in problem.costs}
        if any(found.plan.types == plan.types and found.plan.low_rank == plan.low_rank for found in done):
            break
        joint = measure_joint(options)
        on_measured(f"round {number}", joint)
        done.append(Round(replace(plan, joint_cost=joint), plan.cost, joint))
        if number < rounds:
            costs = _corrected(costs, options, joint, measure_joint, GROUPINGS[grouping], on_measured)
            plan = plan_within(replace(problem, costs=costs), budget, time_limit=time_limit)
    for start in starts:
        joint = measure_joint({name: option for name, option in options_of(start).items() if name in problem.costs})
        on_measured("another start", joint)
        done.append(Round(replace(start, joint_cost=joint), start.cost, joint))
    best = min(done, key=lambda found: found.measured)
    return Refined(_told(problem, best, done, budget), done)


def _corrected(
    costs: Costs,
    options: Mapping[str, str],
    joint: float,
    measure_joint: Measure,
    group_of: Callable[[str], object],
    on_measured: Callable[[str, float], None],
) -> Costs:
    """Scale every group's costs to what the group adds to the plan, by at most MOST either way."""
    groups: dict[object, list[str]] = {}
    for name in options:
        groups.setdefault(group_of(name), []).append(name)
    scaled = dict(costs)
    for group, names in groups.items():
        believed = sum(costs[name][options[name]] for name in names)
        if believed <= 0:
            continue
        without = measure_joint({name: option for name, option in options.items() if name not in set(names)})
        on_measured(f"without {group}", without)
        factor = min(MOST, max(1 / MOST, (joint - without) / believed))
        for name in names:
            scaled[name] = {option: cost * factor for option, cost in costs[name].items()}
    return scaled


def _told(problem: Problem, best: Round, done: list[Round], budget: int) -> Plan:
    """Return the best plan with the cost the table predicts for it, and the rounds among its options."""
    told = as_plan(problem, options_of(best.plan), {**best.plan.options, "budget": budget})
    history = [{"predicted": found.predicted, "measured": found.measured, "bytes": found.plan.bytes} for found in done]
    return replace(told, joint_cost=best.measured, options={**told.options, "rounds": history})
