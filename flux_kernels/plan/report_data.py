"""What a report on a plan shows, gathered once: curves, uniform files, joint measurements, pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..mixed.cost import JointRow
from ..mixed.file_layout import FileLayout
from ..mixed.plan_file import Plan
from .constraints import Constraints, Costs, tied
from .problem import Problem, curve, options_of

if TYPE_CHECKING:
    from PIL.Image import Image

_OWN = "this plan"


@dataclass(frozen=True)
class Measured:
    """Hold one joint measurement: a file of so many bytes, its cost and the ends of its 95 % interval."""

    label: str
    bytes: int
    cost: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class ReportData:
    """Hold what a report shows.

    Attributes:
        plan: the plan.
        layout: the file.
        costs: tensor -> option -> predicted cost, as measured, before constraints.
        options: tensor -> option of the plan, of all tensors.
        best: (file bytes, cost) of the best plans, under the constraints.
        greedy: the same with one type a block, by the greedy baseline.
        uniform: (type, file bytes, cost) of files with one type for every chosen tensor.
        budget: bytes asked for, 0 where unknown.
        joint: measurements of whole files.
        pictures: side by side, or None.
    """

    plan: Plan
    layout: FileLayout
    costs: Costs
    options: Mapping[str, str]
    best: Sequence[tuple[int, float]]
    greedy: Sequence[tuple[int, float]]
    uniform: Sequence[tuple[str, int, float]]
    budget: int = 0
    joint: Sequence[Measured] = ()
    pictures: Image | None = None


def gather(
    problem: Problem,
    plan: Plan,
    measured: Costs,
    joint: Iterable[JointRow] = (),
    pictures: Image | None = None,
) -> ReportData:
    """Gather what the report on a plan shows.

    Args:
        problem: what the plan was chosen from.
        plan: the plan.
        measured: tensor -> option -> cost of the whole table, before constraints.
        joint: joint measurements on the same states, of plans and of uniform files.
        pictures: an image of pictures side by side.
    """
    measurements = [_measured(problem.layout, plan, row) for row in joint]
    if plan.joint_cost is not None and not any(found.label == _OWN for found in measurements):
        measurements.append(Measured(_OWN, plan.bytes, plan.joint_cost))
    blocks = replace(problem, costs=measured, ties=tied(list(measured), Constraints(per_block=True)))
    return ReportData(
        plan=plan,
        layout=problem.layout,
        costs=measured,
        options=options_of(plan),
        best=curve(problem),
        greedy=curve(blocks),
        uniform=uniform_files(problem.layout, measured),
        budget=int(plan.options.get("budget", 0)),
        joint=measurements,
        pictures=pictures,
    )


def uniform_files(layout: FileLayout, costs: Costs) -> list[tuple[str, int, float]]:
    """Return (option, file bytes, predicted cost) of the files with one option for every tensor of `costs`."""
    shared = [option for option in next(iter(costs.values())) if all(option in row for row in costs.values())]
    found = [(o, layout.file_bytes(dict.fromkeys(costs, o)), sum(row[o] for row in costs.values())) for o in shared]
    return sorted(found, key=lambda point: point[1])


def _measured(layout: FileLayout, plan: Plan, row: JointRow) -> Measured:
    """Label a joint measurement by what was measured."""
    kinds = {row.types[name] for name in row.types if name in layout.shapes}
    if all(plan.types.get(name) == kind for name, kind in row.types.items()) and not plan.low_rank:
        label = _OWN
    else:
        label = kinds.pop() if len(kinds) == 1 else "another plan"
    return Measured(label, layout.file_bytes(row.types), row.cost, row.cost_low, row.cost_high)
