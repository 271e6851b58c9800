"""Fit a low-rank correction of a quantized matrix: W is stored as packed rows plus up @ down, in 16 bit, of rank r.

The idea is SVDQuant's (arXiv 2411.05007): what the type does worst is left to a product of thin matrices. Two starts are
tried: the product takes the largest directions of W, and the type what is left (SVDQuant's); or the type comes first, and the
product takes the largest directions of its error. "Largest" is as the layer's inputs see it: the truncated singular value
decomposition with columns weighted by the root of their importance.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

STORED = torch.bfloat16  # dtype of both factors, as `file_layout.RANK_TYPE`
TURNS = 2  # of quantizing what the product leaves and fitting the product anew, from each start; the best one counts
_FLOOR = 1e-3  # least importance of a column, relative to the mean: an unseen column's error is small, not free


def corrected(
    weight: Tensor, round_trip: Callable[[Tensor], Tensor], rank: int, importance: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a matrix with a low-rank correction.

    Args:
        weight: float32 [N, K].
        round_trip: quantizes and decodes a matrix of that shape.
        rank: of the correction, at most min(N, K).
        importance: [K], mean squares of the inputs; None counts all alike.

    Returns:
        The decoded matrix [N, K] in float32, down [rank, K] and up [N, rank] rounded to STORED; their sum
        decoded + up @ down is what the layer computes with.
    """
    scale = torch.ones_like(weight[0]) if importance is None else importance.to(weight.device).float()
    scale = (scale + _FLOOR * scale.mean().clamp_min(torch.finfo(torch.float32).tiny)).sqrt()
    best, least = None, float("inf")
    for product in (torch.zeros_like(weight), _product(*_stored(weight, rank, scale))):
        for _ in range(TURNS):
            decoded = round_trip(weight - product)
            down, up = _stored(weight - decoded, rank, scale)
            product = _product(down, up)
            error = ((weight - decoded - product) * scale).square().sum(dtype=torch.float64).item()
            if error < least:
                best, least = (decoded, down, up), error
    return best


def _stored(matrix: Tensor, rank: int, scale: Tensor) -> tuple[Tensor, Tensor]:
    down, up = fit(matrix, rank, scale)
    return down.to(STORED), up.to(STORED)


def _product(down: Tensor, up: Tensor) -> Tensor:
    return up.float() @ down.float()


def fit(error: Tensor, rank: int, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return down [rank, K] and up [N, rank] of least ||(error - up @ down) * scale||, from the smaller Gram matrix."""
    scaled = (error * scale).double()
    wide = scaled.shape[0] < scaled.shape[1]
    gram = scaled @ scaled.T if wide else scaled.T @ scaled
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:]  # ascending: the last are the largest
    up, down = (vectors, vectors.T @ scaled) if wide else (scaled @ vectors, vectors.T)
    # Factors of like size round best: the norms of each pair are balanced.
    norms = (up.norm(dim=0) / down.norm(dim=1).clamp_min(1e-300)).sqrt().clamp_min(1e-150)
    return (down * norms[:, None] / scale).float(), (up / norms).float()
