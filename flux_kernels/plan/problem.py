"""Plan a mixed file: the type of every tensor, at the least predicted cost within a number of bytes."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import FormatError
from ..mixed.cost import CostTable
from ..mixed.file_layout import KEY_VALUE_BYTES, NAMED_MODELS, FileLayout, Options, layout_of_shapes, shapes_of_model
from ..mixed.option import Option
from ..mixed.plan_file import Plan
from ..version import own_version
from .choices import Group, Solution
from .constraints import Constraints, Costs, allowed, tied
from .greedy import walk
from .knapsack import TIME_LIMIT, solve

METRICS = ("cost", "mfq_cost")
_SIXTEEN = (Option("BF16"), Option("F16"))
NO_CONSTRAINTS = Constraints()


@dataclass(frozen=True)
class Problem:
    """Hold the decisions of a plan.

    Attributes:
        layout: the file.
        costs: tensor -> option -> predicted cost, the constraints applied.
        ties: tensors that get one option each; every tensor of `costs` is in one of them.
        about: what `Plan.options` shall say of model, metric and constraints.
        costs_sha256: of the cost table's bytes, "" where it is no file.
    """

    layout: FileLayout
    costs: Costs
    ties: Sequence[Sequence[str]]
    about: Mapping[str, Any] = field(default_factory=dict)
    costs_sha256: str = ""

    @cached_property
    def options(self) -> list[list[Option]]:
        """The options that all tensors of each tie have."""
        options = [[one for one in self.costs[tie[0]] if all(one in self.costs[name] for name in tie)] for tie in self.ties]
        for tie, shared in zip(self.ties, options):
            if not shared:
                raise FormatError(f"No type was measured for all of {', '.join(tie)}, which must get the same one.")
        return options

    def groups(self) -> list[Group]:
        """Return the decisions as bytes and costs."""
        return [
            Group(
                tuple(sum(self.layout.option_bytes(name, option) for name in tie) for option in options),
                tuple(sum(self.costs[name][option] for name in tie) for option in options),
            )
            for tie, options in zip(self.ties, self.options)
        ]

    @property
    def fixed_bytes(self) -> int:
        """Bytes of the file that no decision changes, the room for more key-values included."""
        layout = self.layout
        others = sum(layout.option_bytes(name, layout.types[name]) for name in layout.shapes if name not in self.costs)
        return layout.empty_bytes + KEY_VALUE_BYTES + others

    def chosen(self, solution: Solution) -> dict[str, Option]:
        """Return tensor -> option of a solution."""
        picked = zip(self.ties, self.options, solution.picks)
        return {name: options[pick] for tie, options, pick in picked for name in tie}

    def predicted(self, options: Options) -> float:
        """Return the sum of the costs."""
        return sum(self.costs[name][option] for name, option in options.items() if name in self.costs)


def make_problem(
    table: CostTable,
    layout: FileLayout,
    constraints: Constraints = NO_CONSTRAINTS,
    *,
    metric: str = "cost",
    costs_sha256: str = "",
) -> Problem:
    """Make the decisions of a plan from a cost table.

    Raises:
        FormatError: where the table is of another model than the layout, or nothing can meet the constraints.
    """
    if metric not in METRICS:
        raise FormatError(f"Unknown metric {metric!r}. Legal: {', '.join(METRICS)}.")
    problem = mismatch(table, layout)
    if problem:
        raise FormatError(f"{problem}. Name the model that was measured with --model.")
    costs, kept = allowed(table.costs(metric), constraints, layout.types)
    full = next((row.option for row in table.rows if row.option in _SIXTEEN), _SIXTEEN[0])
    # 16 bit as in the source: no weight is rounded.
    plain = {name: full if option in _SIXTEEN else option for name, option in layout.types.items()}
    layout = FileLayout(layout.shapes, {**plain, **kept}, layout.model, layout.architecture)
    about = {"model": layout.model, "metric": metric, "importance": table.importance, **constraints.described()}
    return Problem(layout, costs, tied(list(costs), constraints), about, costs_sha256)


def mismatch(table: CostTable, layout: FileLayout) -> str | None:
    """Say why a cost table is not of a layout's model, or None."""
    if not table.rows:
        return "The cost table is empty"
    for row in table.rows:
        shape = layout.shapes.get(row.tensor)
        if shape is None or len(shape) != 2:
            return f"{layout.model or 'The model'} has no matrix {row.tensor!r}, the cost table has"
        expected = row.option.nbytes(shape)
        if not row.option.rank and row.bytes != expected:
            return (
                f"{row.tensor} in {row.option} is {row.bytes:,} bytes in the cost table, in {layout.model or 'the model'} of shape "
                f"{list(shape)} it is {expected:,}"
            )
    return None


