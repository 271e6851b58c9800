"""Compare the tensors of a file with those a model needs, and say in one sentence what is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..errors import GGUFError
from ..formats import FORMATS, PLAIN_TYPES

Shapes = Mapping[str, tuple[int, ...]]
# Tensors named in one error.
_EXAMPLES = 5


def tensor_problems(got: Shapes, expected: Shapes) -> str:
    """Name what is missing, superfluous or wrongly shaped; "" where nothing is."""
    wrong = [name for name in expected if name in got and got[name] != expected[name]]
    problems = [
        _problem("missing", [name for name in expected if name not in got]),
        _problem("superfluous", [name for name in got if name not in expected]),
        _problem("wrongly shaped", [f"{name} is {_by(got[name])}, should be {_by(expected[name])}" for name in wrong]),
    ]
    return "; ".join(filter(None, problems))


def check_weight_type(name: str, format: str) -> None:
    """Raise GGUFError where a tensor's type is no weight (an integer type)."""
    plain = PLAIN_TYPES.get(format)
    if format in FORMATS or (plain is not None and plain.dtype.is_floating_point):
        return
    legal = [name for name, plain in PLAIN_TYPES.items() if plain.dtype.is_floating_point] + list(FORMATS)
    raise GGUFError(f"{name!r} has type {format}, which cannot be a weight here. Legal: {', '.join(legal)}.")


def listed(names: Sequence[str], shown: int = 4) -> str:
    """Name the first few, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _problem(what: str, names: Iterable[str]) -> str:
    names = list(names)
    if not names:
        return ""
    return f"{len(names)} tensor{'s' * (len(names) > 1)} {what}: {listed(names, _EXAMPLES)}"


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a scalar"
