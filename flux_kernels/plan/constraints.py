"""What a plan must respect, by patterns of tensor names: kept types, least types, tensors tied to one type."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..errors import FormatError
from ..flux.names import block_of
from ..mixed.file_layout import option_bits, parse_option

Costs = Mapping[str, Mapping[str, float]]  # tensor -> option, such as "Q4_K" or "Q4_K+r16" -> cost


@dataclass(frozen=True)
class Constraints:
    """Hold what a plan must respect; patterns are fnmatch patterns of tensor names, with or without ".weight".

    Attributes:
        keep: (pattern, type): these tensors get exactly this type, also tensors outside the blocks.
        at_least: (pattern, type): these tensors get no fewer bits per weight than this type has.
        only_types: the types that may be chosen; empty means all that were measured. Ranks go with their type.
        same: patterns; all tensors that match one of them get one type.
        per_block: whether all tensors of a block get one type.
    """

    keep: tuple[tuple[str, str], ...] = ()
    at_least: tuple[tuple[str, str], ...] = ()
    only_types: tuple[str, ...] = ()
    same: tuple[str, ...] = ()
    per_block: bool = False

    def described(self) -> dict[str, object]:
        """Return what was asked for, as JSON values, without what was not."""
        pairs = {name: [f"{p}={t}" for p, t in getattr(self, name)] for name in ("keep", "at_least")}
        found = {**pairs, "only_types": list(self.only_types), "same": list(self.same), "per_block": self.per_block}
        return {name: value for name, value in found.items() if value}


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names a pattern matches; raise FormatError where it matches none."""
    names = list(names)
    found = [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(".weight"), pattern)]
    if not found:
        examples = ", ".join(names[:: max(1, len(names) // 4)][:4])
        raise FormatError(f"No tensor matches {pattern!r}. Tensors are called, for example, {examples}.")
    return found


def parse_pair(text: str, option: str) -> tuple[str, str]:
    """Split PATTERN=TYPE; `option` is the command's option that errors speak of."""
    pattern, equals, kind = text.rpartition("=")
    if not equals or not pattern:
        raise FormatError(f'{option} takes PATTERN=TYPE, such as "*.img_mod.*=Q8_0", got {text!r}.')
    parse_option(kind)
    return pattern, kind


def allowed(
    costs: Costs, constraints: Constraints, plain: Mapping[str, str]
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Apply everything but the ties.

    Args:
        costs: of the tensors that a plan chooses.
        constraints: what is asked for.
        plain: tensor -> type of all tensors of the file where no plan chooses.

    Returns:
        The options left for every tensor with their costs, and the types of tensors that are kept outside of `costs`.
    """
    left = {name: dict(options) for name, options in costs.items()}
    fixed: dict[str, str] = {}
    only = {parse_option(kind)[0] for kind in constraints.only_types}
    if only:
        left = {name: _only(name, options, only) for name, options in left.items()}
    for pattern, kind in constraints.at_least:
        for name in matching(pattern, left):
            least = option_bits(kind)
            left[name] = _some({o: c for o, c in left[name].items() if option_bits(o) >= least}, name, f"at least {kind}")
    for pattern, kind in constraints.keep:
        for name in matching(pattern, plain):
            if name in left:
                left[name] = {kind: _cost_of(costs[name], kind, name)}
            else:
                fixed[name] = kind
    return left, fixed


def _only(name: str, options: Mapping[str, float], only: Iterable[str]) -> dict[str, float]:
    return _some({o: c for o, c in options.items() if parse_option(o)[0] in only}, name, f"only {', '.join(sorted(only))}")


def _some(options: dict[str, float], name: str, asked: str) -> dict[str, float]:
    if not options:
        raise FormatError(f"{name}: no measured type is left with {asked}. Measure it, or loosen the constraint.")
    return options


def _cost_of(options: Mapping[str, float], kind: str, name: str) -> float:
    if kind in options:
        return options[kind]
    if option_bits(kind) >= 16:
        return 0.0  # costs are measured against 16 bit
    raise FormatError(f"{name} cannot be kept in {kind}: it was not measured. Measured: {', '.join(options)}.")


def tied(names: Sequence[str], constraints: Constraints) -> list[list[str]]:
    """Return the groups of tensors that get one type, in the order of their first names; most groups are one tensor."""
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
