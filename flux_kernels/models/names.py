"""Which rows of which stored tensor become which parameter of a model.

Two namings exist. The original is that of the checkpoints as their makers published them, where q, k and v are often one
tensor; "diffusers" is that of the model class's state dict. Every difference is a choice of output rows, so that packed rows
of any block format move as bytes. The names themselves stand in architectures/.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from .architecture import DIFFUSERS, INDEX, Architecture, Link
from .architectures import ARCHITECTURES

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
_KINDS = sorted({kind for row in ARCHITECTURES for pair in row.blocks for kind in pair}, key=len, reverse=True)
_BLOCK = re.compile(rf"^({'|'.join(map(re.escape, _KINDS))})\.([0-9]{{1,6}})\.")


@dataclass(frozen=True)
class Source:
    """Say where a parameter lies in a file: row ranges [start, stop) of a tensor, in its own order.

    Attributes:
        tensor: name without prefix.
        rows: the ranges; of a flat tensor, whose rows are single numbers, the whole.
        flat: whether the file holds one row of numbers, whatever the parameter's shape.
    """

    tensor: str
    rows: tuple[tuple[int, int], ...]
    flat: bool = False


def block_of(name: str) -> tuple[str, int] | None:
    """Return (list of blocks, index) of a tensor inside a block of any architecture, else None."""
    match = _BLOCK.match(name)
    return (match[1], int(match[2])) if match else None


def tensor_class(name: str) -> str:
    """Return `name` with its block index replaced by "*"."""
    return _BLOCK.sub(r"\1.*.", name)


def strip_prefix(name: str) -> str:
    """Return `name` without the prefix that some writers put before every name."""
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


def sources(architecture: Architecture, shapes: Mapping[str, tuple[int, ...]], naming: str) -> dict[str, Source]:
    """Locate every parameter of a model in a file of the given naming.

    Args:
        architecture: of the model.
        shapes: parameter name -> shape, as in the model's state dict.
        naming: one of the architecture's.

    Returns:
        Parameter name -> Source, in the order in which files are written.
    """
    if naming == DIFFUSERS:
        return {name: Source(name, ((0, shape[0] if shape else 1),)) for name, shape in shapes.items()}
    located: dict[str, Source] = {}
    for link, index in _expanded(architecture, shapes):
        for ours, theirs in link.kinds.items():
            located |= _located(architecture, link, index, ours, theirs, shapes)
    rest = {name: shape for name, shape in shapes.items() if name not in located}
    return located | {name: Source(name, ((0, shape[0] if shape else 1),)) for name, shape in rest.items()}


def _located(
    architecture: Architecture, link: Link, index: int, ours: str, theirs: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Source]:
    """Return the sources of the parameters of a kind that a link's tensor holds, where the model has them."""
    tensor = _joined(link.original, ours).replace(INDEX, str(index))
    located, start = {}, 0
    for module in link.diffusers:
        name = _joined(module, theirs).replace(INDEX, str(index))
        if name not in shapes:
            continue
        size = prod(shapes[name]) if link.flat else shapes[name][0]
        half = start + size // 2
        swapped = link.swap_halves is True or (link.swap_halves == "last" and _is_last(link, index, shapes))
        rows = ((half, start + size), (start, half)) if swapped else ((start, start + size),)
        located[name] = Source(tensor, rows, link.flat)
        start += size
    return located


def _is_last(link: Link, index: int, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    following = link.diffusers[0].replace(INDEX, str(index + 1))
    return not any(name.startswith(f"{following}.") for name in shapes)


def _joined(module: str, kind: str) -> str:
    return f"{module}.{kind}" if kind else module


def _expanded(architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> Iterable[tuple[Link, int]]:
    """Yield each link with each index that `shapes` has parameters for, block by block."""
    for group in _groups(architecture):
        if INDEX not in group[0].original:
            yield group[0], 0
            continue
        stem = group[0].diffusers[0].split(INDEX)[0]
        found = {name[len(stem) :].split(".", 1)[0] for name in shapes if name.startswith(stem)}
        for index in sorted(int(number) for number in found if number.isascii() and number.isdecimal()):
            yield from ((link, index) for link in group)


def _groups(architecture: Architecture) -> list[list[Link]]:
    """Group the links that repeat together: each of no block alone, those of each list of blocks."""
    groups: dict[str, list[Link]] = {}
    for link in architecture.links:
        groups.setdefault(link.original.split(INDEX)[0], []).append(link)
    return list(groups.values())


def stored_shapes(located: Mapping[str, Source], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return tensor name -> shape of the file that holds parameters of these shapes at these sources."""
    rows: dict[str, int] = {}
    columns: dict[str, tuple[int, ...]] = {}
    for parameter, source in located.items():
        shape = shapes[parameter]
        rows[source.tensor] = max(rows.get(source.tensor, 0), *(stop for _, stop in source.rows))
        columns[source.tensor] = () if source.flat else shape[1:]
    scalars = {located[name].tensor for name, shape in shapes.items() if name in located and not shape}
    return {tensor: () if tensor in scalars else (count, *columns[tensor]) for tensor, count in rows.items()}
