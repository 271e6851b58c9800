"""The cost table: what each type costs for each tensor of a file, as a CSV and a JSON file.

`costs.csv` has the fields of `CostRow` as columns; `costs.csv.json` says which model and which states were measured, and holds
joint measurements: costs of single tensors do not add, so plans are measured as a whole.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import FormatError
from ..files import written_whole
from .option import Option

SCHEMA = "flux_kernels.costs/1"
COLUMNS = ("tensor", "type", "cost", "mfq_cost", "bytes", "error_weight_rms")


@dataclass(frozen=True)
class CostRow:
    """Hold what one option costs for one tensor of the file, all other tensors being unquantized.

    Attributes:
        tensor: name in the GGUF file without prefix, such as "double_blocks.0.img_attn.qkv.weight".
        option: type and rank; the 16-bit type of the source is among them, with costs of 0.
        cost: squared error of the model's velocity over the velocity's squared magnitude, image tokens only, steps weighted
            by the square of their length in sigma (see `measure.velocity_cost`). A fraction.
        mfq_cost: MixedQuantFlux's metric: mean squared error of the last block's output, text tokens included.
        bytes: packed bytes of the tensor, without padding.
        error_weight_rms: RMS of the weights' error over the RMS of the weights. A fraction.
    """

    tensor: str
    option: Option
    cost: float
    mfq_cost: float
    bytes: int
    error_weight_rms: float

    def record(self) -> dict[str, Any]:
        """Return the row as files hold it: column -> text or number."""
        return dict(zip(COLUMNS, (self.tensor, str(self.option), *astuple(self)[2:]), strict=True))

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> CostRow:
        """Read what `record` returned, its numbers as such or as text.

        Raises:
            FormatError: for a type that is not known, and numbers that are not finite or negative.
            KeyError, TypeError, ValueError: where a column is missing or no number.
        """
        cost, mfq_cost, error = (float(record[name]) for name in ("cost", "mfq_cost", "error_weight_rms"))
        nbytes = int(record["bytes"])
        if not all(math.isfinite(value) and value >= 0 for value in (cost, mfq_cost, error, nbytes)):
            raise FormatError(f"costs, bytes and errors are finite and not negative, got {dict(record)}.")
        return cls(record["tensor"], Option.parse(record["type"]), cost, mfq_cost, nbytes, error)


@dataclass(frozen=True)
class JointRow:
    """Hold what a plan costs when all of its tensors are quantized at once.

    Attributes:
        types: tensor -> option; tensors that are not named were left as they are.
        cost: as in CostRow.
        mfq_cost: as in CostRow.
        cost_low: lower end of the 95 % bootstrap interval of `cost` over the states.
        cost_high: upper end.
        states: sha256 of the states file that it was measured on.
    """

    types: dict[str, Option]
    cost: float
    mfq_cost: float
    cost_low: float | None = None
    cost_high: float | None = None
    states: str = ""

    def record(self) -> dict[str, Any]:
        """Return the row as JSON holds it."""
        return {**vars(self), "types": {name: str(option) for name, option in self.types.items()}}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> JointRow:
        """Read what `record` returned."""
        return cls(**{**record, "types": {name: Option.parse(text) for name, text in record["types"].items()}})


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

    def by_tensor(self) -> dict[str, dict[Option, CostRow]]:
        """Return tensor -> option -> row, in the order of the rows."""
        rows: dict[str, dict[Option, CostRow]] = {}
        for row in self.rows:
            rows.setdefault(row.tensor, {})[row.option] = row
        return rows

    def costs(self, metric: str) -> dict[str, dict[Option, float]]:
        """Return tensor -> option -> cost; `metric` is "cost" or "mfq_cost"."""
        return {name: {option: getattr(row, metric) for option, row in rows.items()} for name, rows in self.by_tensor().items()}

    def save(self, path: Path) -> None:
        """Write `path` and its JSON; both are complete before either takes its name.

        Processes of one run may write at once: each writes files of its own, which are the same.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"schema": SCHEMA, **vars(self), "joint": [row.record() for row in self.joint]}
        del about["rows"]
        with written_whole(path) as table, written_whole(sidecar(path)) as facts:
            with table.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(COLUMNS)
                writer.writerows(row.record().values() for row in self.rows)
            facts.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> CostTable:
        """Read a table; its JSON may be missing.

        Raises:
            FormatError: where the CSV is no cost table, or the JSON has another schema.
        """
        about = _read_sidecar(sidecar(path))
        joint = [JointRow.of_record(record) for record in about.pop("joint", [])]
        return cls(rows=list(_read_rows(path)), joint=joint, **about)


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
        return CostRow.of_record(line)
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from None
    except (TypeError, ValueError) as error:
        raise FormatError(f"{where}: {error}. cost, mfq_cost, bytes and error_weight_rms are numbers.") from None


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
