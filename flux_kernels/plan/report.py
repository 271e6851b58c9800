"""The report on a plan: one HTML page that needs no network, and its figures as PNG files."""

from __future__ import annotations

import html
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

from ..files import write_whole
from ..mixed.file_layout import KEY_VALUE_BYTES
from ..report.amounts import size_text
from ..report.html_page import document, image, table
from ..report.plot_style import png
from .budget import ROOM
from .report_data import ReportData
from .report_plots import all_plots

_CAPTIONS = {
    "curve": (
        "Size and error",
        (
            "A quantized file stores each weight matrix in a type with fewer bits. Blue dots give every matrix the same type. The "
            "red line gives each matrix its own, chosen so that the error is least for the size; the star is this plan. The dashed "
            "line chooses one type for each whole block, as earlier tools did. Errors here are added up from single measurements; "
            "green marks, where there are any, were measured with everything quantized at once."
        ),
    ),
    "heat_map": (
        "Which matrix minds which type",
        (
            "Each row is a weight matrix, each column a type with its bits per weight, coarse on the left. Dark means that the "
            "picture hardly changes. Red marks the plan's choice. Sensitive rows are light far to the right, and are given more bits."
        ),
    ),
    "bytes": (
        "Where the bytes go",
        "The matrices inside the blocks are chosen by the plan; everything outside keeps its type.",
    ),
}


def write_report(data: ReportData, path: Path) -> list[Path]:
    """Write the page `path` and its figures as `<stem>-<figure>.png` next to it; return all paths.

    Each file appears under its name only when it is complete.

    Raises:
        ImportError: where matplotlib is missing.
        OSError: where a file cannot be written.
    """
    figures = {name: png(figure) for name, figure in all_plots(data).items()}
    written = []
    for name, figure in figures.items():
        target = path.with_name(f"{path.stem}-{name}.png")
        write_whole(target, figure)
        written.append(target)
    write_whole(path, page(data, figures).encode())
    return [path, *written]


def page(data: ReportData, figures: Mapping[str, bytes]) -> str:
    """Return the HTML page; images are inside it."""
    parts = [_heading(data), _measured_table(data)]
    for name, figure in figures.items():
        title, caption = _CAPTIONS[name]
        parts.append(f"<h2>{title}</h2><p>{caption}</p>{image(figure, title)}")
    if data.pictures is not None:
        held = BytesIO()
        data.pictures.save(held, "PNG")
        parts.append(f"<h2>Pictures side by side</h2>{image(held.getvalue(), 'Pictures drawn with each file')}")
    parts.append(_details(data))
    return document(_name(data), parts)


def _name(data: ReportData) -> str:
    return str(data.plan.options.get("file_name") or "Plan of a mixed file")


def _heading(data: ReportData) -> str:
    plan = data.plan
    bits = data.layout.bits_per_weight(data.options)
    left = f", {data.budget - plan.bytes:,} bytes under what was asked for" if data.budget else ""
    return (
        f'<h1>{html.escape(_name(data))}</h1><p class="key"><b>{size_text(plan.bytes, 3)}</b> ({plan.bytes:,} bytes{left}), '
        f"<b>{bits:.2f} bits per weight</b>.</p><p>{_compared(data)}</p>"
    )


def _compared(data: ReportData) -> str:
    """Compare the plan with uniform files and the greedy baseline, in words."""
    cost = data.plan.cost
    # What another file could have taken.
    room = max(data.plan.bytes, data.budget - KEY_VALUE_BYTES)
    sentences = [f"Predicted error {cost:.4g}"]
    fitting = [(option, value) for option, size, value in data.uniform if size <= room and value > 0]
    if fitting and cost > 0:
        option, value = min(fitting, key=lambda file: file[1])
        sentences.append(
            f"{(1 - cost / value):.0%} less than {option} for everything, the best uniform file within the same size"
        )
    baseline = [value for size, value in data.greedy if size <= room]
    if baseline and min(baseline) > 0:
        sentences.append(f"{(1 - cost / min(baseline)):.0%} less than the greedy choice of whole blocks")
    if data.plan.joint_cost is not None:
        sentences.append(f"measured as a whole: {data.plan.joint_cost:.4g}")
    return html.escape("; ".join(sentences)) + "."


def _measured_table(data: ReportData) -> str:
    if not data.joint:
        return (
            '<p class="faint">Nothing was measured as a whole yet: errors of single matrices do not simply add up. '
            "<code>flux-kernels measure --plan</code> measures a plan.</p>"
        )
    heads = ("file", "bytes", "error", "95 % interval")
    rows = (
        (measured.label, f"{measured.bytes:,}", f"{measured.cost:.4g}", _interval(measured.low, measured.high))
        for measured in sorted(data.joint, key=lambda measured: (measured.bytes, measured.cost))
    )
    return f"<h2>Measured as a whole</h2>{table(heads, rows, heads[1:])}"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.4g} to {high:.4g}"


def _details(data: ReportData) -> str:
    """List every tensor's type, and how the plan was made."""
    rows = ((name, data.options[name], f"{data.layout.option_bytes(name, data.options[name]):,}") for name in data.costs)
    facts = {**data.plan.options, "costs sha256": data.plan.costs_sha256, **data.plan.versions, "date": data.plan.date}
    counted = f'<p class="faint">What --fits counts: {html.escape(ROOM)}.</p>' if data.plan.options.get("fits") else ""
    origin = "; ".join(f"{key} {value}" for key, value in facts.items() if value not in ("", None))
    return (
        f"<details><summary>Type of every chosen tensor</summary>{table(('tensor', 'type', 'bytes'), rows, ('bytes',))}</details>"
        f'<p class="faint">{html.escape(origin)}</p>{counted}'
    )
