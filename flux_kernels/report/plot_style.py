"""What the figures of all reports share: colours, one panel without a frame, the bytes of a PNG. Needs matplotlib."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT = "#222222", "#8a8a8a"
RED, ORANGE, BLUE, GREEN = "#c2255c", "#e8890c", "#2f6db3", "#2b8a3e"
DPI = 150  # dots an inch


def panel(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure of one panel, with nothing drawn above it and at its right.

    Args:
        width: in inches.
        height: in inches.

    Raises:
        ImportError: where matplotlib is missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def png(figure: Figure) -> bytes:
    """Return a figure as the bytes of a PNG file, the same bytes for the same figure."""
    held = BytesIO()
    figure.savefig(held, format="png", facecolor="white", metadata={"Software": None})
    return held.getvalue()