def find_layout(table: CostTable, model: str | None = None, rule: str = "new") -> FileLayout:
    """Find the tensors of the file that a cost table is about.

    Args:
        table: the costs.
        model: a name of NAMED_MODELS, or the path of a GGUF or safetensors file or folder, of which headers are read; None
            tries the names, that of the measured file first, then FLUX.1-dev.
        rule: how tensors outside the plan are stored: "legacy", "old" or "new".
    """
    if model in NAMED_MODELS:
        return layout_of_shapes(NAMED_MODELS[model](), model, rule)
    if model is not None:
        path = Path(model)
        return layout_of_shapes(shapes_of_model(path), path.stem, rule)
    # dev and schnell have the same matrices in their blocks, so the measured file's name decides between them.
    letters = table.model.lower().replace(".", "").replace("-", "")
    for name in sorted(NAMED_MODELS, key=lambda name: name.replace("-", "") not in letters):
        title = table.model.removesuffix(".safetensors").removesuffix(".gguf") or name
        layout = layout_of_shapes(NAMED_MODELS[name](), title, rule)
        if mismatch(table, layout) is None:
            return layout
    raise FormatError(
        f"The cost table fits none of {', '.join(NAMED_MODELS)}. Name the measured model's file or folder with --model."
    )


def plan_within(
    problem: Problem, budget: int, *, time_limit: float = TIME_LIMIT, about: Mapping[str, Any] | None = None
) -> Plan:
    """Return the plan of the least predicted cost whose file has at most `budget` bytes.

    Args:
        problem: the decisions.
        budget: bytes of the whole file: header, padding, the tensors that are not chosen and KEY_VALUE_BYTES for what
            `quantize` writes about the file's origin included. `Plan.bytes` is without those.
        time_limit: in seconds, of the solver.
        about: more for `Plan.options`.

    Raises:
        FormatError: where the smallest file is larger.
    """
    groups, fixed = problem.groups(), problem.fixed_bytes
    smallest = fixed + sum(min(group.sizes) for group in groups)
    if smallest > budget:
        picks = tuple(group.sizes.index(min(group.sizes)) for group in groups)
        least = problem.layout.bits_per_weight(problem.chosen(Solution(picks, smallest, 0.0)))
        raise FormatError(
            f"No plan fits {budget:,} bytes: the smallest file that the measured types and the constraints allow has {smallest:,} "
            f"bytes ({least:.2f} bits per weight). Give more room, loosen the constraints, or measure smaller types."
        )
    solution = solve(groups, budget - fixed, time_limit=time_limit)
    return as_plan(problem, problem.chosen(solution), {"budget": budget, "gap": solution.gap, **(about or {})})


def curve(problem: Problem) -> list[tuple[int, float]]:
    """Return (file bytes, cost) of plans from the largest to the smallest, each the best of its size."""
    fixed = problem.fixed_bytes - KEY_VALUE_BYTES
    return [(fixed + point.bytes, point.cost) for point in walk(problem.groups())]


def as_plan(problem: Problem, options: Options, about: Mapping[str, Any]) -> Plan:
    """Make a plan of chosen options; every tensor of the file is named in it."""
    layout = problem.layout
    chosen = {**layout.types, **options}
    return Plan(
        types={name: option.type for name, option in chosen.items()},
        low_rank={name: option.rank for name, option in chosen.items() if option.rank},
        bytes=layout.file_bytes(options),
        cost=problem.predicted(options),
        costs_sha256=problem.costs_sha256,
        options={
            **problem.about,
            **about,
            "file_name": layout.file_name(options),
            "bits_per_weight": round(layout.bits_per_weight(options), 4),
            "block_bits_per_weight": round(layout.block_bits(options), 4),
        },
        versions={"flux_kernels": own_version(), **{name: version(name) for name in ("scipy", "torch")}},
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
