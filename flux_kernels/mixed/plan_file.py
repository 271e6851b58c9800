"""The plan of a mixed file: which ggml type each tensor gets, as a JSON file that says where it came from."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import FormatError
from ..files import write_whole
from ..formats import types_by_name
from ..gguf.check import listed

SCHEMA = "flux_kernels.plan/1"
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Plan:
    """Hold a plan: types and ranks by tensor, what they come to, and what they were computed from.

    Attributes:
        types: tensor name in the GGUF file (BFL names, without prefix) -> ggml type name. Tensors that are not named follow
            the layout `options["rule"]` ("new" where it is missing).
        low_rank: tensor name -> rank of the 16-bit correction stored beside it; tensors that are not named have none.
        bytes: size of the whole file with the key-values that published files have, in bytes; what a tool writes about the
            file's origin comes on top (KEY_VALUE_BYTES are kept free for it within a budget).
        cost: predicted by adding up the costs of the tensors; lower is better.
        joint_cost: measured with all tensors quantized together, or None.
        costs_sha256: of the cost table's bytes; "" for a plan written by hand.
        options: what was asked for: the budget, constraints, and the model's name.
        versions: package -> version that computed it.
        date: ISO 8601.
    """

    types: dict[str, str]
    bytes: int
    cost: float
    low_rank: dict[str, int] = field(default_factory=dict)
    joint_cost: float | None = None
    costs_sha256: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""

    def __post_init__(self) -> None:
        problem = _problem(asdict(self))
        if problem:
            raise FormatError(f"This is no plan: {problem}.")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; the file appears under its name only when it is complete.

        Raises OSError where it cannot be written.
        """
        write_whole(path, f"{self.to_json()}\n".encode())

    def to_json(self) -> str:
        """Return the plan as the JSON text of a plan file."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, allow_nan=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read and check a plan file.

        Raises:
            FormatError: naming the first defect: no JSON, another schema, missing or wrong fields, unknown types.
            OSError: where it cannot be read.
        """
        with open(path, "rb") as file:
            text = file.read()
        return cls.from_json(text, os.fsdecode(path))

    @classmethod
    def from_json(cls, text: str | bytes, name: str = "plan") -> Plan:
        """Check the JSON text of a plan file, called `name` in errors."""
        try:
            found = json.loads(text)
        except ValueError as error:  # also text that is not UTF-8
            raise FormatError(f"{name} is no JSON: {error}. `flux-kernels plan -o plan.json` writes a plan.") from None
        problem = _schema_problem(found) or _fields_problem(found) or _problem(found)
        if problem:
            raise FormatError(f"{name} is no plan: {problem}.")
        return cls(**{key: value for key, value in found.items() if key != "schema"})


def check_tensors(names: Collection[str], held: Collection[str], holder: str) -> None:
    """Check that a plan is of the model it is used with.

    Args:
        names: tensors of the plan.
        held: all tensors that the model's file has, in BFL's names.
        holder: what holds them, in words for the message.

    Raises:
        FormatError: where the plan names others.
    """
    unknown = [name for name in names if name not in held]
    if unknown:
        raise FormatError(
            f"The plan names {listed(unknown)}, which {holder} does not hold: it was made for another model. Plan again."
        )


def _schema_problem(found: Any) -> str | None:
    if not isinstance(found, dict):
        return f"it holds a {type(found).__name__}, a plan is an object"
    schema = found.get("schema")
    if schema != SCHEMA:
        return f'its "schema" is {schema!r}, legal is {SCHEMA!r}; it was made by another tool or version'
    return None


def _fields_problem(found: Mapping[str, Any]) -> str | None:
    """Say which fields are missing or unknown."""
    known = Plan.__dataclass_fields__
    missing = [name for name in ("types", "bytes", "cost") if name not in found]
    unknown = sorted(found.keys() - known.keys() - {"schema"})
    if missing:
        return f"it lacks {', '.join(map(repr, missing))}"
    return f"unknown fields {', '.join(map(repr, unknown))}; legal are {', '.join(known)}" if unknown else None


def _problem(plan: Mapping[str, Any]) -> str | None:
    """Return the first defect of the values, as a sentence without its full stop."""
    mappings = ("types", "low_rank", "options", "versions")
    wrong = next((name for name in mappings if not isinstance(plan.get(name, {}), Mapping)), None)
    if wrong:
        return f'"{wrong}" is a {type(plan[wrong]).__name__}, legal is an object'
    return _types_problem(plan["types"]) or _ranks_problem(plan.get("low_rank", {}), plan["types"]) or _numbers_problem(plan)


def _types_problem(types: Mapping[str, Any]) -> str | None:
    if not types:
        return '"types" is empty, a plan names at least one tensor'
    legal = types_by_name()
    wrong = next(((name, kind) for name, kind in types.items() if not isinstance(kind, str) or kind not in legal), None)
    if wrong:
        return f"tensor {wrong[0]!r} has the unknown type {wrong[1]!r}; legal are {', '.join(legal)}"
    return None


def _ranks_problem(ranks: Mapping[str, Any], types: Mapping[str, Any]) -> str | None:
    for name, rank in ranks.items():
        if name not in types:
            return f'"low_rank" names {name!r}, which "types" does not'
        if not _integer(rank) or rank < 1:
            return f"the rank of {name!r} is {rank!r}, legal is an integer from 1"
    return None


def _numbers_problem(plan: Mapping[str, Any]) -> str | None:
    if not _integer(plan["bytes"]) or plan["bytes"] < 0:
        return f'"bytes" is {plan["bytes"]!r}, legal is a whole number of bytes'
    for name in ("cost", "joint_cost"):
        value = plan.get(name)
        if (value is not None or name == "cost") and not (_number(value) and math.isfinite(value)):
            return f'"{name}" is {value!r}, legal is a finite number'
    source = plan.get("costs_sha256", "")
    if source != "" and not (isinstance(source, str) and _HASH.fullmatch(source)):
        return f'"costs_sha256" is {source!r}, legal are 64 hexadecimal digits'
    if not isinstance(plan.get("date", ""), str):
        return f'"date" is {plan["date"]!r}, legal is text'
    return None


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
