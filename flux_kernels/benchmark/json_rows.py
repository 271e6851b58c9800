"""What one run of `flux-kernels bench` measured, as a JSON document for machines."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from .record import ORIGIN
from .session import Found
from .verdict import step_verdict

_WORDS = ("format", "provider", "size", "where", "what", "dtype", "note", "compute")


def document(run: Found, verdict: Sequence[str], pictures: Sequence[Mapping[str, object]] = ()) -> str:
    """Return JSON of a run: rows of calls and steps, ceilings, verdict, and what was not begun in time.

    Numbers are numbers; what was not measured, or is no finite number, is null.
    """
    return json.dumps(
        dict(
            verdict=list(verdict),
            origin=dict(run.origin),
            ceilings=asdict(run.ceilings),
            linears=[_plain(row) for row in run.linears],
            steps=[_plain(row) for row in run.steps],
            steps_in_words=step_verdict(run.steps),
            embedded_fidelity=[_plain(row) for row in pictures],
            not_run=dict(linear_calls=run.calls_late, whole_runs=run.not_run),
            interrupted=False,
        ),
        indent=1,
        allow_nan=False,
    )


def unfinished(linears: Sequence[Mapping[str, object]], steps: Sequence[Mapping[str, object]]) -> str:
    """Return JSON of a run that was stopped: rows with their origin, and no conclusion."""
    rows = dict(linears=[_plain(row) for row in linears], steps=[_plain(row) for row in steps])
    return json.dumps(dict(interrupted=True) | rows, indent=1, allow_nan=False)


def _plain(row: Mapping[str, object]) -> dict[str, object]:
    return {name: value if name in (*_WORDS, *ORIGIN) else _number(value) for name, value in row.items()}


def _number(value: object) -> float | int | None:
    if value in ("", None):
        return None
    number = float(str(value))
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() else number
