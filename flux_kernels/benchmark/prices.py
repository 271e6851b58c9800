"""Write the table of `bench`'s page that shows a type's and mode's speed with its price in accuracy."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from ..report.html_page import table
from .names import EMBEDDED_STEP, OURS, STEP, TORCH, label
from .record import origin_text
from .session import Found
from .totals import MARKS, TWINS, Total, by_step, marked, totals

_HEADS = ("type", "step", "side", "speed, torch = 1", "RMS error", "largest error", "error of a step", "PSNR dB", "SSIM")
_NUMBERS = _HEADS[3:]
_SCALED = " \u201cM and N / ...\u201d: rows and outputs of each call divided by that, for machines without a GPU."
_ERRORS = (
    " Errors are against float64 on the same packed weights, divided by the RMS of the right output: the worst of all calls. Other "
    "libraries pack the weights anew, so theirs has that loss in it; the error of a step is that of its output."
)


def prices(run: Found, pictures: Sequence[Mapping]) -> str:
    """Return the table as HTML, "" where no type was timed in every call.

    Args:
        run: what was measured.
        pictures: rows of `page.fidelity_rows`.
    """
    whole = [row for size in dict.fromkeys(row["size"] for row in run.linears) for row in run.whole(size)]
    lines: list[tuple[str, ...]] = [
        line for (size, name), rows in by_step(whole).items() for line in _lines(size, name, rows, run, pictures)
    ]
    if not lines:
        return ""
    heads: tuple[str, ...] = _HEADS
    sizes = list(dict.fromkeys(size for _, size, *_ in lines))
    text = html.escape(_words(sizes, [line[3] for line in lines], run, pictures))
    # The words say it already.
    if len(sizes) == 1:
        heads, lines = (heads[0], *heads[2:]), [(name, *rest) for name, _, *rest in lines]
    return f"<h2>Speed and its price</h2><p>{text}</p>{table(heads, lines, _NUMBERS)}"


def _lines(size: str, name: str, rows: Sequence[Mapping], run: Found, pictures: Sequence[Mapping]) -> list[tuple]:
    """Return a line for each side of one type."""
    seen = {OURS + row["compute"]: row for row in pictures if row["format"] == name}
    runs = [row for row in run.steps if row["format"] == name]
    steps = {row["provider"]: row for row in runs if row["what"] == EMBEDDED_STEP}
    steps |= {row["provider"]: row for row in runs if (row["what"], row["size"]) == (STEP, size)}
    sums, lines = totals(rows), []
    for side in dict.fromkeys(row["provider"] for row in rows):
        side_rows = [row for row in rows if row["provider"] == side]
        errors = (_largest(side_rows, "error"), _largest(side_rows, "max_error"), steps.get(side, {}).get("error", ""))
        scores = seen.get(side, {})
        lines.append(
            (name, size, label(side), _speed(sums, side, side_rows), *errors, scores.get("psnr_db", ""), scores.get("ssim", ""))
        )
    return lines


def _words(sizes: Sequence[str], speeds: Sequence[str], run: Found, pictures: Sequence[Mapping]) -> str:
    marks = "".join(f" {sign}: {words}." for sign, words in MARKS.items() if any(speed.startswith(sign) for speed in speeds))
    scaled = _SCALED if any(" / " in size for size in sizes) else ""
    pictures_text = ""
    if pictures:
        pictures_text = (
            f" PSNR and SSIM are of the tiny embedded model's pictures against its own in 16 bit ({pictures[0]['seeds']} a cell, "
            f"{origin_text(pictures[0])}), not of FLUX.1 and not of this run."
        )
    twins = "" if run.origin["capability"] else f" {TWINS}"
    return f"Speed is that of all linear calls of one step together ({'; '.join(sizes)}).{scaled}{marks}{_ERRORS}{pictures_text}{twins}"


def _speed(sums: Mapping[str, Total], side: str, rows: Sequence[Mapping]) -> str:
    if {side, TORCH} <= sums.keys():
        return marked(sums[side], sums[TORCH])
    return next((row["note"] for row in rows if row["note"] and not row["p50_ms"]), "not measured")


def _largest(rows: Sequence[Mapping], column: str) -> str:
    values = [float(row[column]) for row in rows if row[column] not in ("", None)]
    return f"{max(values):.2g}" if values and all(map(math.isfinite, values)) else ""
