"""Prove or refute that measured plans beat uniform files and block-level mixes of the same bytes.

    python -m tools.mixed_proof --write bench/results/mixed_proof.csv --picture docs/mixed.png

The embedded model; costs and importance from some prompts and seeds, judged on other prompts and other seeds, every
candidate measured with all of its tensors quantized at once. No GPU, no network. See docs/decisions/mixed-proof.md.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.record import origin, write_csv
from flux_kernels.errors import FormatError
from flux_kernels.formats import FORMATS
from flux_kernels.generation.base_pipeline import go_offline_quietly, load_pipeline, one_thread
from flux_kernels.generation.demo import PROMPTS, SEED
from flux_kernels.generation.embedded import PIPELINE_KWARGS, embedded_model_path
from flux_kernels.measure.capture import capture
from flux_kernels.measure.measured_model import find_source, open_transformer
from flux_kernels.measure.measurer import Measurer, bootstrap, velocity_cost
from flux_kernels.measure.side_by_side import side_by_side
from flux_kernels.measure.states import State
from flux_kernels.mixed.cost import CostTable
from flux_kernels.mixed.file_layout import embedded_shapes, layout_of_shapes
from flux_kernels.mixed.option import Option
from flux_kernels.models.names import block_of, tensor_class
from flux_kernels.plan.choices import Group
from flux_kernels.plan.constraints import Constraints
from flux_kernels.plan.greedy import greedy
from flux_kernels.plan.knapsack import solve
from flux_kernels.plan.problem import NO_CONSTRAINTS, make_problem, plan_within
from flux_kernels.plan.refine import refine
from flux_kernels.torch_backend import libggml

COLOURS = ["red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "white"]
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
UNIFORM = ("Q3_K", "Q4_K", "Q5_K")
# The types of MixedQuantFlux's published costs, and all types from Q8_0 down to a little over 2 bits.
MFQ_TYPES = ("Q8_0", "Q6_K", "Q5_1", "Q5_K", "Q4_1", "Q4_K", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K", "Q2_K")
OWN = ("Q8_0", "Q6_K", "Q5_1", "Q5_K", "Q5_0", "Q4_1", "Q4_K", "Q4_0", "IQ4_NL", "NVFP4", "IQ4_XS", "MXFP4", "Q3_K", "Q2_K")
BY_LIBGGML = ("IQ3_S", "IQ3_XXS", "IQ2_S")
# The text stream of one double block with 8 tokens hardly matters here; a control gives it no fewer bits than the image stream.
STREAMS_TIED = Constraints(
    same=tuple(f"double_blocks.*_{part}.weight" for part in ("mod.lin", "attn.qkv", "attn.proj", "mlp.0", "mlp.2"))
)
SEEDS = [0, 20_000_000]
HELD_OUT_SEED = 1_000_000  # further from the calibration's seeds than there are states
CPU = torch.device("cpu")
Types = dict[str, Option]


class Remembering(Measurer):
    """A Measurer that quantizes every tensor to every type once."""

    def weights_of(self, options: Mapping[str, Option]) -> dict:
        """Return parameter -> (decoded weights, squared weight error)."""
        kept = self.__dict__.setdefault("kept", {})
        for item in options.items():
            if item not in kept:
                kept[item] = super().weights_of(dict([item]))
        return {name: pair for item in options.items() for name, pair in kept[item].items()}


class Proof:
    """Hold the two sets of states and what was measured on the first."""

    def __init__(self, calibration: int, held_out: int, types: Sequence[str], seed: int):
        self.types: Sequence[Option] = tuple(map(Option, types))
        self.model, _ = open_transformer(find_source(), CPU, torch.float32)
        own, other = split_prompts()
        pipeline = load_pipeline(embedded_model_path(), self.model, torch.float32)
        tell(f"capturing {calibration} + {held_out} states")
        states = captured(pipeline, own, calibration, seed=seed)
        held = captured(pipeline, other, held_out, seed=seed + HELD_OUT_SEED)
        self.states = states
        self.weighted = Remembering(self.model, states)
        self.plain = Remembering(self.model, states, importance=None)
        self.held_weighted = Remembering(self.model, held, importance=self.weighted.importance)
        self.held_plain = Remembering(self.model, held, importance=None)
        for a, b in ((self.weighted, self.held_weighted), (self.plain, self.held_plain)):
            a.kept = b.kept = {}
        self.tensors = self.weighted.tensors
        self.layout = layout_of_shapes(embedded_shapes(), "embedded")

    def bytes(self, types: Types) -> int:
        """Return the bytes of the block matrices."""
        return sum(option.nbytes(self.tensors[name].shape) for name, option in types.items())

    def uniform(self, kind: str) -> Types:
        """Return the types of a uniform file."""
        return dict.fromkeys(self.tensors, Option(kind))

    def table(self, measurer: Measurer) -> CostTable:
        """Measure every tensor in every type."""
        items = [(name, option) for name, one in self.tensors.items() for option in self.types if option.fits(one.shape)]
        return CostTable([measurer.measure_one(name, option) for name, option in items])

    def block_costs(self, measurer: Measurer, metric: str, kinds: Sequence[str]) -> tuple[list[list[str]], list[Group]]:
        """Measure every block in every type as a whole: MixedQuantFlux's costs, or the velocity's."""
        blocks: dict[object, list[str]] = {}
        for name in self.tensors:
            blocks.setdefault(block_of(name), []).append(name)
        groups = []
        for names in blocks.values():
            costs = []
            for kind in kinds:
                row = measurer.measure_joint(dict.fromkeys(names, Option(kind)))
                costs.append(row.mfq_cost if metric == "mfq" else row.cost)
            groups.append(Group(tuple(self.bytes(dict.fromkeys(names, Option(kind))) for kind in kinds), tuple(costs)))
        return list(blocks.values()), groups

    def planned(self, table: CostTable, budget: int, constraints: Constraints = NO_CONSTRAINTS) -> Types:
        """Return the exact optimum of the summed costs."""
        problem = make_problem(table, self.layout, constraints)
        return self.of_blocks(plan_within(problem, problem.fixed_bytes + budget).by_tensor())

    def refined(self, table: CostTable, budget: int, rounds: int) -> Types:
        """Return the plan after rounds of joint measurement on the calibration states."""
        problem = make_problem(table, self.layout)

        def joint(types: Mapping[str, Option]) -> float:
            return self.weighted.measure_joint(self.of_blocks(types)).cost

        plans = [
            refine(problem, problem.fixed_bytes + budget, joint, rounds, group_of=group_of).plan
            for group_of in (tensor_class, lambda name: block_of(name) or name)
        ]
        return self.of_blocks(min(plans, key=lambda plan: plan.joint_cost).by_tensor())

    def of_blocks(self, types: Mapping[str, Option]) -> Types:
        """Return the block matrices' types."""
        return {name: kind for name, kind in types.items() if name in self.tensors}


