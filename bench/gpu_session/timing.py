"""Time cases against each other: graph replays in turn, without Python's part, and eager calls.

A case that fails becomes a row that says why; the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median

from torch import Tensor

from bench.gpu_session.session import Session, Table, timed
from flux_kernels.machine.clock import balanced_order
from flux_kernels.machine.gpu_clock import GpuClock, Replay
from flux_kernels.machine.tune_compile import one_line

_ROUNDS = 7
_GRAPH_MS = 2.0  # of work in a graph where it takes several calls to fill it
_MOST_CALLS = 76  # in one graph: the modulation layers of a step
_CAPTURE_SECONDS = 0.02  # a case's warm-ups, capture and first replay


@dataclass(frozen=True)
class Case:
    """Name one case to time: key columns, what runs it, and the predicted milliseconds (None: unknown).

    `reference` is the result it has to equal within `tolerance` (relative error), if any.
    """

    key: dict
    call: Callable[[], object]
    predicted_ms: float | None = None
    reference: Tensor | None = None
    tolerance: float = 0.03


def time_groups(session: Session, table: Table, groups: Iterable[Iterable[Case]]) -> None:
    """Time groups of cases until the section's time is up; a group is made when its turn comes."""
    for group in groups:
        if session.late():
            return
        with ExitStack() as graphs:
            _time_cases(session, table, group, graphs)


def _time_cases(session: Session, table: Table, cases: Iterable[Case], graphs: ExitStack) -> None:
    """Time the cases that the table has not, in turn, and write a row for each."""
    clock = GpuClock(session.device)
    ready: list[tuple[Case, Replay, int, float]] = []
    for case in cases:
        if table.has(case.key):
            continue
        try:
            note = _wrong(session, case)
            if note:
                table.add(_row(case, [], None, note))
                continue
            replay, calls, eager = _captured(session, case, clock)
            ready.append((case, graphs.enter_context(replay), calls, eager))
        except Exception as problem:  # noqa: BLE001 - a failure is a result: it becomes the row's note
            table.add(_row(case, [], None, one_line(problem)))
    times: list[list[float]] = [[] for _ in ready]
    for turn in range(_ROUNDS):
        for index in balanced_order(len(ready), turn):
            _, replay, calls, _ = ready[index]
            times[index].append(clock.milliseconds(replay) / calls)
    for (case, _, calls, eager), milliseconds in zip(ready, times, strict=True):
        table.add(_row(case, milliseconds, eager, ""))
        session.expected += _CAPTURE_SECONDS + (_ROUNDS * calls + 5) * (case.predicted_ms or 0.1) / 1e3


def _captured(session: Session, case: Case, clock: GpuClock) -> tuple[Replay, int, float]:
    """Return several calls as a graph, their number, and the median milliseconds of an eager call."""
    case.call()
    eager = median(clock.milliseconds(case.call) for _ in range(3))
    estimate = case.predicted_ms or 0.1 if session.dry else max(eager, 1e-3)
    calls = 1 if session.dry else max(1, min(_MOST_CALLS, round(_GRAPH_MS / estimate)))

    # Results go as they come: a graph that kept them all would fill the card.
    def several() -> None:
        for _ in range(calls):
            case.call()

    return Replay(several, session.device), calls, eager


def _wrong(session: Session, case: Case) -> str:
    if case.reference is None or session.dry:
        return ""
    y, right = case.call().double(), case.reference.double()
    error = ((y - right).norm() / right.norm()).item()
    return "" if error <= case.tolerance else f"wrong result: relative error {error:.2g}"


def _row(case: Case, times: list[float], eager: float | None, note: str) -> dict:
    return case.key | timed(times, case.predicted_ms) | dict(eager_ms="" if eager is None else f"{eager:.5f}", note=note)
