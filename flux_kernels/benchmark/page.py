"""Write the report of `flux-kernels bench`: one HTML page with figures, every row, and its price."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from ..report.amounts import counted
from ..report.html_page import document, image, table
from .names import TORCH
from .plots import memory_against_time, roofline, speed_over_rows, throughput
from .prices import prices
from .providers import PROVIDERS
from .record import CHECKOUT, origin_text, read_csv
from .session import Found
from .verdict import step_verdict

_FIDELITY = CHECKOUT / "bench" / "results" / "embedded_fidelity.csv"
_CAPTIONS = {
    "speed": (
        "Against the unquantized layer",
        (
            "Each mark is one kind of linear call of a FLUX.1-dev step, timed in turn with torch's layer on the same weights in 16 or 32 "
            "bit. A mark on the line is as fast as that layer; a mark at 2 takes half its time."
        ),
    ),
    "throughput": (
        "Operations a second",
        (
            "A layer gets one row for each token. Many rows keep the arithmetic units busy; with one row, reading the weights takes the "
            "time. Bars reach from the 20th to the 80th percentile of the repeats: where they overlap, no difference was seen."
        ),
    ),
    "roofline": (
        "What holds each call back",
        (
            "A call needs arithmetic and must move bytes. The lines are the best that torch's copies and products of several sizes reached "
            "when this run began. A mark above a line is no error: the machine was faster for a while, its caches held what a copy "
            "fetches from memory, or the call computes in fewer bits."
        ),
    ),
    "memory": (
        "Memory and time of whole runs",
        (
            "The layers together, with attention and everything else between them: how much memory the weights take, how much was in use "
            "at once, and how long it took."
        ),
    ),
}
_TITLES = {  # of the columns that tables of rows show
    "format": "type",
    "what": "what",
    "size": "size",
    "provider": "side",
    "where": "call",
    "m": "M",
    "n": "N",
    "k": "K",
    "calls": "calls a step",
    "dtype": "dtype",
    "repeats": "repeats",
    "p20_ms": "p20 ms",
    "p50_ms": "median ms",
    "p80_ms": "p80 ms",
    "graph_ms": "as a graph, ms",
    "tflops": "TFLOP/s",
    "packed_gb_s": "GB/s of weight",
    "share_of_matmul": "of arithmetic limit",
    "share_of_copy": "of memory limit",
    "peak_bytes": "most bytes in use",
    "weight_bytes": "bytes of weights",
    "error": "RMS error",
    "max_error": "largest error",
    "note": "note",
}
_WORDS = ("format", "what", "size", "provider", "where", "dtype", "note")


def figures(run: Found) -> dict[str, bytes]:
    """Draw what the rows allow, as PNG bytes by name.

    Raises:
        ImportError: where matplotlib is missing.
    """
    drawn = {}
    if any(row["provider"] == TORCH and row["p50_ms"] for row in run.linears):
        drawn["speed"] = speed_over_rows(run.linears)
        drawn["throughput"] = throughput(run.linears)
        drawn["roofline"] = roofline(run.linears, run.ceilings)
    if any(row["p50_ms"] and (row["peak_bytes"] or row["weight_bytes"]) for row in run.steps):
        drawn["memory"] = memory_against_time(run.steps)
    return drawn


def fidelity_rows() -> list[dict[str, str]]:
    """Read what types and modes cost in pictures of the embedded model; nothing outside a checkout."""
    return read_csv(_FIDELITY) if _FIDELITY.exists() else []


def page(run: Found, verdict: Sequence[str], pictures: Sequence[Mapping] = ()) -> str:
    """Return the HTML page; figures are inside it.

    Args:
        run: what was measured.
        verdict: plain-text lines, which stand first.
        pictures: rows of `fidelity_rows`.
    """
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in verdict)
    parts = [f"<h1>flux_kernels on {html.escape(run.origin['device'])}</h1>", f'<ul class="key">{lines}</ul>']
    missing = "".join(f"<li>{html.escape(line)}</li>" for line in run.left_out())
    parts.append(f"<h2>Not measured</h2><ul>{missing}</ul>" if missing else "")
    parts.append(prices(run, pictures))
    sentences = "".join(f"<li>{html.escape(line)}</li>" for line in step_verdict(run.steps))
    parts.append(f"<h2>Whole runs</h2><ul>{sentences}</ul>" if sentences else "")
    for name, png in figures(run).items():
        title, caption = _CAPTIONS[name]
        parts.append(f"<h2>{title}</h2><p>{html.escape(caption)}</p>{image(png, title)}")
    origins = list(dict.fromkeys(origin_text(row) for row in (*run.linears, *run.steps) or (run.origin,)))
    parts.append(_every("Every linear call", run.linears, origins))
    parts.append(_every("Every whole run", run.steps, origins))
    parts.append(_sources(run, origins))
    return document(f"flux_kernels on {run.origin['device']}", parts)


def _every(title: str, rows: Sequence[Mapping], origins: Sequence[str]) -> str:
    if not rows:
        return ""
    columns = [name for name in _TITLES if any(name in row for row in rows)]
    lines = [[*(_cell(name, row.get(name)) for name in columns), origins.index(origin_text(row)) + 1] for row in rows]
    numbers = [_TITLES[name] for name in columns if name not in _WORDS]
    shown = table([*map(_TITLES.__getitem__, columns), "origin"], lines, [*numbers, "origin"])
    return f"<details><summary>{title} ({counted(len(rows), 'row')})</summary>{shown}</details>"


def _cell(column: str, value: object) -> object:
    if value in ("", None):
        return ""
    if column.startswith("share_"):
        return f"{float(str(value)):.1%}"
    return f"{int(str(value)):,}" if column.endswith("_bytes") else value


def _sources(run: Found, origins: Sequence[str]) -> str:
    """Name the origins that rows refer to, the limits, and whose documentation each call follows."""
    ceilings = run.ceilings
    lines = [f"Origin {number}: {text}." for number, text in enumerate(origins, 1)]
    lines.append(
        f"Limits, the best of several runs and sizes: a copy moves {ceilings.copy_gb_s:.4g} GB/s (read plus written), torch's product does "
        f"{ceilings.matmul_tflops:.4g} TFLOP/s in {ceilings.dtype}."
    )
    for side in dict.fromkeys(row["provider"] for row in run.linears):
        if PROVIDERS[side].source:
            lines.append(f"{side} is called as in {PROVIDERS[side].source.removeprefix('https://')}.")
    return "".join(f'<p class="faint">{html.escape(line)}</p>' for line in lines)
