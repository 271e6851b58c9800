"""Show whether a low-rank correction pays for its bytes: plans with it against plans without.

    python -m tools.low_rank_proof --write bench/results/low_rank.csv

The embedded model, states and judgement of tools/mixed_proof.py. See docs/decisions/low-rank.md.
"""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import Annotated

import typer

from bench.record import origin, write_csv
from flux_kernels.generation.base_pipeline import go_offline_quietly, one_thread
from flux_kernels.measure.measurer import bootstrap, velocity_cost
from flux_kernels.mixed.cost import CostTable
from tools.mixed_proof import CPU, OWN, UNIFORM, Proof, Remembering, tell

CORRECTED = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K")
RANKS = (2, 4, 8, 16)


def main(
    calibration: Annotated[int, typer.Option(help="States that costs are measured on.")] = 96,
    held_out: Annotated[int, typer.Option(help="States that the plans are judged on.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the calibration's first picture.")] = 0,
    write: Annotated[Path | None, typer.Option(help="CSV to write.")] = None,
) -> None:
    """Plan with and without corrections at the bytes of uniform files, and judge on held-out states."""
    go_offline_quietly()
    with one_thread():
        proof = Proof(calibration, held_out, OWN, seed)
        tell("measuring types")
        plain = proof.table(proof.weighted)
        proof.types = [f"{kind}+r{rank}" for kind in CORRECTED for rank in RANKS]
        tell("measuring corrections fitted to the importance of channels")
        by_channel = proof.table(proof.weighted)
        tell("measuring corrections fitted to the inputs' covariance")
        correlated = Remembering(proof.model, proof.states, importance=proof.weighted.importance, covariance=True)
        held = copy(proof.held_weighted)
        held.kept = correlated.kept = {}
        by_covariance = proof.table(correlated)
        judges = {"channels": (by_channel, proof.held_weighted), "covariance": (by_covariance, held)}
        rows = [row for kind in UNIFORM for row in compare(proof, plain, judges, kind)]
    for row in rows:
        print(*row.values())
    if write:
        write_csv([{"seed": seed, **row, **origin(CPU)} for row in rows], write)


def compare(proof: Proof, plain: CostTable, judges: dict[str, tuple[CostTable, Remembering]], kind: str) -> list[dict]:
    """Judge, at a uniform file's bytes: that file, the plan without corrections, and with either fit."""
    budget = proof.bytes(proof.uniform(kind))
    plans = {
        "uniform": (proof.uniform(kind), proof.held_weighted),
        "mixed": (proof.planned(plain, budget), proof.held_weighted),
    }
    for name, (table, held) in judges.items():
        plans[f"mixed, ranks by {name}"] = proof.planned(CostTable(plain.rows + table.rows), budget), held
    errors = {name: held.joint_errors(types).velocity for name, (types, held) in plans.items()}
    held, rows = proof.held_weighted, []
    for name, (types, _) in plans.items():
        low, high = bootstrap(errors[name], errors["mixed"], held.weights)
        rows.append(
            dict(
                budget=kind,
                candidate=name,
                bytes=proof.bytes(types),
                cost=f"{velocity_cost(errors[name], held.signal, held.weights):.4e}",
                of_mixed=f"{velocity_cost(errors[name], errors['mixed'], held.weights):.4f}",
                of_mixed_low=f"{low:.4f}",
                of_mixed_high=f"{high:.4f}",
                corrected=sum("+r" in option for option in types.values()),
                types=" ".join(types.values()),
            )
        )
    return rows


if __name__ == "__main__":
    typer.run(main)
