"""Show whether a low-rank correction pays for its bytes: plans that may choose one against plans that may not.

    python -m tools.low_rank_proof --write bench/results/low_rank.csv

The embedded model, states and judgement of tools/mixed_proof.py. See docs/decisions/low-rank.md.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from bench.record import origin, write_csv
from flux_kernels.base_pipeline import go_offline_quietly, one_thread
from flux_kernels.mixed.cost import CostTable
from flux_kernels.mixed.measure import bootstrap, velocity_cost
from tools.mixed_proof import CPU, OWN, UNIFORM, Proof, tell

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
        proof = Proof(calibration, held_out, [*OWN, *(f"{kind}+r{rank}" for kind in CORRECTED for rank in RANKS)], seed)
        tell("measuring")
        table = proof.table(proof.weighted)
        rows = [row for kind in UNIFORM for row in compare(proof, table, kind)]
    for row in rows:
        print(*row.values())
    if write:
        write_csv([{"seed": seed, **row, **origin(CPU)} for row in rows], write)


def compare(proof: Proof, table: CostTable, kind: str) -> list[dict]:
    """Judge, at the bytes of a uniform file: the uniform file, it with the best correction everywhere, and both plans."""
    budget = proof.bytes(proof.uniform(kind))
    plain = replace(table, rows=[row for row in table.rows if "+r" not in row.type])
    found = {
        "uniform": proof.uniform(kind),
        "mixed": proof.planned(plain, budget),
        "mixed, with ranks": proof.planned(table, budget),
    }
    errors = {name: proof.held_weighted.joint_errors(types).velocity for name, types in found.items()}
    held, rows = proof.held_weighted, []
    for name, types in found.items():
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
