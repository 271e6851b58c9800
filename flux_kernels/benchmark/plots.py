"""Draw the rows of one run, as PNG bytes, for people who do not know the field. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..models.calls import Call
from ..report.amounts import unit_of
from ..report.plot_style import FAINT, INK
from .ceilings import Ceilings
from .linears import least_bytes
from .names import KINDS, TORCH, label
from .plot_style import finished, log_scale, look, panels, providers
from .totals import Total

_SPREAD = 1.6  # how far apart the sides of one M are drawn, as a factor
_DOT: dict[str, Any] = dict(linestyle="", markersize=5, alpha=0.75)
_FORMAT_MARKS = "osD^vP*X<>hpd8"
_BYTES: dict[str, Literal["full", "none"]] = dict(peak_bytes="full", weight_bytes="none")  # how a mark is filled
_FILLS = dict(peak_bytes="filled marks: most in use at once", weight_bytes="hollow marks: the weights alone")
_TFLOPS = "TFLOP/s: million million operations a second"
_ROWS = "rows M of the layer's input: image and text tokens (M = 1: one vector for the whole picture)"


def throughput(rows: Sequence[Mapping]) -> bytes:
    """Return a PNG: operations a second over the rows M of a layer's input, a panel for each type.

    Calls of one M are taken together (their operations over their time); bars reach from the 20th to the 80th percentile.
    """
    measured = [row for row in rows if row["p50_ms"]]
    figure, drawn = panels(_formats(measured))
    for axes, name in drawn:
        for provider in providers(measured):
            points = _by_rows(_of(measured, name, provider))
            if points:
                m, low, middle, high = zip(*points)
                bars = [[b - a for a, b in zip(low, middle)], [b - a for a, b in zip(middle, high)]]
                axes.errorbar(m, middle, bars, **look(provider, measured), markersize=5, linewidth=1.2, label=label(provider))
        log_scale(axes, "x", "y")
    return finished(figure, measured, "How fast the layers compute: higher is better", _ROWS, _TFLOPS)


def roofline(rows: Sequence[Mapping], ceilings: Ceilings) -> bytes:
    """Return a PNG: what bounds each call, memory or arithmetic, with both limits as measured.

    Libraries with weights of their own are left out: how many bytes they move is not known here.
    """
    known = [(row, _flops_a_byte(row)) for row in rows if row["p50_ms"]]
    points = [(row, intensity) for row, intensity in known if intensity is not None]
    measured = [row for row, _ in points]
    figure, drawn = panels(_formats(measured))
    left, right = min(x for _, x in points) / 2, max(x for _, x in points) * 2
    # Where both limits meet, in FLOP/byte.
    knee = 1e3 * ceilings.matmul_tflops / ceilings.copy_gb_s
    slope = [x for x in (left, min(max(knee, left), right))]
    for axes, name in drawn:
        memory = f"limit of memory: a copy, {ceilings.copy_gb_s:.3g} GB/s"
        axes.plot(slope, [x * ceilings.copy_gb_s / 1e3 for x in slope], "-", color=INK, linewidth=1.2, label=memory)
        product = f"limit of arithmetic: torch's product, {ceilings.matmul_tflops:.3g} TFLOP/s {ceilings.dtype}"
        axes.plot([slope[1], right], [ceilings.matmul_tflops] * 2, "--", color=INK, linewidth=1.2, label=product)
        for provider in providers(measured):
            mine = [(x, float(row["tflops"])) for row, x in points if (row["format"], row["provider"]) == (name, provider)]
            if mine:
                axes.plot(*zip(*mine), **look(provider, measured), **_DOT, label=label(provider))
        axes.set_xlim(left, right)
        log_scale(axes, "x", "y")
    x = "operations for each byte that must be moved (FLOP/byte); each mark is one kind of call"
    return finished(figure, measured, "What holds each call back: the nearer a line, the less there is to gain", x, _TFLOPS)


def speed_over_rows(rows: Sequence[Mapping]) -> bytes:
    """Return a PNG: speed of every call with torch's in the same run as 1, over the rows M of its input."""
    measured = [row for row in rows if row["p50_ms"]]
    base = {_key(row): float(row["p50_ms"]) for row in measured if row["provider"] == TORCH}
    measured = [row for row in measured if _key(row) in base]
    figure, drawn = panels(_formats(measured))
    sides = [name for name in providers(measured) if name != TORCH]
    for axes, name in drawn:
        axes.axhline(1, color=INK, linewidth=1.2, label=label(TORCH))
        for index, provider in enumerate(sides):
            # At one M the sides would hide each other.
            shift = _SPREAD ** (index / max(1, len(sides) - 1) - 0.5)
            mine = [(int(row["m"]) * shift, base[_key(row)] / float(row["p50_ms"])) for row in _of(measured, name, provider)]
            if mine:
                axes.plot(*zip(*mine), **look(provider, measured), **_DOT, label=label(provider))
        log_scale(axes, "x", "y")
    title = "Speed of each kind of call against the unquantized layer: above the line is faster"
    return finished(figure, measured, title, f"{_ROWS}, sides drawn side by side", "speed, with the unquantized layer as 1")


