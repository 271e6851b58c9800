"""Low-rank corrections in a FLUX.1 file: a layer computes with weight + up @ down.

`<module>.weight` [N, K] has the tensors `<module>.low_rank_down` [r, K] and `<module>.low_rank_up` [N, r] in 16 or 32 bit.
No other reader knows these tensors; such a file is for `load_flux`. Where a BFL tensor holds several layers (qkv), its
layers share down and take their rows of up.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import GGUFError
from ..formats import PLAIN_TYPES

# Type of a low-rank correction: 16 bit, like what it corrects.
RANK_TYPE = "BF16"
DOWN, UP = ".low_rank_down", ".low_rank_up"
_WEIGHT = ".weight"
Shapes = Mapping[str, tuple[int, ...]]


def is_correction(name: str) -> bool:
    """Tell whether a tensor is half of a low-rank correction, by its name."""
    return name.endswith((DOWN, UP))


def correction_names(weight: str) -> tuple[str, str]:
    """Return the names of down and up of a weight's correction."""
    module = weight.removesuffix(_WEIGHT)
    return module + DOWN, module + UP


def check_corrections(corrections: Shapes, weights: Shapes, types: Mapping[str, str]) -> None:
    """Raise GGUFError where corrections do not belong to quantized matrices of the file.

    Args:
        corrections: name -> shape of every tensor that `is_correction`.
        weights: name -> shape of the others.
        types: name -> ggml type of all.
    """
    for name, shape in corrections.items():
        module = name.removesuffix(DOWN).removesuffix(UP)
        weight = module + _WEIGHT
        if weight not in weights or types[weight] in PLAIN_TYPES:
            raise GGUFError(f"{name!r} corrects {weight!r}, which is no quantized matrix of this file. It is damaged.")
        down, up = (corrections.get(half) for half in correction_names(weight))
        if down is None or up is None:
            raise GGUFError(f"{module!r} has only one half of a low-rank correction: {name!r}. The file is incomplete.")
        n, k = weights[weight]
        if len(shape) != 2 or down[1:] != (k,) or up != (n, down[0]):
            raise GGUFError(
                f"The low-rank correction of {weight!r} must be [r, {k}] and [{n}, r], got {list(down)} and {list(up)}."
            )
        if types[name] not in ("F16", "BF16", "F32"):
            raise GGUFError(f"{name!r} is {types[name]}; low-rank corrections are F16, BF16 or F32.")


def join_branches(branches: list[tuple[Tensor, Tensor] | None], rows: list[int]) -> tuple[Tensor, Tensor] | None:
    """Make one correction of those of the layers whose rows make up one tensor, exactly.

    Layers of the same down share it; others get ranks of their own, with zeros in the rows of the rest.

    Args:
        branches: (down [r, K], up [N, r]) of each layer, or None, in the order of their rows.
        rows: N of each layer.

    Returns:
        down [R, K] and up [sum of N, R], or None where no layer has a branch.
    """
    downs: list[Tensor] = []
    places: list[int] = []
    for branch in branches:
        if branch is None:
            places.append(-1)
            continue
        same = (index for index, down in enumerate(downs) if down.dtype == branch[0].dtype and torch.equal(down, branch[0]))
        places.append(next(same, len(downs)))
        if places[-1] == len(downs):
            downs.append(branch[0])
    if not downs:
        return None
    dtypes = {down.dtype for down in downs}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    starts = [sum(len(down) for down in downs[:index]) for index in range(len(downs))]
    up = torch.zeros(sum(rows), sum(map(len, downs)), dtype=dtype)
    row = 0
    for branch, place, count in zip(branches, places, rows, strict=True):
        if branch is not None:
            up[row : row + count, starts[place] : starts[place] + len(downs[place])] = branch[1].to(dtype)
        row += count
    return torch.cat([down.to(dtype) for down in downs]), up


def low_rank_shapes(name: str, shape: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors that hold a rank-r correction of tensor `name`, and their shapes."""
    if not rank:
        return {}
    down, up = correction_names(name)
    return {down: (rank, shape[1]), up: (shape[0], rank)}
