"""Share what plots of benchmark rows have in common: looks of the sides, panels, legend, origin."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..report.plot_style import DPI, png
from .names import SIDES
from .record import origin_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PEER_COLORS = ("#7048a8", "#0b8a8a", "#8a5a44", "#6a6a6a", "#c06090", "#5c7a29")
_PEER_MARKS = "P*<>p8H"
_COLUMNS = 3  # panels in a line
# Inches of a figure: at the width of a page its words are as large as the page's
_WIDTH = 9.6
_HEIGHT = 3.1  # inches of a line of panels
_WORDS = 9.5  # points
_TITLE, _GAP = 0.36, 0.08  # inches that the title takes, and between it, legend and panels


def providers(rows: Sequence[Mapping]) -> list[str]:
    """List the sides of these rows: those of `SIDES` in its order, then other libraries as they come."""
    sides = dict.fromkeys(row["provider"] for row in rows)
    return [name for name in SIDES if name in sides] + [name for name in sides if name not in SIDES]


def look(provider: str, rows: Sequence[Mapping]) -> dict:
    """Return colour and mark of a side: its own in every plot of these rows."""
    if provider in SIDES:
        return dict(color=SIDES[provider].color, marker=SIDES[provider].mark)
    index = [name for name in providers(rows) if name not in SIDES].index(provider)
    return dict(color=_PEER_COLORS[index % len(_PEER_COLORS)], marker=_PEER_MARKS[index % len(_PEER_MARKS)])


def panels(names: Sequence[str], one_x: bool = True) -> tuple[Figure, list[tuple[Axes, str]]]:
    """Return a figure with a panel for each name, at most three in a line; `one_x`: one x axis for all.

    Raises:
        ImportError: where matplotlib is missing.
    """
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(_WIDTH, 0.9 + _HEIGHT * lines), dpi=DPI, layout="constrained")
    grid = figure.subplots(lines, columns, sharex=one_x, sharey=True, squeeze=False).flatten()
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(grid, names):
        axes.set_title(name, fontsize=11)
        axes.tick_params(labelbottom=True, labelleft=True, labelsize=_WORDS)
        axes.grid(True, alpha=0.25)
    return figure, list(zip(grid, names))


def log_scale(axes: Axes, *which: str) -> None:
    """Give axes a log scale with plain numbers, enough of them to read a value off."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for name in which:
        axis = getattr(axes, f"{name}axis")
        axes.set(**{f"{name}scale": "log"})
        low, high = axis.get_view_interval()
        subs = (1.0,) if high / low > 100 else (1.0, 2.0, 5.0) if high / low > 8 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
        axis.set_major_locator(LogLocator(base=10, subs=subs))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())


def finished(figure: Figure, rows: Sequence[Mapping], title: str, x: str, y: str, handles: Sequence | None = None) -> bytes:
    """Write title, axis labels, legend and origin, and return the PNG."""
    drawn = {name: handle for axes in figure.axes for handle, name in zip(*axes.get_legend_handles_labels())}
    if handles is not None:
        drawn = {handle.get_label(): handle for handle in handles}
    origins = dict.fromkeys(f"{origin_text(row)}; {row['size']}" for row in rows)
    lines = [x, "", *(f"Measured on {origin}" for origin in origins)]
    figure.supxlabel("\n".join(textwrap.fill(line, int(13 * _WIDTH)) for line in lines), fontsize=_WORDS)
    figure.supylabel(y, fontsize=_WORDS)
    _head(figure, title, list(drawn.values()), list(drawn))
    return png(figure)


def _head(figure: Figure, title: str, handles: Sequence, names: Sequence[str]) -> None:
    """Put title and legend above the panels, in as many columns as fit, and make the figure higher."""
    for columns in (4, 3, 2, 1):
        legend = figure.legend(
            handles, names, loc="upper left", ncols=columns, fontsize=_WORDS, frameon=False, borderaxespad=0, borderpad=0
        )
        box = legend.get_window_extent()
        if box.width < 0.98 * DPI * _WIDTH or columns == 1:
            break
        legend.remove()
    above = _TITLE + box.height / DPI + 2 * _GAP
    height = figure.get_figheight() + above
    figure.set_figheight(height)
    figure.suptitle(title, x=0.01, y=1 - _GAP / height, ha="left", va="top", fontweight="bold", fontsize=12)
    legend.set_bbox_to_anchor((0.01, 1 - (_TITLE + _GAP) / height), transform=figure.transFigure)
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - above / height))
