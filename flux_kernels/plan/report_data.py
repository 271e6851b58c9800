"""What a report on a plan shows, gathered once: curves, uniform files, joint measurements, pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from PIL.Image import Image

from ..mixed.cost import JointRow
from ..mixed.file_layout import FileLayout, Options
from ..mixed.option import Option
from ..mixed.plan_file import Plan
from .constraints import Constraints, Costs, tied
from .problem import Problem, curve

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
        uniform: (option, file bytes, cost) of files with one option for every chosen tensor.
        budget: bytes asked for, 0 where unknown.
        joint: measurements of whole files.
        pictures: side by side, or None.
    """

    plan: Plan
    layout: FileLayout
    costs: Costs
    options: Options
    best: Sequence[tuple[int, float]]
    greedy: Sequence[tuple[int, float]]
    uniform: Sequence[tuple[Option, int, float]]
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
    if plan.joint_cost is not None and not any(one.label == _OWN for one in measurements):
        measurements.append(Measured(_OWN, plan.bytes, plan.joint_cost))
    blocks = replace(problem, costs=measured, ties=tied(list(measured), Constraints(per_block=True)))
    return ReportData(
        plan=plan,
        layout=problem.layout,
        costs=measured,
        options=plan.by_tensor(),
        best=curve(problem),
        greedy=curve(blocks),
        uniform=uniform_files(problem.layout, measured),
        budget=int(plan.options.get("budget", 0)),
        joint=measurements,
        pictures=pictures,
    )


def uniform_files(layout: FileLayout, costs: Costs) -> list[tuple[Option, int, float]]:
    """Return (option, file bytes, predicted cost) of files with one option for every tensor of `costs`."""
    shared = [option for option in next(iter(costs.values())) if all(option in row for row in costs.values())]
    files = [(one, layout.file_bytes(dict.fromkeys(costs, one)), sum(row[one] for row in costs.values())) for one in shared]
    return sorted(files, key=lambda file: file[1])


def _measured(layout: FileLayout, plan: Plan, row: JointRow) -> Measured:
    """Label a joint measurement by what was measured."""
    own = plan.by_tensor()
    if all(own.get(name) == option for name, option in row.types.items()):
        label = _OWN
    else:
        options = {option for name, option in row.types.items() if name in layout.shapes}
        label = str(options.pop()) if len(options) == 1 else "another plan"
    return Measured(label, layout.file_bytes(row.types), row.cost, row.cost_low, row.cost_high)
