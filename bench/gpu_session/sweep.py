"""Sweep the rows of x: fused in registers, split over K, and two-stage, beside cuBLAS; the switch between them follows from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle

import torch
import torch.nn.functional as F

from bench.gpu_session.predict import modelled_ms, product_ms, two_stage_ms
from bench.gpu_session.session import Session
from bench.gpu_session.timing import Case, time_cases
from bench.gpu_session.two_stage import FORMAT_NAMES
from flux_kernels.formats import FORMATS, Packed
from flux_kernels.kernels import exact, two_stage
from flux_kernels.kernels.choice import Choice
from flux_kernels.kernels.launching import capability_of
from flux_kernels.kernels.tiles import Tile, fused_tile, split_k_tile

KEY = ("format", "m", "n", "k", "algorithm", "tile")
_ROWS = (17, 32, 64, 128, 256, 512, 1024, 4608)
_SHAPES = ((3072, 3072), (12288, 3072), (3072, 12288))
_SPLITS, _MOST_SPLIT_ROWS = (2, 4), 512
_FUSED = 0.7  # of cuBLAS's speed, where the model has no row: issue slots of the decode on a Hopper


def run(session: Session) -> None:
    """Write sweep.csv."""
    table = session.table("sweep", KEY)
    for n, k in _SHAPES:
        for format in FORMAT_NAMES:
            for m in _ROWS:
                if session.late():
                    return
                time_cases(session, table, list(_cases(session, format, m, n, k)))


def _cases(session: Session, format: str, m: int, n: int, k: int) -> Iterator[Case]:
    fmt, rates, x, bias = FORMATS[format], session.rates, session.activations(m, k), session.bias(n)
    weights = session.weights(format, n, k)
    capability = capability_of(session.device)
    dense = two_stage.unpack(weights[0], x.dtype)
    shape = dict(format=format, m=m, n=n, k=k)
    plain = product_ms(rates, m, n, k)
    yield Case(shape | dict(algorithm="torch", tile=""), lambda: F.linear(x, dense, bias), plain)
    tile = fused_tile(fmt, m, n, k, capability)
    tried: list[tuple[str, Tile | None]] = [("two_stage", None), ("fused", tile)]
    if m <= _MOST_SPLIT_ROWS:
        wide = split_k_tile(fmt, m, n, k, capability)
        tried += [("split_k", replace(wide, splits=splits)) for splits in _SPLITS]
    for algorithm, used in tried:
        choice = Choice(algorithm, used, "swept")
        rough = two_stage_ms(rates, format, m, n, k) if used is None else plain / _FUSED
        predicted = modelled_ms(rates, "exact", format, m, n, k, choice) or rough
        call = exact_call(x, weights, bias, choice)
        yield Case(shape | dict(algorithm=algorithm, tile=str(used or "")), call, predicted)


def exact_call(x, weights: list[Packed], bias, choice: Choice) -> Callable[[], object]:
    """Return one call of exact mode by a given choice, on weights that take turns."""
    turns = cycle(weights)

    def call() -> torch.Tensor:
        y = torch.empty(x.shape[0], weights[0].n, dtype=x.dtype, device=x.device)
        exact.linear(x, next(turns), bias, y, choice=choice)
        return y

    return call
