"""Compile many launches in several processes, and keep the record of their rows up to date."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import triton

from bench.record import AOT, read_csv, write_csv
from flux_kernels.machine.tune_compile import one_line

from .cards import CARDS
from .launches import ROWS, Launch, launches
from .report import KEY, key, launch_key, row_of

_SAVED_EVERY = 30  # seconds


@dataclass(frozen=True)
class Item:
    """Name one launch on one card for another process: its place among those of `rows` there."""

    capability: int
    rows: tuple[int, ...]
    place: int

    @property
    def launch(self) -> Launch:
        """Return the launch itself."""
        return launches(self.capability, self.rows)[self.place]

    def key(self, version: str = triton.__version__) -> tuple[str, ...]:
        """Return the key of its row under one Triton."""
        return launch_key(self.launch, self.capability, version)


def items(capabilities: Iterable[int] = CARDS, rows: tuple[int, ...] = ROWS) -> list[Item]:
    """List the launches of calls of `rows` rows on some cards."""
    return [Item(capability, rows, place) for capability in capabilities for place in range(len(launches(capability, rows)))]


def read_record(path: Path = AOT) -> dict[tuple, dict]:
    """Return the recorded rows by key; none where the file is missing, or lacks a column."""
    rows = read_csv(path) if path.exists() else []
    return {key(row): row for row in rows} if rows and "code" in rows[0] else {}


def lacking(wanted: list[Item], record: dict[tuple, dict], version: str = triton.__version__) -> list[Item]:
    """Return the launches whose row the record lacks, or has from another state of the kernel's source."""
    return [item for item in wanted if record.get(item.key(version), {}).get("code") != item.launch.code]


def compiled(wanted: list[Item], jobs: int) -> Iterator[dict | str]:
    """Yield the row of each launch as soon as it is compiled, or a sentence why it could not be."""
    with ProcessPoolExecutor(jobs) as pool:
        pending = [pool.submit(_one, item) for item in wanted]
        try:
            yield from (done.result() for done in as_completed(pending))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _one(item: Item) -> dict | str:
    try:
        return row_of(item.launch, item.capability)
    except Exception as error:  # noqa: BLE001  (whatever a compiler raises is a result: it is reported, the others go on)
        return f"{' '.join(item.key())}: {one_line(error)}"


def _numbers_by_value(row_key: tuple[str, ...]) -> tuple:
    return tuple(int(part) if name in ("capability", "k") else part for name, part in zip(KEY, row_key, strict=True))


class Recorder:
    """Add rows to a record as they come, saved every half a minute and at the end."""

    def __init__(self, path: Path):
        self.path, self.rows, self.saved = path, read_record(path), time.monotonic()

    def add(self, row: dict) -> None:
        """Put a row in place of the recorded row of its key."""
        self.rows[key(row)] = row
        if time.monotonic() - self.saved > _SAVED_EVERY:
            self.save()

    def drop_unlaunched(self, version: str = triton.__version__) -> int:
        """Drop the rows of one Triton that the library no longer launches; return how many."""
        launched = {item.key(version) for item in items()}
        gone = [row_key for row_key, row in self.rows.items() if row["triton"] == version and row_key not in launched]
        for row_key in gone:
            del self.rows[row_key]
        return len(gone)

    def save(self) -> None:
        """Write the file, in an order that does not depend on when rows came."""
        if self.rows:
            write_csv([self.rows[row_key] for row_key in sorted(self.rows, key=_numbers_by_value)], self.path)
        self.saved = time.monotonic()
