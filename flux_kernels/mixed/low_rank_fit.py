"""Fit a low-rank correction of a quantized matrix.

W is stored as packed rows plus up @ down, in 16 bit, of rank r. The idea is SVDQuant's (arXiv 2411.05007): what the type does
worst is left to a product of thin matrices. Two starts are tried: the product takes the largest directions of W, and the type
what is left (SVDQuant's); or the type comes first, and the product takes the largest directions of its error. "Largest" is as
the layer's inputs see it: the truncated singular value decomposition after the root of the inputs' second moments, channel by
channel or with all their correlations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import itemgetter

import torch
from torch import Tensor

from ..formats import PLAIN_TYPES
from ..models.low_rank_tensors import RANK_TYPE

# Dtype of both factors.
STORED = PLAIN_TYPES[RANK_TYPE].dtype
# Of quantizing what the product leaves and fitting the product anew, from each start; the best one counts.
TURNS = 2
# Added to second moments, relative to their mean: what the captured inputs never did is unlikely, not impossible.
_FLOOR = 1e-3
_TINY = 1e-30


def corrected(
    weight: Tensor, round_trip: Callable[[Tensor], Tensor], rank: int, seen: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a matrix with a low-rank correction.

    Args:
        weight: float32 [N, K].
        round_trip: quantizes and decodes a matrix of that shape.
        rank: of the correction, at most min(N, K).
        seen: the inputs' second moments: their covariance [K, K], its diagonal [K] (an imatrix), or None for all alike.

    Returns:
        The decoded matrix [N, K] in float32, down [rank, K] and up [N, rank] rounded to STORED; their sum
        decoded + up @ down is what the layer computes with.
    """
    root = root_of(torch.ones_like(weight[0]) if seen is None else seen.to(weight.device))
    _, *best = min(_attempts(weight, round_trip, rank, root), key=itemgetter(0))
    decoded, down, up = best
    return decoded, down, up


def _attempts(
    weight: Tensor, round_trip: Callable[[Tensor], Tensor], rank: int, root: Tensor
) -> Iterator[tuple[float, Tensor, Tensor, Tensor]]:
    """Yield (error, decoded, down, up) of each turn.

    There are two starts: no correction, and that of the whole weight.
    """
    for product in (torch.zeros_like(weight), _product(*_stored(weight, rank, root))):
        for _ in range(TURNS):
            decoded = round_trip(weight - product)
            down, up = _stored(weight - decoded, rank, root)
            product = _product(down, up)
            yield _weighted(weight - decoded - product, root).square().sum().item(), decoded, down, up


def root_of(seen: Tensor) -> Tensor:
    """Return the root of second moments in float64: of channels [K], or symmetric of a covariance [K, K]."""
    seen = seen.double()
    mean = (seen if seen.dim() == 1 else seen.diagonal()).mean().clamp_min(torch.finfo(torch.float32).tiny)
    if seen.dim() == 1:
        return (seen + _FLOOR * mean).sqrt()
    values, vectors = torch.linalg.eigh(seen)
    return (vectors * (values.clamp_min(0) + _FLOOR * mean).sqrt()) @ vectors.T


def fit(error: Tensor, rank: int, root: Tensor) -> tuple[Tensor, Tensor]:
    """Return down [rank, K] and up [N, rank] of least ||(error - up @ down) root||.

    The best projection of the error onto `rank` output directions: those of the largest singular values of error @ root,
    computed from the smaller Gram matrix.
    """
    weighted = _weighted(error, root)
    if weighted.shape[0] < weighted.shape[1]:
        # Ascending: the last are the largest.
        directions = torch.linalg.eigh(weighted @ weighted.T).eigenvectors[:, -rank:]
    else:
        directions = weighted @ torch.linalg.eigh(weighted.T @ weighted).eigenvectors[:, -rank:]
        directions = directions / directions.norm(dim=0).clamp_min(_TINY)
    down = directions.T @ error.double()
    # Factors of like size round best.
    norms = down.norm(dim=1).clamp_min(_TINY).sqrt()
    return (down / norms[:, None]).float(), (directions * norms).float()


def _weighted(error: Tensor, root: Tensor) -> Tensor:
    return error.double() * root if root.dim() == 1 else error.double() @ root


def _stored(matrix: Tensor, rank: int, root: Tensor) -> tuple[Tensor, Tensor]:
    down, up = fit(matrix, rank, root)
    return down.to(STORED), up.to(STORED)


def _product(down: Tensor, up: Tensor) -> Tensor:
    return up.float() @ down.float()
