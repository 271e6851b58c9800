"""A made-up cost table of the embedded model: what a measurement gives, without measuring."""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np

from flux_kernels.formats import FORMATS
from flux_kernels.mixed.cost import CostRow, CostTable
from flux_kernels.mixed.file_layout import embedded_shapes
from flux_kernels.mixed.option import Option

PUBLISHED = Path(__file__).parent / "data" / "flux1_dev_casting_cost.csv"
TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")


def made_table(seed: int = 0, types: tuple[str, ...] = TYPES) -> CostTable:
    """Draw costs: each block matrix has its own sensitivity, and every bit less costs four times as much."""
    rng = np.random.default_rng(seed)
    rows = []
    for name, shape in embedded_shapes().items():
        if len(shape) < 2 or not name.startswith(("double_blocks", "single_blocks")):
            continue
        weight = 10 ** rng.uniform(-5, -2)
        rows.append(CostRow(name, Option("F16"), 0.0, 0.0, 2 * prod(shape), 0.0))
        for kind in types:
            row = FORMATS[kind]
            cost = float(weight * 4.0**-row.bits_per_weight * rng.uniform(0.8, 1.2))
            size = prod(shape) // row.block_size * row.type_size
            rows.append(CostRow(name, Option(kind), cost, 1000 * cost, size, 2.0**-row.bits_per_weight))
    return CostTable(rows, model="embedded", importance="none")
