"""What every section is given: where rows go, operands of a call, and what is known of the card."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from bench.aot.model import Model
from bench.gpu_session.predict import rates_of
from bench.record import append_csv, origin, read_csv
from flux_kernels.formats import FORMATS, Packed
from flux_kernels.machine.random_rows import random_weight

# Of weights that take turns, so that each comes from memory: beyond twice the largest L2 of a Hopper
_COLD_BYTES = 160 << 20
_MOST_COPIES = 32


@dataclass
class Session:
    """Hold a section's surroundings.

    Attributes:
        out: folder of the rows.
        dry: whether a stand-in driver runs it: operands are then left as memory was.
        end: `time.monotonic()` after which nothing new is begun.
        device: what everything runs on.
        expected: seconds that the GPU is expected to be busy, summed up as cases are timed.
        reduced: whether a dry run is to be short: one type, few calls.
        tables: those opened so far.
    """

    out: Path
    dry: bool
    end: float
    device: torch.device = field(default_factory=lambda: torch.device("cuda"))
    expected: float = 0.0
    reduced: bool = False
    tables: dict[str, Table] = field(default_factory=dict)

    @property
    def rates(self) -> Model:
        """Return what predictions assume of this card."""
        return rates_of(torch.cuda.get_device_name())

    @property
    def carried(self) -> bool:
        """Tell whether kernels were compiled ahead."""
        return bool(os.environ.get("TRITON_KERNELS_CARRIED"))

    def late(self) -> bool:
        """Tell whether nothing new should be begun."""
        return time.monotonic() > self.end

    def table(self, name: str, key: Iterable[str]) -> Table:
        """Open the table of a name, with the rows that an earlier call wrote."""
        if name not in self.tables:
            self.tables[name] = Table(self.out / f"{name}.csv", tuple(key), self.origin())
        return self.tables[name]

    def origin(self) -> dict[str, str]:
        """Return the origin columns, asked for once in a session."""
        path = self.out / "origin.json"
        if not path.exists():
            path.write_text(json.dumps(origin(self.device)))
        return json.loads(path.read_text())

    def activations(self, m: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Make x [M, K]."""
        if self.dry:
            return torch.empty(m, k, dtype=dtype, device=self.device)
        return torch.randn(m, k, device=self.device).to(dtype)

    def bias(self, n: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Make a bias [N]."""
        return torch.zeros(n, dtype=dtype, device=self.device)

    def weights(self, format: str, n: int, k: int) -> list[Packed]:
        """Make packed rows for Triton, in as many copies as it takes to find them in memory, not in L2."""
        fmt = FORMATS[format]
        if self.dry:
            return [Packed(torch.empty(n, fmt.row_bytes(k), dtype=torch.uint8, device=self.device), fmt, fmt.planes)]
        weight = random_weight(fmt, n, k, device=self.device)
        copies = min(_MOST_COPIES, ceil(_COLD_BYTES / weight.data.nbytes))
        return [weight, *(weight._replace(data=weight.data.clone()) for _ in range(copies - 1))]


class Table:
    """Append rows to a CSV file; know which are there."""

    def __init__(self, path: Path, key: tuple[str, ...], made_at: dict[str, str]):
        self.path, self.key, self.made_at = path, key, made_at
        self.done = {self._key(row) for row in read_csv(path)} if path.exists() else set()

    def _key(self, row: dict) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in self.key)

    def has(self, row: dict) -> bool:
        """Tell whether a row of this key was measured before."""
        return self._key(row) in self.done

    def add(self, row: dict) -> None:
        """Write a row and show it."""
        append_csv(row | self.made_at, self.path)
        self.done.add(self._key(row))
        print(" ".join(f"{value}" for value in row.values() if value != ""), flush=True)


def timed(times: Sequence[float], predicted: float | None, digits: int = 5) -> dict[str, str]:
    """Return the columns of some runs' milliseconds and their prediction, "" for what is not known."""
    p50 = median(times) if times else None
    columns = dict(p50_ms=p50, least_ms=min(times, default=None), predicted_ms=predicted)
    texts = {name: "" if value is None else f"{value:.{digits}f}" for name, value in columns.items()}
    return texts | dict(measured_over_predicted=f"{p50 / predicted:.2f}" if p50 is not None and predicted else "")
