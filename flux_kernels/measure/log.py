"""The log of a measurement: one JSON line a result, so that nothing is measured twice.

Every process of a measurement has a log of its own, `<costs>.rank<r>.jsonl`, and reads those of all. The first line says
what is measured; a log of something else is refused. A last line that was cut off half-way does not count.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from ..errors import FormatError
from ..mixed.cost import CostRow
from ..mixed.option import Option

SCHEMA = "flux_kernels.measure_log/1"
Rows = dict[tuple[str, Option], CostRow]
"""(tensor, option) -> its cost."""


def log_path(table: Path, rank: int) -> Path:
    """Return the path of a process's log."""
    return table.with_name(f"{table.name}.rank{rank}.jsonl")


def log_paths(table: Path) -> list[Path]:
    """Return the logs of a table, of all processes."""
    prefix, suffix = f"{table.name}.rank", ".jsonl"
    names = [path for path in table.parent.glob("*.jsonl") if path.name.startswith(prefix)]
    return sorted(path for path in names if path.name[len(prefix) : -len(suffix)].isdigit())


class MeasureLog:
    """Append results to the log of one process, each on the disk before the next begins; read all logs.

    Args:
        table: path of the cost table.
        rank: of this process.
        identity: what is measured, as the first line of every log says it: hashes of model and states, importance, dtype.

    Attributes:
        measured: what the logs held at the beginning.

    Raises:
        FormatError: where a log was begun with something else, or has a damaged line before its last; also from `read`.
    """

    def __init__(self, table: Path, rank: int, identity: Mapping[str, str]):
        self._table, self._identity = table, identity
        # All logs are checked before this one is begun.
        self.measured = self.read()
        path = log_path(table, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = _whole_lines(path) if path.exists() else []
        self._file = path.open("ab")
        # What was cut off half-way goes.
        self._file.truncate(sum(len(line) + 1 for line in whole))
        if not whole:
            self._write({"schema": SCHEMA, **identity})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self) -> Rows:
        """Return all results in the logs of the table."""
        rows: Rows = {}
        for path in log_paths(self._table):
            lines = _whole_lines(path)
            if lines:
                _check_identity(path, lines[0], self._identity)
            for number, line in enumerate(lines[1:], start=2):
                row = _row(line, f"{path}, line {number}")
                rows[row.tensor, row.option] = row
        return rows

    def append(self, row: CostRow) -> None:
        """Write one result."""
        self._write(row.record())

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _whole_lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1]


def _check_identity(path: Path, line: bytes, identity: Mapping[str, str]) -> None:
    try:
        written = json.loads(line)
    except ValueError:
        written = {}
    if not isinstance(written, dict) or written.get("schema") != SCHEMA:
        raise FormatError(f"{path} is no log of this version of `measure`. Remove it, or choose another --out.")
    different = [name for name, value in identity.items() if written.get(name) != value]
    if different:
        name = different[0]
        raise FormatError(
            f"{path} was begun with another {name.replace('_', ' ')} ({_short(written.get(name))}, now {_short(identity[name])}). "
            "Results of both do not compare: remove the log to measure anew, or choose another --out."
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."


def _row(line: bytes, where: str) -> CostRow:
    try:
        return CostRow.of_record(json.loads(line))
    except (ValueError, TypeError, KeyError) as error:
        raise FormatError(f"{where} is damaged ({error}). Remove the line, and it is measured anew.") from None
