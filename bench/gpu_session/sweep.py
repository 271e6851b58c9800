"""Sweep the rows of x in exact mode by every algorithm, against cuBLAS: it decides the switches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle

import torch
import torch.nn.functional as F

from bench.gpu_session.predict import modelled_ms, moved_ms, product_ms, read_ms, two_stage_ms
from bench.gpu_session.session import Session
from bench.gpu_session.timing import Case, time_groups
from bench.gpu_session.two_stage import FORMAT_NAMES
from flux_kernels.compute import capability_of
from flux_kernels.formats import FORMATS, Packed
from flux_kernels.kernels import exact, two_stage
from flux_kernels.kernels.choice import Choice, candidates, choose
from flux_kernels.kernels.problem import Call
from flux_kernels.kernels.tiles import Tile, fused_tile, split_k_tile

KEY = ("format", "m", "n", "k", "algorithm", "tile")
_ROWS = (17, 32, 64, 128, 256, 512, 1024, 4608)
_SHAPES = ((3072, 3072), (12288, 3072), (3072, 12288))
_SPLITS, _MOST_SPLIT_ROWS = (2, 4), 512
# Of cuBLAS's speed, where the model has no row: issue slots of the decode on a Hopper
_FUSED = 0.7
_FEW_ROWS, _FEW_SHAPE = (1, 2, 4, 8), (18432, 3072)


def run(session: Session) -> None:
    """Write sweep.csv: fused in registers, split over K, and two-stage."""
    calls = ((format, m, n, k) for n, k in _SHAPES for format in FORMAT_NAMES for m in _ROWS)
    time_groups(session, session.table("sweep", KEY), (_cases(session, *call) for call in calls))


def run_small_m(session: Session) -> None:
    """Write small_m.csv: the kernels for one to eight rows, over the tiles that tuning tries."""
    calls = ((format, m) for m in _FEW_ROWS for format in (FORMAT_NAMES if m == 1 else FORMAT_NAMES[:1]))
    time_groups(session, session.table("small_m", KEY), (_few_rows(session, *call, *_FEW_SHAPE) for call in calls))


def _cases(session: Session, format: str, m: int, n: int, k: int) -> Iterator[Case]:
    fmt, rates, x, bias = FORMATS[format], session.rates, session.activations(m, k), session.bias(n)
    weights = session.weights(format, n, k)
    capability = capability_of(session.device)
    dense = two_stage.unpack(weights[0], x.dtype)
    shape = dict(format=format, m=m, n=n, k=k)
    plain = product_ms(rates, m, n, k)
    yield Case(shape | dict(algorithm="torch", tile=""), lambda: F.linear(x, dense, bias), plain)
    tried: list[tuple[str, Tile | None]] = [("two_stage", None), ("fused", fused_tile(fmt, m, n, k, capability))]
    if m <= _MOST_SPLIT_ROWS:
        wide = split_k_tile(fmt, m, n, k, capability)
        tried += [("split_k", replace(wide, splits=splits)) for splits in _SPLITS]
    for algorithm, tile in tried:
        choice = Choice(algorithm, tile, "swept")
        rough = two_stage_ms(rates, format, m, n, k) if tile is None else plain / _FUSED
        predicted = modelled_ms(rates, "exact", format, m, n, k, choice) or rough
        yield Case(shape | dict(algorithm=algorithm, tile=str(tile or "")), exact_call(x, weights, bias, choice), predicted)


def _few_rows(session: Session, format: str, m: int, n: int, k: int) -> Iterator[Case]:
    x, bias, weights = session.activations(m, k), session.bias(n), session.weights(format, n, k)
    fmt, shape = FORMATS[format], dict(format=format, m=m, n=n, k=k)
    floor = read_ms(session.rates, format, n, k)
    dense = session.activations(n, k)
    yield Case(shape | dict(algorithm="torch", tile=""), lambda: F.linear(x, dense, bias), moved_ms(session.rates, 2 * n * k))
    shipped = choose("exact", fmt, m, n, k, session.device)
    yield Case(shape | dict(algorithm="shipped", tile=str(shipped)), exact_call(x, weights, bias, shipped), floor)
    processors = torch.cuda.get_device_properties(session.device).multi_processor_count
    for algorithm, tile, _ in candidates("exact", Call(fmt, m, n, k, capability_of(session.device), processors)):
        # One kernel decodes each weight, another multiplies codes on the tensor cores.
        if algorithm == "small_m":
            call = exact_call(x, weights, bias, Choice("small_m", tile, "swept"))
            yield Case(shape | dict(algorithm=f"small_m of {tile.block_m}", tile=str(tile)), call, floor)


def exact_call(x, weights: list[Packed], bias, choice: Choice) -> Callable[[], object]:
    """Return one call of exact mode by a given choice, on weights that take turns."""
    turns = cycle(weights)

    def call() -> torch.Tensor:
        y = torch.empty(x.shape[0], weights[0].n, dtype=x.dtype, device=x.device)
        exact.linear(x, next(turns), bias, y, choice=choice)
        return y

    return call
