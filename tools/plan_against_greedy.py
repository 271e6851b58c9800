"""Compare exact plans with MixedQuantFlux's greedy on its costs, at its fifteen files' sizes.

    python -m tools.plan_against_greedy [TABLE] [--out bench/results/plan_against_greedy.csv]

Each file gives two budgets: the bits per weight in its name, and those that it came to. The greedy is asked for them as its
code counts (Q6_K as 6.5 bits, blocks alone), and once more held to the true bytes. Sizes are bytes of whole files in one
layout: the tensors outside the blocks as community files store them.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

from bench.record import write_csv
from flux_kernels.mixed.casting_cost import read_casting_cost
from flux_kernels.mixed.file_layout import layout_of_shapes, shapes_of_variant
from flux_kernels.mixed.option import Option
from flux_kernels.plan.choices import Group, total
from flux_kernels.plan.constraints import Constraints
from flux_kernels.plan.greedy import greedy
from flux_kernels.plan.knapsack import solve
from flux_kernels.plan.problem import Problem, make_problem

# Bits per weight that the published files came to, by the name they have (Hugging Face, MixedQuantFlux).
_NAMES = ("3_0", "3_8", "5_1", "5_3", "5_9", "6_6", "6_9", "7_3", "7_4", "7_6", "8_2", "8_4", "8_6", "9_2", "9_6")
_BITS = (3.10, 3.81, 5.15, 5.25, 5.93, 6.64, 6.85, 7.33, 7.39, 7.60, 8.17, 8.42, 8.66, 9.22, 9.56)
PUBLISHED = dict(zip(_NAMES, _BITS, strict=True))
TABLE = Path(__file__).parents[1] / "tests" / "mixed" / "data" / "flux1_dev_casting_cost.csv"
OUT = Path(__file__).parents[1] / "bench" / "results" / "plan_against_greedy.csv"
# What MixedQuantFlux's code takes for a type's bits per weight, where it is not what the type has
_COUNTED = {"Q6_K": 6.5}


@dataclass(frozen=True)
class Row:
    """Compare the two within one budget; bytes are of whole files, costs in MixedQuantFlux's metric.

    `as_is` is the greedy as it counts, asked for the budget's bits per weight; `held` is the greedy with true bytes, ended at
    the first plan within the budget; `at_as_is` is the exact plan in the size that `as_is` came to.
    """

    name: str
    bits_per_weight: float
    budget: int
    as_is_bytes: int
    as_is_over: int
    as_is_cost: float
    held_bytes: int
    held_cost: float
    plan_bytes: int
    plan_cost: float
    at_as_is_bytes: int
    at_as_is_cost: float
    gap: float
    seconds: float


def problem_of(table: Path = TABLE) -> Problem:
    """Return the decisions of the published table: one type for each of FLUX.1-dev's 57 blocks."""
    layout = layout_of_shapes(shapes_of_variant("flux1-dev"), "flux1-dev")
    return make_problem(read_casting_cost(table, layout), layout, Constraints(per_block=True))


def compare(problem: Problem, name: str, bits: float) -> Row:
    """Plan for the size of a published file both ways; `bits` is per weight of all tensors."""
    layout, groups = problem.layout, problem.groups()
    fixed = layout.file_bytes({}) - sum(layout.option_bytes(tensor, layout.types[tensor]) for tensor in problem.costs)
    budget = int(bits * layout.parameters / 8) + layout.empty_bytes
    as_is = total(groups, greedy(_believed(problem), int(bits * layout.block_parameters / 8)).picks)
    held = greedy(groups, budget - fixed)
    start = time.perf_counter()
    plan = solve(groups, budget - fixed)
    seconds = time.perf_counter() - start
    at_as_is = solve(groups, as_is.bytes)
    return Row(
        name,
        bits,
        budget,
        as_is.bytes + fixed,
        as_is.bytes + fixed - budget,
        round(as_is.cost, 6),
        held.bytes + fixed,
        round(held.cost, 6),
        plan.bytes + fixed,
        round(plan.cost, 6),
        at_as_is.bytes + fixed,
        round(at_as_is.cost, 6),
        max(plan.gap, at_as_is.gap),
        round(seconds, 2),
    )


def both_sizes(problem: Problem) -> list[Row]:
    """Compare at the size in every file's name and at the size that the file came to."""
    named = [compare(problem, name, float(name.replace("_", "."))) for name in PUBLISHED]
    return named + [compare(problem, name, bits) for name, bits in PUBLISHED.items()]


def _believed(problem: Problem) -> list[Group]:
    """Return the groups with the bytes that MixedQuantFlux's code counts with."""
    shapes = problem.layout.shapes
    return [
        Group(tuple(int(sum(prod(shapes[name]) for name in tie) * _bits(option) / 8) for option in options), group.costs)
        for tie, options, group in zip(problem.ties, problem.options, problem.groups())
    ]


def _bits(option: Option) -> float:
    return _COUNTED.get(option.type, option.bits)


def main() -> None:
    """Write the comparison as a CSV file and print it as the table of docs/decisions/planning.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", type=Path, default=TABLE)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    problem = problem_of(arguments.table)
    rows = both_sizes(problem)
    write_csv([asdict(row) for row in rows], arguments.out)
    print(
        "| file | bits/weight | greedy as it is: MB beside the budget | cost | greedy held to the budget: cost | plan: cost | less |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.name} | {row.bits_per_weight} | {row.as_is_over / 1e6:+.0f} | {row.as_is_cost:.1f} | {row.held_cost:.1f} | "
            f"{row.plan_cost:.1f} | {1 - row.plan_cost / row.held_cost:.1%} |"
        )


if __name__ == "__main__":
    main()
