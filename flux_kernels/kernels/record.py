"""Tuning records: algorithm and tile measured per call on a card, as JSON files that outlive versions.

A record is one file per card, written by `flux-kernels tune`. Records come from the user's folder (`records_folder`) and
from flux_kernels/kernels/records/, measured on the maintainers' and contributors' cards. GPU time is rare, so a row that was
measured with another Triton or an older kernel is still used, with one warning.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from functools import cache, lru_cache
from math import log2
from pathlib import Path

import torch

from .._triton import TRITON_VERSION
from ..compute import capability_of, dtype_name
from ..files import write_whole
from ..formats import FORMATS, BlockFormat
from .modes import MODES
from .problem import Choice
from .tiles import Tile

SCHEMA = "flux_kernels.tuning/2"
# Schemas that can be read. Rows of the first say nothing of branch and rows, and have neither.
_READ = ("flux_kernels.tuning/1", SCHEMA)
FOLDER_VARIABLE = "FLUX_KERNELS_TUNING"
# A row serves calls whose M is within this many powers of two of its own.
NEAR = 0.5
_PACKAGED = Path(__file__).with_name("records")
_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class TuningRow:
    """Record the best choice for one call, with the median times of it and of the default (milliseconds).

    Attributes:
        dtype: of the activations.
        branch: whether a low-rank branch was added in the epilogue.
        rows: of the weight that were unpacked at a time, None for all; algorithms that decode in registers ignore it.
    """

    compute: str
    format: str
    m: int
    n: int
    k: int
    algorithm: str
    tile: Tile | None
    ms: float
    default_ms: float
    triton: str
    kernel_hash: str
    dtype: str = "bfloat16"
    branch: bool = False
    rows: int | None = None

    @property
    def key(self) -> tuple[str, str, int, int, int, str, bool]:
        """What the row was measured for: compute mode, format, M, N, K, dtype of x, and whether with a branch."""
        return self.compute, self.format, self.m, self.n, self.k, self.dtype, self.branch


@dataclass
class TuningRecord:
    """Hold the rows of one card.

    Attributes:
        device: {"name": str, "capability": [major, minor], ...} of the card.
        versions: of torch, the driver and this package when rows were last written.
        date: ISO date of the last row.
        rows: by key.
    """

    device: dict
    versions: dict = field(default_factory=dict)
    date: str = ""
    rows: dict[tuple, TuningRow] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the record; it appears under its name only when it is complete."""
        head = dict(schema=SCHEMA, device=self.device, versions=self.versions, date=self.date)
        text = json.dumps(head | dict(rows=[asdict(row) for row in self.rows.values()]), indent=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, f"{text}\n".encode())

    @classmethod
    def load(cls, path: Path) -> TuningRecord:
        """Read a record; raise ValueError with a sentence where it is none."""
        try:
            data = json.loads(path.read_text())
            if data["schema"] not in _READ:
                raise ValueError(f"its schema is {data['schema']!r}, this version reads {' and '.join(map(repr, _READ))}")
            rows = [_row(row) for row in data["rows"]]
            device = dict(data["device"]) | dict(name=str(data["device"]["name"]))
            return cls(device, data["versions"], data["date"], {row.key: row for row in rows})
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"{type(error).__name__}: {error}" if isinstance(error, (KeyError, TypeError)) else error
            raise ValueError(f"{path} is not a tuning record: {what}. Delete it, or write it anew with `flux-kernels tune`.")


_SINCE_2 = dict(branch=False, rows=None)  # what rows of the first schema do not say


def _row(data: dict) -> TuningRow:
    """Check one row of a file, so that nothing in it can make a launch fail."""
    tile, data = None if data["tile"] is None else Tile(**data["tile"]), _SINCE_2 | data
    row = TuningRow(**{name.name: data[name.name] for name in fields(TuningRow) if name.name != "tile"}, tile=tile)
    if row.format not in FORMATS or row.compute not in MODES:
        raise ValueError(f"unknown format or compute mode {row.format!r}, {row.compute!r}")
    mode = MODES[row.compute]
    if row.algorithm not in mode.algorithms or row.dtype not in _DTYPES:
        raise ValueError(f"unknown algorithm or dtype {row.algorithm!r}, {row.dtype!r}")
    if not _positive(row.m, row.n, row.k, *([] if row.rows is None else [row.rows])):
        raise ValueError(f"M, N, K and rows must be positive integers, got {row.m!r}, {row.n!r}, {row.k!r}, {row.rows!r}")
    if row.branch not in (True, False):
        raise ValueError(f"branch must be true or false, got {row.branch!r}")
    if tile is None:
        if row.algorithm not in mode.without_tile:
            raise ValueError(f"{row.algorithm!r} of {row.compute!r} needs a tile")
        return row
    fmt = FORMATS[row.format]
    sizes = (tile.block_m, tile.block_n, tile.tile_k, tile.num_warps, tile.num_stages, tile.splits)
    if not _positive(*sizes):
        raise ValueError(f"tile sizes must be positive integers, got {sizes}")
    if mode.steps_through_blocks and (row.k % (tile.tile_k * tile.splits) or tile.tile_k % fmt.block_size):
        raise ValueError(f"a tile with K step {tile.tile_k} in {tile.splits} parts does not fit K={row.k} of {row.format}")
    return row


def _positive(*sizes: object) -> bool:
    return all(type(size) is int and size > 0 for size in sizes)


