"""What a caller of swap_linear asks for: names and patterns, checked, and what they mean for a layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import UnionType
from typing import Any, TypeVar

from ..backends import check_names
from ..compute import compute_of_layer
from ..formats import BlockFormat, get_format
from ..packing import quantizer

Patterns = str | Sequence[str] | None
Value = TypeVar("Value")


@dataclass(frozen=True)
class Wish:
    """Hold what is asked for one layer.

    Attributes:
        refusal: why the patterns leave the layer out, or None.
        backend, compute: what is to run it.
        format: block format to quantize it to where it is plain, or None.
        any_format: whether some layers of the model are to be quantized.
    """

    refusal: str | None
    backend: str
    compute: str
    format: BlockFormat | None
    any_format: bool


@dataclass(frozen=True)
class Request:
    """Hold the arguments of swap_linear, as its caller wrote them."""

    backend: str
    compute: str | Mapping[str, str]
    format: str | Mapping[str, str] | None
    include: Patterns
    exclude: Patterns

    def wishes(self, layers: Iterable[tuple[list[str], list[str]]]) -> tuple[list[Wish], list[str]]:
        """Check all names, and return what is asked for each layer, and the patterns that match none of them.

        Args:
            layers: (names of a layer, names of the parts of a fused layer).

        Raises:
            BackendUnavailable: for an unknown backend or compute mode.
            FormatError: for an unknown type, or a type without a quantizer here.
            TypeError: where a mode or type is neither a name nor a map.
        """
        for mode in names_in(self.compute, "compute"):
            check_names(self.backend, mode)
        for name in names_in(self.format, "format", str | BlockFormat) if self.format is not None else ():
            quantizer(get_format(name))
        include, exclude = _as_tuple(self.include, ("*",)), _as_tuple(self.exclude, ())
        layers = list(layers)
        wishes = [self._wish(*names, include, exclude) for names in layers]
        patterns = [*include, *exclude, *_patterns_in(self.format), *_patterns_in(self.compute)]
        all_names = [name for names, part_names in layers for name in names + part_names]
        return wishes, [pattern for pattern in patterns if pattern != "*" and not matches(all_names, pattern)]

    def _wish(self, names: list[str], part_names: list[str], include: Iterable[str], exclude: Iterable[str]) -> Wish:
        """Resolve the patterns for one layer; a fused layer is "exact" where its parts' modes would differ."""
        all_names = names + part_names
        format = first_match(self.format, all_names, None)
        modes = {mode_asked_for(self.compute, [*names, part]) for part in part_names} or {mode_asked_for(self.compute, names)}
        excluding = next((f'exclude="{pattern}"' for pattern in exclude if matches(all_names, pattern)), None)
        return Wish(
            refusal=excluding if any(matches(all_names, pattern) for pattern in include) else "not in include=",
            backend=self.backend,
            compute=modes.pop() if len(modes) == 1 else "exact",
            format=None if format is None else get_format(format),
            any_format=bool(self.format),
        )


def names_in(value: object, argument: str, legal: type | UnionType = str) -> list[str]:
    """List the names in a name or a map of fnmatch pattern -> name; raise TypeError for anything else."""
    names: list[Any] = list(value.values()) if isinstance(value, Mapping) else [value]
    if not all(isinstance(name, legal) for name in names):
        raise TypeError(f"{argument} must be a name or a map of fnmatch pattern -> name, got {value!r}.")
    return names


def mode_asked_for(compute: str | Mapping[str, str], names: list[str]) -> str:
    """Return the compute mode that is asked for a layer of these names.

    One mode for a whole model spares WEIGHT_ONLY_LAYERS; a map is taken at its word.
    """
    return compute_of_layer(compute, names) if isinstance(compute, str) else first_match(compute, names, "exact")


def first_match(value: Value | Mapping[str, Value], names: list[str], default: Value) -> Value:
    """Return `value`, or in a map of patterns the value of the first pattern that matches."""
    if not isinstance(value, Mapping):
        return value
    return next((chosen for pattern, chosen in value.items() if matches(names, pattern)), default)


def matches(names: list[str], pattern: str) -> bool:
    """Return whether an fnmatch pattern matches any of a layer's names."""
    return any(fnmatchcase(name, pattern) for name in names)


def _patterns_in(value: object) -> list[str]:
    return list(value) if isinstance(value, Mapping) else []


def _as_tuple(patterns: Patterns, default: tuple[str, ...]) -> tuple[str, ...]:
    if patterns is None:
        return default
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)