def memory_against_time(rows: Sequence[Mapping]) -> bytes:
    """Return a PNG: weights and peak memory of whole runs against their time, a panel for each kind."""
    from matplotlib.lines import Line2D

    measured = [row for row in rows if row["p50_ms"] and (row["weight_bytes"] or row["peak_bytes"])]
    figure, drawn = panels(list(dict.fromkeys(row["what"] for row in measured)), one_x=False)
    largest = max(float(row[key] or 0) for row in measured for key in _BYTES)
    (unit, unit_name), seconds = unit_of(largest), max(float(row["p50_ms"]) for row in measured) >= 1e3
    marks = {name: _FORMAT_MARKS[index % len(_FORMAT_MARKS)] for index, name in enumerate(_formats(measured))}
    for axes, what in drawn:
        for row in (row for row in measured if row["what"] == what):
            time = float(row["p50_ms"]) / (1e3 if seconds else 1)
            color = look(row["provider"], measured)["color"]
            sizes = {key: float(row[key]) / unit for key in _BYTES if row[key]}
            axes.plot([time] * len(sizes), list(sizes.values()), color=color, linewidth=0.8, alpha=0.5)
            for key, size in sizes.items():
                axes.plot(time, size, marks[row["format"]], color=color, markersize=7, fillstyle=_BYTES[key])
        axes.set_ylim(0, 1.08 * largest / unit)
        axes.set_title(KINDS[what].title, fontsize=11)
        log_scale(axes, "x")
    sides = [
        Line2D([], [], color=look(name, measured)["color"], linewidth=4, label=label(name)) for name in providers(measured)
    ]
    types = [Line2D([], [], color=FAINT, marker=mark, linestyle="", label=name) for name, mark in marks.items()]
    fills = [Line2D([], [], color=FAINT, marker="o", linestyle="", fillstyle=_BYTES[key], label=_FILLS[key]) for key in _BYTES]
    return finished(
        figure,
        measured,
        "Memory and time of whole runs: lower left is best",
        f"time in {'seconds' if seconds else 'milliseconds'}, log scale",
        f"memory in {unit_name}",
        [*sides, *types, *fills],
    )


def _formats(rows: Sequence[Mapping]) -> list[str]:
    return list(dict.fromkeys(row["format"] for row in rows))


def _of(rows: Sequence[Mapping], name: str, provider: str) -> list[Mapping]:
    return [row for row in rows if (row["format"], row["provider"]) == (name, provider)]


def _key(row: Mapping) -> tuple:
    return row["format"], row["size"], row["where"]


def _call(row: Mapping) -> Call:
    return Call(int(row["m"]), int(row["n"]), int(row["k"]), int(row["calls"]), row["where"])


def _flops_a_byte(row: Mapping) -> float | None:
    import torch

    call = _call(row)
    moved = least_bytes(row["format"], row["provider"], call, getattr(torch, row["dtype"]).itemsize)
    return None if moved is None else call.flops / moved


def _by_rows(rows: Sequence[Mapping]) -> list[tuple[int, float, float, float]]:
    """Return M and TFLOP/s (low, median, high) of its calls together, each as often as a step has it."""
    points = []
    for m in sorted({int(row["m"]) for row in rows}):
        mine = [row for row in rows if int(row["m"]) == m]
        flops = sum(_call(row).flops * int(row["calls"]) for row in mine)
        total = Total.of(*mine)
        low, middle, high = (flops / time / 1e9 for time in (total.p80, total.p50, total.p20))
        points.append((m, low, middle, high))
    return points
