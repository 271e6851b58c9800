"""Write rows for others to read: CSV files that get their names when a run is complete."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from ..errors import FormatError
from ..files import check_writable
from .record import append_csv


class RowFiles:
    """Write rows of linear calls to a file, those of whole steps to `<stem>-step.csv`, as they come.

    Both end in ".part" until the run is complete. A run that stops before leaves them, and says so; the next begins them anew.

    Attributes:
        made: the files of a complete run.
    """

    def __init__(self, target: Path | None, tell: Callable[[str], None]) -> None:
        """Take the file to be (None: rows go nowhere), and what says a line to people.

        Raises:
            FormatError: where a file of that name is there, or cannot be written.
        """
        self.tell = tell
        self.files: dict[str, Path] = {}
        self.made: list[Path] = []
        if target is None:
            return
        check_writable(target, "--contribute")
        self.files = dict(linear=target, step=target.with_name(f"{target.stem}-step.csv"))
        for path in self.files.values():
            if path.exists():
                raise FormatError(f"{path} is there already. Name a new file for --contribute.")

    def add(self, kind: str, row: dict) -> None:
        """Write a row of a kind: "linear" or "step"."""
        if self.files:
            append_csv(row, _part(self.files[kind]))

    def __enter__(self) -> Self:
        for path in self.files.values():
            _part(path).unlink(missing_ok=True)
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        written = [path for path in self.files.values() if _part(path).exists()]
        if error is None:
            for path in written:
                os.replace(_part(path), path)
            self.made = written
        elif written:
            self.tell(f"Not complete. What was measured is in {' and '.join(str(_part(path)) for path in written)}.")


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")
