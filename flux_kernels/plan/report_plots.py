"""Draw a plan for people: size against cost, every tensor in every type, and where the bytes go. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from math import prod
from statistics import mean
from typing import TYPE_CHECKING

from ..flux.names import tensor_class
from ..flux.types import BLOCK, LEFTOVER, VECTOR, tensor_kind
from ..mixed.file_layout import FileLayout, option_bits
from ..report.plot_style import BLUE, FAINT, GREEN, INK, ORANGE, RED, panel
from ..report.sizes import unit_of
from .report_data import Measured, ReportData

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLAN, GREEDY, UNIFORM, JOINT = RED, ORANGE, BLUE, GREEN
_LABELLED_ROWS = 64  # tensors up to which every row of the heat map has its name; above, every class of tensors
_NAME_WIDTH, _NAME_HEIGHT = 0.06, 0.034  # of a type's name on the curve, as shares of the axes
_PLACES = {BLOCK: "", LEFTOVER: ", outside the blocks", VECTOR: ", biases and norms"}


def size_against_cost(data: ReportData) -> Figure:
    """Draw file size against predicted cost: uniform files, the greedy baseline, the best plans, this plan, joint measurements."""
    figure, axes = panel(9.5, 5.6)
    unit, name = unit_of(data.plan.bytes)
    _line(axes, data.best, unit, PLAN, "the best plan of every size, tensor by tensor", "-")
    _line(axes, data.greedy, unit, GREEDY, "whole blocks, greedy choice (the earlier method)", "--")
    for label, size, cost in data.uniform:
        if cost > 0:
            axes.plot(size / unit, cost, "o", color=UNIFORM, markersize=6)
    axes.plot([], [], "o", color=UNIFORM, label="one type for everything")
    _joint(axes, data.joint, unit)
    if data.plan.cost > 0:
        axes.plot(
            data.plan.bytes / unit,
            data.plan.cost,
            "*",
            color=PLAN,
            zorder=5,
            markersize=19,
            markeredgecolor="white",
            label="this plan",
        )
    if data.budget:
        axes.axvline(data.budget / unit, color=FAINT, linewidth=1, linestyle=":")
        axes.annotate(
            "size asked for",
            (data.budget / unit, 0.015),
            (-4, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="bottom",
            fontsize=8.5,
            color=FAINT,
        )
    axes.set_yscale("log")
    _window(axes, data, unit)
    _label_uniform(axes, data, unit)
    axes.set_xlabel(f"size of the file in {name} (smaller is to the left)")
    axes.set_ylabel("error, log scale (lower is better)")
    axes.set_title("What each size costs: lower left is best", loc="left", fontweight="bold")
    axes.grid(True, which="major", alpha=0.25)
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    return figure


def _label_uniform(axes: Axes, data: ReportData, unit: float) -> None:
    """Name the uniform files beside their points; names of files of nearly one size are moved apart."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    columns: dict[tuple[bool, int], list[tuple[float, float, str]]] = {}
    for label, size, cost in data.uniform:
        if cost > 0:
            before = option_bits(label) == 4.25  # IQ4_XS and MXFP4, just left of the crowd of types with 4.5 bits
            column = round((size / unit - left) / (right - left) / _NAME_WIDTH)
            height = math.log(cost / bottom) / math.log(top / bottom)
            columns.setdefault((before, column), []).append((height, size / unit, label))
    for (before, _), points in columns.items():
        points.sort()
        heights = spread([height for height, _, _ in points], _NAME_HEIGHT)
        for (_, size, label), height in zip(points, heights, strict=True):
            where = dict(textcoords="offset points", va="center", fontsize=8.5, color=UNIFORM)
            place = dict(xytext=(-7, 0), ha="right") if before else dict(xytext=(7, 0), ha="left")
            axes.annotate(label, (size, height), xycoords=("data", "axes fraction"), **where, **place)


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Move sorted places as little as possible (least squares), so that neighbours are `gap` apart."""
    groups: list[list[float]] = []  # of places less their share of the gaps: these must not fall
    for index, place in enumerate(places):
        groups.append([place - index * gap])
        while len(groups) > 1 and mean(groups[-2]) >= mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    level = [mean(group) for group in groups for _ in group]
    return [value + index * gap for index, value in enumerate(level)]


def _line(axes: Axes, points: Sequence[tuple[int, float]], unit: float, color: str, label: str, style: str) -> None:
    shown = [(size / unit, cost) for size, cost in points if cost > 0]
    axes.plot([size for size, _ in shown], [cost for _, cost in shown], style, color=color, linewidth=1.8, label=label)


def _joint(axes: Axes, joint: Sequence[Measured], unit: float) -> None:
    """Draw joint measurements with their intervals, where there are any."""
    for number, found in enumerate(joint):
        below = found.cost - (found.cost if found.low is None else found.low)
        above = (found.cost if found.high is None else found.high) - found.cost
        axes.errorbar(
            found.bytes / unit,
            found.cost,
            yerr=[[max(0.0, below)], [max(0.0, above)]],
            fmt="D",
            color=JOINT,
            markersize=5,
            capsize=4,
            label="measured as a whole, with its 95 % interval" if number == 0 else None,
        )
        axes.annotate(
            found.label,
            (found.bytes / unit, found.cost),
            (-6, -4),
            textcoords="offset points",
            ha="right",
            fontsize=8.5,
            color=JOINT,
        )


def _window(axes: Axes, data: ReportData, unit: float) -> None:
    """Show the sizes that somebody would choose from: 16 bit and nearly 16 bit would squeeze all else together."""
    sizes = [size for _, size, cost in data.uniform if cost > 0] + [data.plan.bytes, *(found.bytes for found in data.joint)]
    low, high = min(sizes), max(sizes)
    margin = 0.06 * max(high - low, high * 0.05)
    axes.set_xlim((low - margin) / unit, (high + margin) / unit)
    shown = [cost for size, cost in (*data.best, *data.greedy) if cost > 0 and low - margin <= size <= high + margin]
    shown += [cost for _, _, cost in data.uniform if cost > 0] + [
        value for f in data.joint for value in (f.cost, f.low, f.high) if value
    ]
    shown += [data.plan.cost] if data.plan.cost > 0 else []
    if shown:
        axes.set_ylim(min(shown) * 0.7, max(shown) * 1.6)


def heat_map(data: ReportData) -> Figure:
    """Draw the cost of every tensor in every type, log scale, the chosen type marked."""
    import numpy as np
    from matplotlib.colors import LogNorm

    layout, costs = data.layout, data.costs
    names = sorted(costs, key=lambda name: (_class_order(layout, name), list(layout.shapes).index(name)))
    options = sorted({o for row in costs.values() for o in row if any(r.get(o, 0) > 0 for r in costs.values())}, key=_wide_last)
    grid = np.array([[costs[name].get(option, np.nan) for option in options] for name in names], dtype=float)
    grid[grid <= 0] = np.nan
    few = len(names) <= _LABELLED_ROWS
    row = 0.24 if few else 0.055
    figure, axes = panel(2.9 + 0.52 * len(options), 1.9 + row * len(names))
    finite = grid[np.isfinite(grid)]
    norm = LogNorm(finite.min(), max(finite.max(), finite.min() * 1.001)) if finite.size else None
    drawn = axes.imshow(grid, aspect="auto", cmap="YlGnBu_r", norm=norm, interpolation="nearest")
    chosen = [(options.index(data.options[name]), y) for y, name in enumerate(names) if data.options.get(name) in options]
    if chosen:
        style = dict(marker="s", s=34, facecolor="none") if few else dict(marker="_", s=150)
        axes.scatter(*zip(*chosen), color=PLAN, linewidth=1.6 if few else 2.4, **style)
    axes.set_xticks(range(len(options)), [f"{o}\n{option_bits(o):.3g}" for o in options], fontsize=8)
    axes.xaxis.tick_top()
    _label_rows(axes, names, few)
    bar = figure.colorbar(drawn, ax=axes, fraction=0.04, pad=0.02) if finite.size else None
    if bar:
        bar.set_label("error that this one choice adds (darker is better)", fontsize=9)
    axes.set_title(
        "Every tensor in every type; red: chosen\n(bits per weight, a rank's own left aside)",
        loc="left",
        fontweight="bold",
        fontsize=11,
        pad=12,
    )
    return figure


def _wide_last(option: str) -> tuple[float, str]:
    return option_bits(option), option


def _class_order(layout: FileLayout, name: str) -> int:
    return list(dict.fromkeys(tensor_class(other) for other in layout.shapes)).index(tensor_class(name))


def _label_rows(axes: Axes, names: Sequence[str], few: bool) -> None:
    if few:
        axes.set_yticks(range(len(names)), [name.removesuffix(".weight") for name in names], fontsize=8)
        return
    bounds: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        bounds.setdefault(tensor_class(name).removesuffix(".weight"), []).append(row)
    axes.set_yticks([(rows[0] + rows[-1]) / 2 for rows in bounds.values()], [_readable(key) for key in bounds], fontsize=9)
    axes.tick_params(axis="y", length=0)
    for rows in bounds.values():
        axes.axhline(rows[-1] + 0.5, color="white", linewidth=1.5)
    axes.set_ylabel("first block on top, last block at the bottom of each group", fontsize=9)


def _readable(tensor: str) -> str:
    return tensor.replace("_blocks.*.", ": ")


def bytes_by_type(data: ReportData) -> Figure:
    """Draw how many bytes of the file each type takes, and in how many tensors."""
    sizes: dict[str, list[int]] = {}
    for name, shape in data.layout.shapes.items():
        option = data.options[name]
        key = f"{option}{_PLACES[tensor_kind(name, shape)]}"
        entry = sizes.setdefault(key, [0, 0, 0])
        entry[0] += data.layout.option_bytes(name, option)
        entry[1] += 1
        entry[2] += prod(shape)
    unit, unit_name = unit_of(data.plan.bytes)
    keys = sorted(sizes, key=lambda key: (", " in key, _wide_last(key.split(",")[0])))
    figure, axes = panel(9.5, 1.6 + 0.36 * len(keys))
    values = [sizes[key][0] / unit for key in keys]
    axes.barh(range(len(keys)), values, color=[FAINT if ", " in key else UNIFORM for key in keys], height=0.7)
    for y, key in enumerate(keys):
        count = sizes[key][1]
        share = sizes[key][2] / data.layout.parameters
        text = f" {values[y]:.3g} {unit_name}: {count} tensor{'s' * (count > 1)}, {100 * share:.2g} % of the weights"
        axes.annotate(text, (values[y], y), va="center", fontsize=9, color=INK)
    axes.set_yticks(range(len(keys)), keys, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, max(values) * 1.55)
    axes.set_xlabel(f"bytes of the file in {unit_name}")
    axes.set_title("Bytes of the file by type", loc="left", fontweight="bold")
    return figure


def all_plots(data: ReportData) -> Mapping[str, Figure]:
    """Draw every figure of the report, by the suffix of its PNG file."""
    return {"curve": size_against_cost(data), "heat_map": heat_map(data), "bytes": bytes_by_type(data)}
