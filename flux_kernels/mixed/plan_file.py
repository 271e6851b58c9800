"""The plan of a mixed file: the type of each tensor, as a JSON file that says where it comes from."""

from __future__ import annotations

import builtins
import json
import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import FormatError
from ..files import write_whole
from ..formats import types_by_name
from ..gguf.check import listed
from .option import Option

SCHEMA = "flux_kernels.plan/1"
_HASH = re.compile(r"([0-9a-f]{64})?")


@dataclass(frozen=True)
class Plan:
    """Hold a plan: types and ranks by tensor, what they come to, and what they were computed from.

    Attributes:
        types: tensor name in the GGUF file (BFL names, without prefix) -> ggml type name. Tensors that are not named follow
            the layout `options["rule"]` ("new" where it is missing).
        low_rank: tensor name -> rank of the 16-bit correction stored with it; tensors that are not named have none.
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

    def by_tensor(self) -> dict[str, Option]:
        """Return tensor -> option, type and rank together."""
        return {name: Option(type_name, self.low_rank.get(name, 0)) for name, type_name in self.types.items()}

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
    def from_json(cls, text: str | builtins.bytes, name: str = "plan") -> Plan:
        """Check the JSON text of a plan file, called `name` in errors."""
        try:
            record = json.loads(text)
        # Also for text that is not UTF-8.
        except ValueError as error:
            raise FormatError(f"{name} is no JSON: {error}. `flux-kernels plan -o plan.json` writes a plan.") from None
        problem = _record_problem(record) or _problem(record)
        if problem:
            raise FormatError(f"{name} is no plan: {problem}.")
        return cls(**{key: value for key, value in record.items() if key != "schema"})


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


def _record_problem(record: Any) -> str | None:
    """Say where an object is not of this schema: another one, or fields that are missing or unknown."""
    if not isinstance(record, dict):
        return f"it holds a {type(record).__name__}, a plan is an object"
    if record.get("schema") != SCHEMA:
        return f'its "schema" is {record.get("schema")!r}, legal is {SCHEMA!r}; it was made by another tool or version'
    missing = [name for name in ("types", "bytes", "cost") if name not in record]
    unknown = sorted(record.keys() - _LEGAL.keys() - {"schema"})
    if missing:
        return f"it lacks {', '.join(map(repr, missing))}"
    return f"unknown fields {', '.join(map(repr, unknown))}; legal are {', '.join(_LEGAL)}" if unknown else None


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_integer(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# Field -> (what its value must be, the same in words).
_LEGAL: dict[str, tuple[Callable[[Any], bool], str]] = {
    "types": (_is_object, "an object"),
    "bytes": (_is_integer, "a whole number of bytes"),
    "cost": (_is_finite, "a finite number"),
    "low_rank": (_is_object, "an object"),
    "joint_cost": (lambda value: value is None or _is_finite(value), "a finite number"),
    "costs_sha256": (lambda value: isinstance(value, str) and bool(_HASH.fullmatch(value)), "64 hexadecimal digits"),
    "options": (_is_object, "an object"),
    "versions": (_is_object, "an object"),
    "date": (lambda value: isinstance(value, str), "text"),
}


def _problem(plan: Mapping[str, Any]) -> str | None:
    """Return the first defect of the values, as a sentence without its full stop."""
    for name, (is_legal, legal) in _LEGAL.items():
        if name in plan and not is_legal(plan[name]):
            value = type(plan[name]).__name__ if is_legal is _is_object else repr(plan[name])
            return f'"{name}" is {"a " * (is_legal is _is_object)}{value}, legal is {legal}'
    types, known = plan["types"], types_by_name()
    if not types:
        return '"types" is empty, a plan names at least one tensor'
    for name, type_name in types.items():
        if not isinstance(type_name, str) or type_name not in known:
            return f"tensor {name!r} has the unknown type {type_name!r}; legal are {', '.join(known)}"
    for name, rank in plan.get("low_rank", {}).items():
        if name not in types:
            return f'"low_rank" names {name!r}, which "types" does not'
        if not _is_integer(rank, least=1):
            return f"the rank of {name!r} is {rank!r}, legal is an integer from 1"
    return None
