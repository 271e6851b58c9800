"""What fidelity measured: errors as data, as a table of the worst layers, as the mode of each layer."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from statistics import median

from torch import Tensor

from ..compute import compute_of_layer
from ..errors import FormatError
from ..files import written_whole
from ..report.text_table import aligned

FASTEST_FIRST = ("int8", "fp16_accumulate", "exact")
# Layers of a printed report, and the relative error above which its sentences count layers.
SHOWN = 20
THRESHOLD = 0.02
_SPARED = "*"
_WORDS = ("layer", "format")  # columns of a printed report that hold no numbers


@dataclass(frozen=True)
class LayerError:
    """Hold one layer's relative RMS error against float64 in one compute mode.

    It is a fraction, over all measured calls. `outliers` is how many input channels were left out of the int8 product (see `outliers.py`).
    """

    layer: str
    format: str
    compute: str
    relative_error: float
    calls: int
    outliers: int = 0


class FidelityReport:
    """Hold the measured errors in `rows`; print it for the worst layers, or ask it for `modes`."""

    def __init__(self, rows: list[LayerError], channels: Mapping[str, Tensor] | None = None):
        self.rows = rows
        self.channels = dict(channels or {})

    def modes(self, threshold: float) -> dict[str, str]:
        """Return {layer: fastest mode whose error is at most `threshold`} for `swap_linear(compute=...)`.

        Where fidelity measured outlier channels, "int8" may mean with them: pass `outliers(threshold)` to `keep_outliers` too.

        Args:
            threshold: relative RMS error of a layer's output, as a fraction (0.01 is 1 %).

        Raises:
            FormatError: where the threshold is no fraction from 0 to 1.
        """
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
            raise FormatError(f"threshold is a fraction from 0 to 1 (0.02 is 2 %), got {threshold!r}.")
        errors: dict[str, dict[str, float]] = {}
        for row in self.rows:
            by_mode = errors.setdefault(row.layer, {})
            by_mode[row.compute] = min(row.relative_error, by_mode.get(row.compute, math.inf))
        return {layer: _fastest(layer, by_mode, threshold) for layer, by_mode in errors.items()}

    def outliers(self, threshold: float) -> dict[str, Tensor]:
        """Return {layer: channels} for `keep_outliers`.

        They are the layers that reach `threshold` in int8 only with outlier channels.
        """
        plain = {row.layer: row.relative_error for row in self.rows if row.compute == "int8" and not row.outliers}
        chosen = self.modes(threshold)
        return {
            row.layer: self.channels[row.layer]
            for row in self.rows
            if row.outliers and chosen[row.layer] == "int8" and row.relative_error <= threshold < plain[row.layer]
        }

    def to_json(self) -> str:
        """Return the rows as JSON."""
        return json.dumps([asdict(row) for row in self.rows], indent=1)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write all rows as CSV; errors are fractions. Raises OSError where the file cannot be written."""
        with written_whole(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(field.name for field in fields(LayerError))
            writer.writerows(map(astuple, self.rows))

    def table(self, rows: int | None = SHOWN, threshold: float = THRESHOLD) -> str:
        """Return a table of the worst layers and a sentence for each mode.

        Args:
            rows: layers to show; None shows all.
            threshold: the sentences count the layers above it; a relative RMS error as a fraction.
        """
        return fidelity_table(self.rows, rows, threshold)

    def __str__(self) -> str:
        return self.table()


def _fastest(layer: str, errors: dict[str, float], threshold: float) -> str:
    fitting = [mode for mode in FASTEST_FIRST if errors.get(mode, math.inf) <= threshold]
    return compute_of_layer(fitting[0] if fitting else "exact", [layer])


def fidelity_table(errors: Sequence[LayerError], rows: int | None, threshold: float) -> str:
    """Return a row for each layer, the worst error first, and a sentence for each mode.

    Sentences are about the layers that really run a mode.

    Args:
        errors: of all layers and modes.
        rows: to show at most; None shows all.
        threshold: layers above it are counted, a fraction.
    """
    headings = list(dict.fromkeys(map(_mode, errors)))
    by_layer: dict[str, dict[str, LayerError]] = {}
    for error in errors:
        by_layer.setdefault(error.layer, {})[_mode(error)] = error
    ranked = sorted(by_layer.values(), key=lambda by_mode: -max(map(_counted, by_mode.values())))
    shown = ranked[:rows]
    body = [_line(by_mode, headings) for by_mode in shown]
    heads = [*_WORDS, *headings]
    lines = aligned([heads, *body], lambda column, _: column >= len(_WORDS))
    if len(shown) < len(ranked):
        lines.append(
            f"... and {len(ranked) - len(shown)} with smaller errors: print(report.table(rows=None)), report.rows, "
            "report.to_csv(path)"
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


def _line(by_mode: dict[str, LayerError], headings: Sequence[str]) -> list[str]:
    first = next(iter(by_mode.values()))
    cells = [_cell(by_mode[heading]) if heading in by_mode else "" for heading in headings]
    return [first.layer, first.format, *cells]


def _cell(error: LayerError) -> str:
    channels = f" ({error.outliers} ch.)" if error.outliers else ""
    return f"{_percent(error.relative_error)}{channels}{_SPARED if _spared(error) else ' '}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2g} %"


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
