"""Read and write MixedQuantFlux's casting_cost tables: a cost for every block ("layer") and type.

Their metric is the mean squared error of the last block's output with one block quantized, text tokens included. Layers
count through the double blocks and then the single blocks. A block's cost is spread over its matrices in proportion to
their weights, so that a block with one type has exactly the cost of the table; what its matrices cost in different types is
not in the table, so such plans belong to `Constraints(per_block=True)`.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from math import prod
from pathlib import Path

from ..errors import FormatError
from ..files import written_whole
from ..formats import FORMATS
from ..models.names import block_of
from .cost import CostRow, CostTable
from .file_layout import FileLayout
from .option import Option

COLUMNS = ("layer", "quant", "cost_mse")
# What costs are measured against.
_FULL = "BF16"
# Notes a block and type that was measured a second time; the first measurement counts.
_PATCHED = "patched"


def is_casting_cost(path: Path) -> bool:
    """Tell whether a CSV file has the columns of a casting_cost table."""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        return set(COLUMNS) <= set(next(csv.reader(file), ()))


def read_casting_cost(path: Path, layout: FileLayout) -> CostTable:
    """Read a casting_cost table as costs of tensors.

    Args:
        path: CSV with the columns layer, quant, cost_mse, and optionally note.
        layout: the model that was measured.

    Returns:
        A table of ggml types; both cost columns hold MixedQuantFlux's metric, and `error_weight_rms` is 0. Types of other
        libraries (bnb) are left out; 16 bit is added with a cost of 0.
    """
    blocks = _blocks(layout)
    measured = _read(path)
    unknown = sorted(set(measured) - set(range(len(blocks))))
    if unknown or len(measured) < len(blocks):
        missing = sorted(set(range(len(blocks))) - set(measured))
        raise FormatError(
            f"{path} has costs of {len(measured)} layers, {layout.model or 'the model'} has {len(blocks)} blocks"
            f"{f'; missing: {missing}' if missing else ''}{f'; unknown: {unknown}' if unknown else ''}."
        )
    rows = []
    for layer, names in enumerate(blocks):
        weights = sum(prod(layout.shapes[name]) for name in names)
        for name in names:
            share = prod(layout.shapes[name]) / weights
            for kind, cost in {_FULL: 0.0, **measured[layer]}.items():
                option = Option(kind)
                rows.append(CostRow(name, option, cost * share, cost * share, option.nbytes(layout.shapes[name]), 0.0))
    return CostTable(rows, model=layout.model)


def write_casting_cost(table: CostTable, layout: FileLayout, path: Path) -> None:
    """Write a cost table as a casting_cost table.

    A row is the sum of MixedQuantFlux's metric over the matrices of one block in one type. The sum is above what the whole
    block costs at once where errors overlap (published: the six parts of layer 10 in Q8_0 cost 26 to 41 each, together 42).
    """
    by_tensor = table.by_tensor()
    lines: list[tuple[int, str, str]] = []
    for layer, names in enumerate(_blocks(layout)):
        measured = [by_tensor[name] for name in names if name in by_tensor]
        if len(measured) < len(names):
            lacking = next(name for name in names if name not in by_tensor)
            raise FormatError(f"The cost table lacks {lacking}; a casting_cost table needs every matrix of a block.")
        shared = [option for option in measured[0] if str(option) in FORMATS and all(option in rows for rows in measured)]
        lines += [(layer, _quant(option.type), f"{sum(rows[option].mfq_cost for rows in measured):.6g}") for option in shared]
    with written_whole(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(lines)


def _read(path: Path) -> dict[int, dict[str, float]]:
    by_layer: dict[int, dict[str, float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not set(COLUMNS) <= set(reader.fieldnames or ()):
            raise FormatError(f"{path} is no casting_cost table: its columns are {reader.fieldnames}, needed are {COLUMNS}.")
        for line in reader:
            kind = _ggml_type(line["quant"])
            if kind is None:
                continue
            layer, cost = _numbers(line, f"{path}, line {reader.line_num}")
            costs = by_layer.setdefault(layer, {})
            if kind not in costs or line.get("note") != _PATCHED:
                costs[kind] = cost
    return by_layer


def _numbers(line: Mapping[str, str], where: str) -> tuple[int, float]:
    try:
        layer, cost = int(line["layer"]), float(line["cost_mse"])
    except (TypeError, ValueError) as error:
        raise FormatError(f"{where}: {error}. layer is a whole number, cost_mse a number.") from None
    if layer < 0 or not math.isfinite(cost) or cost < 0:
        raise FormatError(f"{where}: layer and cost_mse are finite and not negative, got {layer} and {cost}.")
    return layer, cost


def _ggml_type(quant: str) -> str | None:
    name = quant.removesuffix("_S").removesuffix("_M") if "_K_" in quant else quant
    return name if name in FORMATS else None


def _quant(kind: str) -> str:
    return f"{kind}_S" if kind in ("Q3_K", "Q4_K", "Q5_K") else kind


def _blocks(layout: FileLayout) -> list[list[str]]:
    """Return the matrices of every block, double blocks first."""
    blocks: dict[tuple[bool, int], list[str]] = {}
    for name in layout.blocks:
        kind, index = block_of(name) or ("", 0)
        blocks.setdefault((kind == "single_blocks", index), []).append(name)
    return [blocks[key] for key in sorted(blocks)]
