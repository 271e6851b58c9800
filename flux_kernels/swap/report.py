"""SwapReport: what swap_linear did with each linear layer, as data, as a table and as JSON."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace

from ..report.amounts import counted, megabytes, size_text
from ..report.text_table import aligned


@dataclass(frozen=True)
class SwapRow:
    """Record one layer.

    Attributes:
        name: of the module.
        action: "swapped" or "skipped".
        detail: how it was swapped, or why it was skipped.
        format: ggml type name of the weight after the call, or its torch dtype where it is not packed.
        shape: (N, K) of the weight.
        bytes: of the weight as it is stored now.
        backend: asked for; "" where skipped.
        compute: asked for; "" where skipped.
        runs: what computes it where it is or may be moved to (see `runs.runs_as`); "" where skipped.
        unmet: type that format= names, where the layer was packed already and kept another; else "".
        was_compute: mode it had, where the call set it back to "exact", the default; else "".
        was_backend: backend it had, where the call set it back to "auto", the default; else "".
        tied: name of a module left as it was that shared the weight, and now holds it alone; else "".
    """

    name: str
    action: str
    detail: str
    format: str
    shape: tuple[int, int]
    bytes: int
    backend: str = ""
    compute: str = ""
    runs: str = ""
    unmet: str = ""
    was_compute: str = ""
    was_backend: str = ""
    tied: str = ""

    @property
    def bytes_16bit(self) -> int:
        """Bytes of the weight in a 16-bit type."""
        return 2 * self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class SwapReport:
    """Hold a row for every linear layer, and the patterns that matched none; `print` shows a table."""

    rows: list[SwapRow] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[SwapRow]:
        return iter(self.rows)

    @property
    def swapped(self) -> list[SwapRow]:
        """Rows of the layers that are packed now."""
        return [row for row in self.rows if row.action == "swapped"]

    @property
    def skipped(self) -> list[SwapRow]:
        """Rows of the layers that were left alone."""
        return [row for row in self.rows if row.action == "skipped"]

    def to_json(self) -> str:
        """Return rows and totals as JSON text; sizes in bytes."""
        rows = [{**asdict(row), "bytes_16bit": row.bytes_16bit} for row in self.rows]
        return json.dumps({"rows": rows, "unmatched": self.unmatched, "totals": self._totals()}, indent=1)

    def _totals(self) -> dict[str, int]:
        return {
            "swapped": len(self.swapped),
            "skipped": len(self.skipped),
            "bytes": sum(row.bytes for row in self.swapped),
            "bytes_16bit": sum(row.bytes_16bit for row in self.swapped),
        }

    def __str__(self) -> str:
        header = ("layers", "count", "format", "shape", "MB", "16-bit MB", "runs as")
        body = [_line(pattern, rows) for pattern, rows in _group(self.rows)]
        totals = self._totals()
        lines = aligned([header, *body], _is_number)
        lines.insert(1, "-" * max(len(line) for line in lines))
        lines.append(
            f"{counted(totals['swapped'], 'layer')} swapped, {size_text(totals['bytes'])} "
            f"({size_text(totals['bytes_16bit'])} in 16 bit); {totals['skipped']} skipped."
        )
        lines += _surprises(self.swapped)
        lines += [f"Pattern {pattern!r} matched no linear layer." for pattern in self.unmatched]
        return "\n".join(lines)


def _surprises(rows: list[SwapRow]) -> list[str]:
    """Say where the call did less, or more, than its caller may think."""
    kept = Counter((row.format, row.unmet) for row in rows if row.unmet)
    modes = Counter((row.was_compute, row.compute, "compute") for row in rows if row.was_compute)
    backends = Counter((row.was_backend, row.backend, "backend") for row in rows if row.was_backend)
    lines = [
        f"{_layers_were(count)} packed already and stayed {has}, format= asked for {asked}: it quantizes plain layers only. Pack the "
        f"16-bit model to get {asked}."
        for (has, asked), count in kept.items()
    ]
    lines += [
        f"{_layers_were(count)} {was} and went back to {now}, the default of {argument}=; {argument}={was!r} keeps them."
        for (was, now, argument), count in (modes + backends).items()
    ]
    lines += [
        f"{row.name} shared its weight with {row.tied}, which stays as it was: the weight is in memory packed and plain now. "
        f'exclude="{row.name}" keeps it shared.'
        for row in rows
        if row.tied
    ]
    return lines


def _layers_were(count: int) -> str:
    return f"{counted(count, 'layer')} {'was' if count == 1 else 'were'}"


def _group(rows: list[SwapRow]) -> list[tuple[str, list[SwapRow]]]:
    """Group rows that differ only in the numbers of their names, in first-seen order."""
    groups: dict[SwapRow, list[SwapRow]] = {}
    for row in rows:
        pattern = re.sub(r"(?<![^.])[0-9]+(?![^.])", "*", row.name)
        key = replace(row, name=pattern, bytes=0, backend="")
        groups.setdefault(key, []).append(row)
    return [(key.name if len(group) > 1 else group[0].name, group) for key, group in groups.items()]


def _line(pattern: str, rows: list[SwapRow]) -> tuple[str, ...]:
    first = rows[0]
    about = [first.detail, *([f"not {first.unmet}"] if first.unmet else [])]
    about += [f"was {was}" for was in (first.was_compute, first.was_backend) if was]
    runs = f"{first.compute}, {first.runs} ({', '.join(about)})" if first.action == "swapped" else f"skipped: {first.detail}"
    return (
        pattern,
        str(len(rows)),
        first.format,
        f"{first.shape[0]} x {first.shape[1]}",
        megabytes(sum(row.bytes for row in rows)),
        megabytes(sum(row.bytes_16bit for row in rows)),
        runs,
    )


def _is_number(_: int, cell: str) -> bool:
    return "0" <= cell[:1] <= "9" and " " not in cell
