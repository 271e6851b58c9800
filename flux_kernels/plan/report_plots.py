"""Draw a plan: size against cost, tensors against types, where the bytes go. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from math import prod
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np

from ..mixed.option import Option
from ..models.names import tensor_class
from ..models.types import BLOCK, LEFTOVER, VECTOR, tensor_kind
from ..report.amounts import counted, unit_of
from ..report.plot_style import BLUE, FAINT, GREEN, INK, ORANGE, RED, panel
from .report_data import Measured, ReportData

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Style = dict[str, Any]
PLAN, GREEDY, UNIFORM, JOINT = RED, ORANGE, BLUE, GREEN
# Tensors up to which every row of the heat map has its name; above, every class of tensors.
_LABELLED_ROWS = 64
# Of a type's name on the curve, as shares of the axes.
_NAME_WIDTH, _NAME_HEIGHT = 0.06, 0.034
_PLACES = {BLOCK: "", LEFTOVER: ", outside the blocks", VECTOR: ", biases and norms"}


def size_against_cost(data: ReportData) -> Figure:
    """Draw file size against cost: uniform files, greedy, the best plans, this plan, joint measurements."""
    figure, axes = panel(9.5, 5.6)
    plan, (unit, unit_name) = data.plan, unit_of(data.plan.bytes)
    _line(axes, data.best, unit, PLAN, "the best plan of every size, tensor by tensor", "-")
    _line(axes, data.greedy, unit, GREEDY, "whole blocks, greedy choice (the earlier method)", "--")
    _line(axes, [(size, cost) for _, size, cost in data.uniform], unit, UNIFORM, "one type for everything", "o")
    _joint(axes, data.joint, unit)
    if plan.cost > 0:
        star: Style = dict(zorder=5, markersize=19, markeredgecolor="white")
        axes.plot(plan.bytes / unit, plan.cost, "*", color=PLAN, label="this plan", **star)
    if data.budget:
        axes.axvline(data.budget / unit, color=FAINT, linewidth=1, linestyle=":")
        place: Style = dict(xytext=(-4, 0), ha="right", va="bottom", rotation=90)
        _note(axes, "size asked for", (data.budget / unit, 0.015), FAINT, xycoords=("data", "axes fraction"), **place)
    axes.set_yscale("log")
    _window(axes, data, unit)
    _label_uniform(axes, data, unit)
    axes.set_xlabel(f"size of the file in {unit_name} (smaller is to the left)")
    axes.set_ylabel("error, log scale (lower is better)")
    axes.set_title("What each size costs: lower left is best", loc="left", fontweight="bold")
    axes.grid(True, which="major", alpha=0.25)
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    return figure


def _note(axes: Axes, text: str, at: tuple[float, float], color: str, **place: Any) -> None:
    """Write small words at a point; `xytext` of `place` is in points from it."""
    axes.annotate(text, at, textcoords="offset points", fontsize=8.5, color=color, **place)


def _label_uniform(axes: Axes, data: ReportData, unit: float) -> None:
    """Name the uniform files at their points; names of files of nearly one size are moved apart."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    columns: dict[tuple[bool, int], list[tuple[float, float, str]]] = {}
    for option, size, cost in data.uniform:
        if cost > 0:
            # IQ4_XS and MXFP4, just left of the crowd of types with 4.5 bits.
            before = option.bits == 4.25
            column = round((size / unit - left) / (right - left) / _NAME_WIDTH)
            height = math.log(cost / bottom) / math.log(top / bottom)
            columns.setdefault((before, column), []).append((height, size / unit, str(option)))
    for (before, _), points in columns.items():
        points.sort()
        place: Style = dict(xytext=(-7, 0), ha="right") if before else dict(xytext=(7, 0), ha="left")
        heights = spread([height for height, _, _ in points], _NAME_HEIGHT)
        for (_, x, label), height in zip(points, heights, strict=True):
            _note(axes, label, (x, height), UNIFORM, xycoords=("data", "axes fraction"), va="center", **place)


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Move sorted places as little as possible (least squares), so that neighbours are `gap` apart."""
    # Of places less their share of the gaps: these must not fall.
    groups: list[list[float]] = []
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
    style: Style = dict(fmt="D", color=JOINT, markersize=5, capsize=4)
    for number, row in enumerate(joint):
        low, high = (row.cost if end is None else end for end in (row.low, row.high))
        interval = [[max(0.0, row.cost - low)], [max(0.0, high - row.cost)]]
        label = "" if number else "measured as a whole, with its 95 % interval"
        axes.errorbar(row.bytes / unit, row.cost, yerr=interval, label=label or None, **style)
        _note(axes, row.label, (row.bytes / unit, row.cost), JOINT, xytext=(-6, -4), ha="right")


def _window(axes: Axes, data: ReportData, unit: float) -> None:
    """Show the sizes that people choose from: 16 bit and nearly 16 bit would squeeze all else together."""
    uniform = [(size, cost) for _, size, cost in data.uniform if cost > 0]
    sizes = [data.plan.bytes, *(size for size, _ in uniform), *(row.bytes for row in data.joint)]
    low, high = min(sizes), max(sizes)
    margin = 0.06 * max(high - low, high * 0.05)
    axes.set_xlim((low - margin) / unit, (high + margin) / unit)
    costs = [cost for size, cost in (*data.best, *data.greedy) if low - margin <= size <= high + margin]
    costs += [data.plan.cost, *(cost for _, cost in uniform)]
    costs += [value for row in data.joint for value in (row.cost, row.low, row.high) if value is not None]
    shown = [cost for cost in costs if cost > 0]
    if shown:
        axes.set_ylim(min(shown) * 0.7, max(shown) * 1.6)


def heat_map(data: ReportData) -> Figure:
    """Draw the cost of every tensor in every type, log scale, the chosen type marked."""
    from matplotlib.colors import LogNorm

    costs = data.costs
    order = {name: place for place, name in enumerate(dict.fromkeys(map(tensor_class, data.layout.shapes)))}
    names = sorted((name for name in data.layout.shapes if name in costs), key=lambda name: order[tensor_class(name)])
    options = sorted({option for row in costs.values() for option, cost in row.items() if cost > 0}, key=_wide_last)
    grid = np.array([[costs[name].get(option, np.nan) for option in options] for name in names], dtype=float)
    grid[grid <= 0] = np.nan
    is_short = len(names) <= _LABELLED_ROWS
    figure, axes = panel(2.9 + 0.52 * len(options), 1.9 + (0.24 if is_short else 0.055) * len(names))
    finite = grid[np.isfinite(grid)]
    norm = LogNorm(finite.min(), max(finite.max(), finite.min() * 1.001)) if finite.size else None
    drawn = axes.imshow(grid, aspect="auto", cmap="YlGnBu_r", norm=norm, interpolation="nearest")
    chosen = [(options.index(data.options[name]), y) for y, name in enumerate(names) if data.options.get(name) in options]
    if chosen:
        frame: Style = dict(marker="s", s=34, facecolor="none", linewidth=1.6)
        axes.scatter(*zip(*chosen), color=PLAN, **(frame if is_short else dict(marker="_", s=150, linewidth=2.4)))
    axes.set_xticks(range(len(options)), [f"{option}\n{option.bits:.3g}" for option in options], fontsize=8)
    axes.xaxis.tick_top()
    _label_rows(axes, names, is_short)
    if finite.size:
        bar = figure.colorbar(drawn, ax=axes, fraction=0.04, pad=0.02)
        bar.set_label("error that this one choice adds (darker is better)", fontsize=9)
    title = "Every tensor in every type; red: chosen\n(bits per weight, a rank's own left aside)"
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11, pad=12)
    return figure


def _wide_last(option: Option) -> tuple[float, Option]:
    return option.bits, option


def _label_rows(axes: Axes, names: Sequence[str], is_short: bool) -> None:
    if is_short:
        axes.set_yticks(range(len(names)), [name.removesuffix(".weight") for name in names], fontsize=8)
        return
    bounds: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        bounds.setdefault(tensor_class(name).removesuffix(".weight").replace("_blocks.*.", ": "), []).append(row)
    axes.set_yticks([(rows[0] + rows[-1]) / 2 for rows in bounds.values()], list(bounds), fontsize=9)
    axes.tick_params(axis="y", length=0)
    for rows in bounds.values():
        axes.axhline(rows[-1] + 0.5, color="white", linewidth=1.5)
    axes.set_ylabel("first block on top, last block at the bottom of each group", fontsize=9)


def bytes_by_type(data: ReportData) -> Figure:
    """Draw how many bytes of the file each type takes, and in how many tensors."""
    layout = data.layout
    groups: dict[tuple[str, Option], list[str]] = {}
    for name, shape in layout.shapes.items():
        groups.setdefault((_PLACES[tensor_kind(name, shape, layout.architecture)], data.options[name]), []).append(name)
    unit, unit_name = unit_of(data.plan.bytes)
    # The blocks first, biases and norms mixed with the rest outside of them.
    keys = sorted(groups, key=lambda key: (bool(key[0]), _wide_last(key[1])))
    figure, axes = panel(9.5, 1.6 + 0.36 * len(keys))
    values = [sum(layout.option_bytes(name, option) for name in groups[place, option]) / unit for place, option in keys]
    axes.barh(range(len(keys)), values, color=[FAINT if place else UNIFORM for place, _ in keys], height=0.7)
    for y, (key, value) in enumerate(zip(keys, values)):
        count, share = len(groups[key]), sum(prod(layout.shapes[name]) for name in groups[key]) / layout.parameters
        text = f" {value:.3g} {unit_name}: {counted(count, 'tensor')}, {100 * share:.2g} % of the weights"
        axes.annotate(text, (value, y), va="center", fontsize=9, color=INK)
    axes.set_yticks(range(len(keys)), [f"{option}{place}" for place, option in keys], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, max(values) * 1.55)
    axes.set_xlabel(f"bytes of the file in {unit_name}")
    axes.set_title("Bytes of the file by type", loc="left", fontweight="bold")
    return figure


def all_plots(data: ReportData) -> Mapping[str, Figure]:
    """Draw every figure of the report, by the suffix of its PNG file."""
    return {"curve": size_against_cost(data), "heat_map": heat_map(data), "bytes": bytes_by_type(data)}