def split_prompts() -> tuple[list[str], list[str]]:
    """Split all colours times digits into two halves that share no prompt."""
    prompts = [f"a {colour} {digit}" for colour in COLOURS for digit in DIGITS]
    random.Random(1).shuffle(prompts)
    return prompts[: len(prompts) // 2], prompts[len(prompts) // 2 :]


def captured(pipeline, prompts: list[str], count: int, seed: int) -> list[State]:
    """Capture states at the size that the model was trained for."""
    size = (PIPELINE_KWARGS["width"], PIPELINE_KWARGS["height"])
    return capture(pipeline, prompts, count, settings=PIPELINE_KWARGS, sizes=[size], seed=seed)


def without(table: CostTable, kinds: Sequence[str]) -> CostTable:
    """Return the table without some types."""
    return replace(table, rows=[row for row in table.rows if str(row.option) not in kinds])


def candidates(proof: Proof, budget: int, kind: str, tables: dict, blocks: dict, rounds: int) -> dict[str, tuple[Types, bool]]:
    """Return name -> (types, whether the quantizers are weighted by importance)."""
    found: dict[str, tuple[Types, bool]] = {
        "uniform": (proof.uniform(kind), False),
        "uniform, importance": (proof.uniform(kind), True),
    }
    for name, (names, groups, kinds, weighted) in blocks.items():
        picks = (solve if name.startswith("best") else greedy)(groups, budget).picks
        found[name] = (
            {tensor: Option(kinds[pick]) for part, pick in zip(names, picks, strict=True) for tensor in part},
            weighted,
        )
    found["mixed without importance"] = proof.planned(tables["plain"], budget), False
    found["mixed, types quantized here"] = proof.planned(without(tables["weighted"], BY_LIBGGML), budget), True
    found["mixed, streams tied"] = proof.planned(tables["weighted"], budget, STREAMS_TIED), True
    own = {"greedy by block": "plain", "greedy by block, importance": "weighted"}  # the greedy's last step may save too much
    for name, table in own.items():
        found[f"mixed at the bytes of {name}"] = proof.planned(tables[table], proof.bytes(found[name][0])), table == "weighted"
    found["mixed, not refined"] = proof.planned(tables["weighted"], budget), True
    found["mixed"] = proof.refined(tables["weighted"], budget, rounds), True
    return found


def judge(proof: Proof, found: dict[str, tuple[Types, bool]], kind: str, budget: int) -> list[dict]:
    """Measure the candidates on the held-out states; ratios are paired state by state."""
    errors = {}
    for name, (types, weighted) in found.items():
        if proof.bytes(types) > budget:
            raise FormatError(f"{name} takes {proof.bytes(types)} bytes, {budget} are allowed.")
        errors[name] = (proof.held_weighted if weighted else proof.held_plain).joint_errors(types)
    held = proof.held_weighted
    rows = []
    for name, (types, weighted) in found.items():
        error = errors[name].velocity
        low, high = bootstrap(error, held.signal, held.weights)
        row = dict(
            budget=kind,
            candidate=name,
            bytes=proof.bytes(types),
            budget_bytes=budget,
            cost=f"{velocity_cost(error, held.signal, held.weights):.4e}",
            cost_low=f"{low:.4e}",
            cost_high=f"{high:.4e}",
            mfq_cost=f"{errors[name].stack.mean().item():.4e}",
        )
        for label, other in (
            ("uniform", "uniform"),
            ("uniform_importance", "uniform, importance"),
            ("greedy", "greedy by block"),
            ("best_by_block", "best by block"),
        ):
            base = errors[other].velocity
            ends = bootstrap(error, base, held.weights)
            row |= {f"of_{label}": f"{velocity_cost(error, base, held.weights):.4f}"}
            row |= {f"of_{label}_low": f"{ends[0]:.4f}", f"of_{label}_high": f"{ends[1]:.4f}"}
        row |= dict(importance=weighted, states=held.count, types=" ".join(map(str, types.values())))
        rows.append(row)
    return rows


def tell(what: str) -> None:
    """Print what is being done, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)


def run(calibration: int, held_out: int, rounds: int, seed: int) -> tuple[Proof, list[dict], dict[str, tuple[Types, bool]]]:
    """Run the experiment for one pair of state sets; return rows, and candidates of the first budget."""
    kinds = (*OWN, *(BY_LIBGGML if libggml.available() else ()))
    kinds = tuple(sorted(kinds, key=lambda name: -FORMATS[name].bits_per_weight))
    proof = Proof(calibration, held_out, kinds, seed)
    tell("measuring every tensor in every type, weighted by importance")
    tables = dict(weighted=proof.table(proof.weighted))
    tell("and without")
    proof.types = [option for option in proof.types if str(option) not in BY_LIBGGML]
    tables["plain"] = proof.table(proof.plain)
    tell("blocks")
    blocks = {
        "greedy by block": (*proof.block_costs(proof.plain, "mfq", MFQ_TYPES), MFQ_TYPES, False),
        "greedy by block, importance": (*proof.block_costs(proof.weighted, "mfq", MFQ_TYPES), MFQ_TYPES, True),
        "best by block": (*proof.block_costs(proof.weighted, "velocity", kinds), kinds, True),
    }
    rows, first = [], {}
    for kind in UNIFORM:
        tell(f"plans at the bytes of {kind}")
        budget = proof.bytes(proof.uniform(kind))
        found = candidates(proof, budget, kind, tables, blocks, rounds)
        rows += [{"seed": seed, **row, **origin(CPU)} for row in judge(proof, found, kind, budget)]
        first = first or found
    return proof, rows, first


def main(
    calibration: Annotated[int, typer.Option(help="States that costs are measured on.")] = 96,
    held_out: Annotated[int, typer.Option(help="States that the candidates are judged on.")] = 256,
    seed: Annotated[
        list[int], typer.Option(help="Of the calibration's first picture; the experiment is run for each.")
    ] = SEEDS,
    rounds: Annotated[int, typer.Option(help="Of refinement.")] = 2,
    write: Annotated[Path | None, typer.Option(help="CSV to write.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Pictures side by side at the bytes of Q3_K.")] = None,
) -> None:
    """Run the experiment."""
    go_offline_quietly()
    rows: list[dict] = []
    with one_thread():
        for number in seed:
            proof, found, first = run(calibration, held_out, rounds, number)
            rows += found
            if picture and number == seed[0]:
                draw(proof, first, picture)
            if write:
                write_csv(rows, write)
    for row in rows:
        print(f"{row['seed']:<9} {row['budget']:<5} {row['candidate']:<52} {row['bytes']:>9} {row['cost']:>11}", end=" ")
        print(
            *(f"{row[f'of_{a}']} [{row[f'of_{a}_low']}, {row[f'of_{a}_high']}]" for a in ("uniform", "greedy", "best_by_block"))
        )


def draw(proof: Proof, found: dict[str, tuple[Types, bool]], path: Path) -> None:
    """Draw uniform, greedy and mixed side by side, all weighted by importance."""
    names = {"uniform Q3_K": "uniform, importance", "greedy by block": "greedy by block, importance", "mixed": "mixed"}
    plans = {title: found[name][0] for title, name in names.items()}
    pipeline = load_pipeline(embedded_model_path(), proof.model, torch.float32)
    how = dict(settings=PIPELINE_KWARGS, seed=SEED, importance=proof.weighted.importance)
    side_by_side(pipeline, plans, PROMPTS[:4], **how).save(path, "PNG", optimize=True)


if __name__ == "__main__":
    typer.run(main)