def records_folder() -> Path:
    """Return the user's folder: $FLUX_KERNELS_TUNING, or flux_kernels/tuning in the user's cache folder."""
    if os.environ.get(FOLDER_VARIABLE):
        return Path(os.environ[FOLDER_VARIABLE])
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_home) / "flux_kernels" / "tuning"


def record_path(name: str) -> Path:
    """Return where the record of the card `name` belongs in the user's folder."""
    return records_folder() / (_plain_name(name) + ".json")


def _plain_name(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")


@cache
def kernel_hash(compute: str, fmt: BlockFormat) -> str:
    """Return a hash of the kernels of a mode and of the format's decoder.

    Comments and docstrings do not count.
    """
    folder = Path(__file__).parent
    files = [folder / f"{name}.py" for name in MODES[compute].sources]
    files += [
        Path(inspect.getfile(fmt.decode)),
        *(folder.parent / "formats" / name for name in ("_tiles.py", "_code_tiles.py")),
    ]
    return hashlib.sha256("\n".join(map(_code, files)).encode()).hexdigest()[:12]


@cache
def _code(path: Path) -> str:
    """Return the source of a module without comments and docstrings.

    A measurement outlives a better sentence.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


@lru_cache(maxsize=1)
def _known() -> list[TuningRecord]:
    """Load every record, the user's first; a file that cannot be read is left out with a warning."""
    paths = [path for folder in (records_folder(), _PACKAGED) if folder.is_dir() for path in sorted(folder.glob("*.json"))]
    records = []
    for path in paths:
        try:
            records.append(TuningRecord.load(path))
        except ValueError as error:
            warnings.warn(str(error), stacklevel=2)
    return records


@lru_cache(maxsize=4096)
def _rows_for(device: torch.device) -> tuple[tuple[TuningRecord, str], ...]:
    """List the records for a device, the best first.

    Those of this very card come first, then those of cards of the same capability.
    """
    if device.type != "cuda":
        return ()
    name, capability = torch.cuda.get_device_name(device), capability_of(device)
    return tuple(order_records(_known(), name, capability))


def order_records(
    records: Iterable[TuningRecord], name: str, capability: tuple[int, int] | None
) -> list[tuple[TuningRecord, str]]:
    """Order the records that serve a card, each with a phrase that tells whose measurement it is."""
    records = list(records)
    own = [(record, f"measured on this card type, {record.date}") for record in records if record.device["name"] == name]
    kin = [
        (record, f"measured on {record.device['name']}, {record.date}")
        for record in records
        if record.device["name"] != name and capability and tuple(record.device.get("capability") or ()) == capability
    ]
    return own + kin


@lru_cache(maxsize=4096)
def find(
    compute: str,
    fmt: BlockFormat,
    m: int,
    n: int,
    k: int,
    device: torch.device,
    dtype: torch.dtype,
    branch: bool = False,
) -> Choice | None:
    """Return the measured choice for a call on `device`, None where there is none.

    The row of nearest M, at most NEAR away.

    bfloat16 and float16 serve each other where a card has no row of its own: their tiles take the same memory and time.
    """
    for record, origin in _rows_for(device):
        for name in _served_by(dtype):
            row = nearest(record, compute, fmt.name, m, n, k, name, branch)
            if row is not None:
                _warn_if_old(row, fmt, record.device["name"])
                why = f"{origin}: {row.ms:.3f} ms, default {row.default_ms:.3f} ms at M={row.m}"
                return Choice(row.algorithm, row.tile, why, row.rows)
    return None


def nearest(
    record: TuningRecord, compute: str, format: str, m: int, n: int, k: int, dtype: str = "bfloat16", branch: bool = False
) -> TuningRow | None:
    """Return the row whose M is nearest on a logarithmic scale, where it is near enough.

    A row without a branch serves a call with a branch where torch's own product adds it, which has no tile that could spill.
    """
    wanted = compute, format, n, k, dtype
    rows = [row for row in record.rows.values() if (row.compute, row.format, row.n, row.k, row.dtype) == wanted]
    rows = [row for row in rows if row.branch == branch or branch and row.tile is None]
    best = min(rows, key=lambda row: (abs(log2(m / row.m)), row.branch != branch), default=None)
    return best if best is not None and abs(log2(m / best.m)) <= NEAR else None


def _served_by(dtype: torch.dtype) -> tuple[str, ...]:
    """Name the dtypes of rows that serve x of `dtype`, the best first."""
    own = dtype_name(dtype)
    return (own, *(name for name in ("bfloat16", "float16") if name != own)) if dtype.itemsize == 2 else (own,)


def _warn_if_old(row: TuningRow, fmt: BlockFormat, card: str) -> None:
    reasons = []
    if row.triton != TRITON_VERSION:
        reasons.append(f"Triton {row.triton} (this is {TRITON_VERSION})")
    if row.kernel_hash != kernel_hash(row.compute, fmt):
        reasons.append("other kernel sources")
    if reasons:
        _warn_once(card, row.compute, row.format, " and ".join(reasons))


@cache
def _warn_once(card: str, compute: str, format: str, reasons: str) -> None:
    warnings.warn(
        f"The tuning record of {card} for {format}, {compute}, was measured with {reasons}. It is used; "
        "`flux-kernels tune` measures anew.",
        stacklevel=2,
    )


def forget_records() -> None:
    """Forget the records read so far."""
    for cached in (_known, _rows_for, find, _warn_once):
        cached.cache_clear()
