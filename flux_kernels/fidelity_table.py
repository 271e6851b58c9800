"""Fidelity's errors for people: the worst layers first, and a sentence for each mode."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from .compute import compute_of_layer

if TYPE_CHECKING:
    from .fidelity import LayerError

_SPARED = "*"


def fidelity_table(errors: Sequence[LayerError], rows: int | None, threshold: float) -> str:
    """Return a row for each layer, the worst error first, and under them what the layers that really run a mode come to.

    Args:
        errors: of all layers and modes.
        rows: to show at most; None shows all.
        threshold: layers above it are counted, a fraction.
    """
    headings = list(dict.fromkeys(map(_mode, errors)))
    by_layer: dict[str, dict[str, LayerError]] = {}
    for error in errors:
        by_layer.setdefault(error.layer, {})[_mode(error)] = error
    ranked = sorted(by_layer.values(), key=lambda found: -max(map(_counted, found.values())))
    shown = ranked[:rows]
    body = [_line(found, headings) for found in shown]
    heads = ["layer", "format", *headings]
    widths = [max(len(line[column]) for line in [heads, *body]) for column in range(len(heads))]
    lines = ["  ".join(_pad(line, widths)).rstrip() for line in [heads, *body]]
    if len(shown) < len(ranked):
        lines.append(
            f"... and {len(ranked) - len(shown)} better ones: print(report.table(rows=None)), report.rows, report.to_csv(path)"
        )
    spared = len({error.layer for error in errors if _spared(error)})
    if spared:
        lines.append(
            f"{spared} of {len(ranked)} layers (modulation, embedders, final projection), marked {_SPARED}, run as exact whatever the "
            "mode, unless a map of patterns names them; they do not count below"
        )
    return "\n".join([*lines, *(_summary(heading, errors, threshold) for heading in headings)])


def _mode(error: LayerError) -> str:
    return f"{error.compute} + outliers" if error.outliers else error.compute


def _spared(error: LayerError) -> bool:
    """Tell whether one mode for the whole model leaves the layer exact."""
    return compute_of_layer(error.compute, [error.layer]) != error.compute


def _counted(error: LayerError) -> float:
    return -1.0 if _spared(error) else error.relative_error


def _line(found: dict[str, LayerError], headings: Sequence[str]) -> list[str]:
    first = next(iter(found.values()))
    cells = [_cell(found[heading]) if heading in found else "" for heading in headings]
    return [first.layer, first.format, *cells]


def _cell(error: LayerError) -> str:
    channels = f" ({error.outliers} ch.)" if error.outliers else ""
    return f"{_percent(error.relative_error)}{channels}{_SPARED if _spared(error) else ' '}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2g} %"


def _pad(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in enumerate(zip(line, widths))]


def _summary(heading: str, errors: Sequence[LayerError], threshold: float) -> str:
    run = [error for error in errors if _mode(error) == heading and not _spared(error)]
    if not run:
        return f"{heading}: no layer runs it."
    worst = max(run, key=lambda error: error.relative_error)
    above = sum(error.relative_error > threshold for error in run)
    count = "no layer" if not above else f"{above} of {len(run)} layers"
    return (
        f"{heading}: median {_percent(median(error.relative_error for error in run))}, worst {_percent(worst.relative_error)} at "
        f"{worst.layer}; {count} above {_percent(threshold)}"
    )
