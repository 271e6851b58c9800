"""The cost table: what each ggml type costs for each tensor of a file, as a CSV with a JSON file beside it.

`costs.csv` has the columns of `CostRow`; `costs.csv.json` says which model and which states were measured, and holds joint
measurements: costs of single tensors do not add, so plans are measured as a whole.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import FormatError
from ..files import written_whole

SCHEMA = "flux_kernels.costs/1"


@dataclass(frozen=True)
class CostRow:
    """Hold what one type costs for one tensor of the file, all other tensors being unquantized.

    Attributes:
        tensor: name in the GGUF file without prefix, such as "double_blocks.0.img_attn.qkv.weight".
        type: ggml type name; the 16-bit type of the source is among them, with costs of 0.
        cost: squared error of the model's velocity over the velocity's squared magnitude, image tokens only, steps weighted
            by the square of their length in sigma (see `measure.velocity_cost`). A fraction.
        mfq_cost: MixedQuantFlux's metric: mean squared error of the last block's output, text tokens included.
        bytes: packed bytes of the tensor, without padding.
        error_weight_rms: RMS of the weights' error over the RMS of the weights. A fraction.
    """

    tensor: str
    type: str
    cost: float
    mfq_cost: float
    bytes: int
    error_weight_rms: float


@dataclass(frozen=True)
class JointRow:
    """Hold what a plan costs when all of its tensors are quantized at once.

    Attributes:
        types: tensor -> ggml type; tensors that are not named were left as they are.
        cost: as in CostRow.
        mfq_cost: as in CostRow.
        cost_low: lower end of the 95 % bootstrap interval of `cost` over the states.
        cost_high: upper end.
        states: sha256 of the states file that it was measured on.
    """

    types: dict[str, str]
    cost: float
    mfq_cost: float
    cost_low: float | None = None
    cost_high: float | None = None
    states: str = ""


@dataclass
class CostTable:
    """Hold the rows and where they come from.

    Attributes:
        rows: one a tensor and type, in the order of the file.
        model: name of the model's file.
        source_sha256: of that file's bytes.
        states: {"count", "sha256", "steps", "sizes"} of the captured states.
        prompts: that the states were captured with.
        seed: of the first state.
        date: ISO date.
        versions: library -> version.
        importance: "collected", "none", or the name of an imatrix file: the weighting of the quantizers.
        joint: plans measured as a whole.
        source: path of the 16-bit model as it was given to `measure`; "" for the embedded model.
    """

    rows: list[CostRow]
    model: str = ""
    source_sha256: str = ""
    states: dict[str, Any] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)
    seed: int = 0
    date: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    importance: str = "none"
    joint: list[JointRow] = field(default_factory=list)
    source: str = ""

    def by_tensor(self) -> dict[str, dict[str, CostRow]]:
        """Return tensor -> type -> row, in the order of the rows."""
        found: dict[str, dict[str, CostRow]] = {}
        for row in self.rows:
            found.setdefault(row.tensor, {})[row.type] = row
        return found

    def save(self, path: Path) -> None:
        """Write `path` and the JSON beside it; both are complete before either takes its name.

        Processes of one run may write at once: each writes files of its own, which are the same.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"schema": SCHEMA, **{name: value for name, value in asdict(self).items() if name != "rows"}}
        with written_whole(path) as table, written_whole(sidecar(path)) as facts:
            with table.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(COLUMNS)
                writer.writerows([getattr(row, name) for name in COLUMNS] for row in self.rows)
            facts.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> CostTable:
        """Read a table; the JSON beside it may be missing.

        Raises:
            FormatError: where the CSV is no cost table, or the JSON has another schema.
        """
        about = _read_sidecar(sidecar(path))
        joint = [JointRow(**row) for row in about.pop("joint", [])]
        return cls(rows=list(_read_rows(path)), joint=joint, **about)


COLUMNS = tuple(column.name for column in fields(CostRow))


def sidecar(path: Path) -> Path:
    """Return the path of the JSON that belongs to a table: `costs.csv.json` for `costs.csv`."""
    return path.with_name(path.name + ".json")


def _read_rows(path: Path) -> Iterable[CostRow]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise FormatError(
                f"{path} is no cost table: it lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}. "
                f"`flux-kernels measure` writes {', '.join(COLUMNS)}."
            )
        for line in reader:
            yield _row(line, f"{path}, line {reader.line_num}")


def _row(line: Mapping[str, str], where: str) -> CostRow:
    try:
        numbers = {name: float(line[name]) for name in ("cost", "mfq_cost", "error_weight_rms")}
        size = int(line["bytes"])
    except (TypeError, ValueError) as error:
        raise FormatError(f"{where}: {error}. cost, mfq_cost, bytes and error_weight_rms are numbers.") from None
    if not all(math.isfinite(value) and value >= 0 for value in (*numbers.values(), size)):
        raise FormatError(f"{where}: costs, bytes and errors are finite and not negative, got {dict(line)}.")
    return CostRow(tensor=line["tensor"], type=line["type"], bytes=size, **numbers)


def _read_sidecar(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path} is no JSON ({error}). Remove it, or measure again.") from None
    if not isinstance(about, dict) or about.get("schema") != SCHEMA:
        raise FormatError(f"{path} does not have the schema {SCHEMA}. It was written by another version: measure again.")
    known = {column.name for column in fields(CostTable)} - {"rows"}
    return {name: value for name, value in about.items() if name in known}
