"""Sum up a session in few characters: measured and predicted, the largest misses first."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from bench.gpu_session.kernels import load
from bench.gpu_session.sections import SECTIONS, Section
from bench.record import read_csv
from flux_kernels.benchmark.record import ORIGIN

MOST_CHARACTERS = 11_500
_HIDDEN = {"least_ms", "note", "error", "gate", *ORIGIN}
_ROWS = {  # table -> most rows, in the order in which they are cut
    "step": 16,
    "tuning": 12,
    "ceilings": 12,
    "int8": 14,
    "small_m": 10,
    "geforce": 14,
    "sweep": 16,
    "two_stage": 12,
    "host": 9,
    "rates": 18,
}
_TESTS_SHOWN, _TOTALS_SHOWN = 20, 40
_COMPILE_SECONDS = 0.9  # of a kernel on one core, the mean of 60 for sm_90
_PROCESSES = 16
_START_SECONDS = 3.0  # of a section's process: CUDA, cuBLAS


def write(out: Path, path: Path, ended: dict[str, str]) -> str:
    """Write the summary and return it: outcomes, then each table's rows, as many as fit."""
    parts = [" ".join(f"{name}={outcome}" for name, outcome in ended.items())]
    parts += _failed_tests(out)
    parts += _totals(out)
    for name, most in _ROWS.items():
        file = out / f"{name}.csv"
        if file.exists():
            parts.append(table(name, read_csv(file), most))
    text = "\n".join(parts)
    path.write_text(text)
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 40] + "\n... the rest is in summary.txt"


def _failed_tests(out: Path) -> list[str]:
    """Return the names of the tests that failed, as the correctness section's log has them."""
    logs = sorted(out.glob("correctness*.log"))
    lines = [line for log in logs for line in log.read_text(errors="replace").splitlines()]
    failed = dict.fromkeys(words[-1] for line in lines if "FAILED" in line and (words := line.split()))
    shown = list(failed)[:_TESTS_SHOWN]
    return [f"## {len(failed)} tests failed", *(f"! {name[-110:]}" for name in shown)] if failed else []


def _totals(out: Path) -> list[str]:
    """Return what the sections that time a step's linears printed of a whole step."""
    logs = [out / f"{name}.log" for name in ("linears", "peers", "other_linears")]
    lines = [line for log in logs if log.exists() for line in log.read_text(errors="replace").splitlines()]
    return list(dict.fromkeys(" ".join(line.split()) for line in lines if " ms a step" in line))[-_TOTALS_SHOWN:]


def table(name: str, rows: list[dict], most: int) -> str:
    """Return a table's rows in lines, the farthest from prediction first; rows without a time are counted."""
    timed = [row for row in rows if row.get("p50_ms")]
    failed = [row for row in rows if not row.get("p50_ms")]
    timed.sort(key=lambda row: -_miss(row))
    shown = [column for column in (rows[0] if rows else ()) if column not in _HIDDEN]
    lines = [f"## {name}: {len(timed)} timed, {len(failed)} not; of {' '.join(shown)}"]
    lines += [" ".join(row[column] or "-" for column in shown) for row in timed[:most]]
    lines += [f"! {row.get('note', '')[:110]}" for row in failed[:3]]
    return "\n".join(lines)


def _miss(row: dict) -> float:
    ratio = float(row.get("measured_over_predicted") or 1.0)
    return max(ratio, 1 / ratio) if ratio > 0 else 0.0


@dataclass(frozen=True)
class Expected:
    """Hold what a dry run tells of a section: kernels, GPU and host seconds, limit, and an H200's."""

    name: str
    kernels: int
    gpu: float
    host: float
    limit: float
    took: float | None

    @classmethod
    def read(cls, out: Path, section: Section) -> Expected:
        """Read what the section's process left; nothing where it failed."""
        facts, kernels = out / "facts" / f"{section.name}.json", out / "kernels" / f"{section.name}.pickle"
        measured = json.loads(facts.read_text()) if facts.exists() else dict(expected=0.0, seconds=0.0)
        count = len({kernel.folder for kernel in load(kernels)}) if kernels.exists() else 0
        return cls(section.name, count, measured["expected"], measured["seconds"], section.seconds, section.took)

    @property
    def seconds(self) -> float:
        """Return what the section takes where its kernels are carried."""
        return _START_SECONDS + self.gpu + self.host


def expectations(rows: list[Expected]) -> str:
    """Return the dry run's table; "compile" is what is saved by carrying the kernels, on 16 cores."""
    lines = [
        f"{'section':14} {'kernels':>7} {'compile s':>9} {'GPU s':>7} {'host s':>7} {'in all':>7} {'limit':>6} {'H200 s':>7}"
    ]
    for row in rows:
        compile_seconds = row.kernels * _COMPILE_SECONDS / _PROCESSES
        late = "  over its limit" if row.seconds > row.limit else ""
        took = "" if row.took is None else f"{row.took:.0f}"
        times = f"{compile_seconds:9.1f} {row.gpu:7.1f} {row.host:7.1f} {row.seconds:7.1f} {row.limit:6.0f} {took:>7}"
        lines.append(f"{row.name:14} {row.kernels:7} {times}{late}")
    total = sum(row.seconds for row in rows)
    lines.append(f"in all {sum(row.kernels for row in rows)} kernels, {total:.0f} s; {len(SECTIONS)} sections")
    return "\n".join(lines)
