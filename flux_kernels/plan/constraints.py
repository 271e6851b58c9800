"""What a plan must respect, by patterns of tensor names: kept types, least types, tied tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..errors import FormatError
from ..mixed.option import Option
from ..models.names import block_of

Costs = Mapping[str, Mapping[Option, float]]
"""Tensor -> option -> cost."""


@dataclass(frozen=True)
class Constraints:
    """Hold what a plan must respect; fnmatch patterns of tensor names, with or without ".weight".

    Attributes:
        keep: (pattern, option): these tensors get exactly this option, also tensors outside the blocks.
        at_least: (pattern, option): these tensors get no fewer bits per weight than this type has.
        only_types: the types that may be chosen; empty means all that were measured. Ranks go with their type.
        same: patterns; all tensors that match one of them get one type.
        per_block: whether all tensors of a block get one type.
    """

    keep: tuple[tuple[str, Option], ...] = ()
    at_least: tuple[tuple[str, Option], ...] = ()
    only_types: tuple[Option, ...] = ()
    same: tuple[str, ...] = ()
    per_block: bool = False

    def described(self) -> dict[str, object]:
        """Return what was asked for, as JSON values, without what was not."""
        values = {
            "keep": [f"{pattern}={option}" for pattern, option in self.keep],
            "at_least": [f"{pattern}={option}" for pattern, option in self.at_least],
            "only_types": [str(option) for option in self.only_types],
            "same": list(self.same),
            "per_block": self.per_block,
        }
        return {name: value for name, value in values.items() if value}


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names a pattern matches; raise FormatError where it matches none."""
    names = list(names)
    matches = [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(".weight"), pattern)]
    if not matches:
        examples = ", ".join(names[:: max(1, len(names) // 4)][:4])
        raise FormatError(f"No tensor matches {pattern!r}. Tensors are called, for example, {examples}.")
    return matches


def parse_pair(text: str, flag: str) -> tuple[str, Option]:
    """Split PATTERN=TYPE; `flag` is the command's option that errors speak of."""
    pattern, equals, type_text = text.rpartition("=")
    if not equals or not pattern:
        raise FormatError(f'{flag} takes PATTERN=TYPE, such as "*.img_mod.*=Q8_0", got {text!r}.')
    return pattern, Option.parse(type_text)


def allowed(
    costs: Costs, constraints: Constraints, plain: Mapping[str, Option]
) -> tuple[dict[str, dict[Option, float]], dict[str, Option]]:
    """Apply everything but the ties.

    Args:
        costs: of the tensors that a plan chooses.
        constraints: what is asked for.
        plain: tensor -> option of all tensors of the file where no plan chooses.

    Returns:
        The options left for every tensor with their costs, and the options of tensors that are kept outside of `costs`.
    """
    left = {name: dict(options) for name, options in costs.items()}
    fixed: dict[str, Option] = {}
    types = {option.type for option in constraints.only_types}
    for name in left if types else ():
        only = {option: cost for option, cost in left[name].items() if option.type in types}
        left[name] = _any_left(only, name, f"only {', '.join(sorted(types))}")
    for pattern, least in constraints.at_least:
        for name in matching(pattern, left):
            wide = {option: cost for option, cost in left[name].items() if option.bits >= least.bits}
            left[name] = _any_left(wide, name, f"at least {least}")
    for pattern, kept in constraints.keep:
        for name in matching(pattern, plain):
            if name in left:
                left[name] = {kept: _cost_of(costs[name], kept, name)}
            else:
                fixed[name] = kept
    return left, fixed


def _any_left(options: dict[Option, float], name: str, asked: str) -> dict[Option, float]:
    if not options:
        raise FormatError(f"{name}: no measured type is left with {asked}. Measure it, or loosen the constraint.")
    return options


def _cost_of(options: Mapping[Option, float], option: Option, name: str) -> float:
    if option in options:
        return options[option]
    # Costs are measured against 16 bit.
    if option.bits >= 16:
        return 0.0
    raise FormatError(f"{name} cannot be kept in {option}: it was not measured. Measured: {', '.join(map(str, options))}.")


def tied(names: Sequence[str], constraints: Constraints) -> list[list[str]]:
    """Return the groups of tensors that get one type, in the order of their first names.

    Most groups are one tensor.
    """
    owner = {name: name for name in names}

    def root(name: str) -> str:
        while owner[name] != name:
            name = owner[name]
        return name

    together = [matching(pattern, names) for pattern in constraints.same]
    if constraints.per_block:
        blocks: dict[object, list[str]] = {}
        for name in names:
            blocks.setdefault(block_of(name) or name, []).append(name)
        together += blocks.values()
    for first, *others in together:
        for other in others:
            owner[root(other)] = root(first)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(root(name), []).append(name)
    return list(groups.values())
