"""Ablate int8: each kernel alone, the product by kind of scales and tile, and its rivals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_session.plain_int8 import plain_int8
from bench.gpu_session.predict import modelled_ms, moved_ms, product_ms, read_ms
from bench.gpu_session.session import Session
from bench.gpu_session.timing import Case, time_groups
from flux_kernels import kernels
from flux_kernels.compute import group_width
from flux_kernels.formats import FORMATS
from flux_kernels.kernels import int8
from flux_kernels.kernels.chunks import waves
from flux_kernels.kernels.problem import Problem
from flux_kernels.kernels.tiles import Tile

KEY = ("what", "format", "m", "n", "k", "scales", "tile")
_SHAPES = ((4608, 3072, 3072), (4608, 12288, 3072), (4608, 3072, 15360))
_TILES = tuple(
    Tile(block_m, block_n, 128, warps, stages)
    for block_m, block_n, warps in ((128, 128, 8), (128, 128, 4), (64, 128, 4), (128, 64, 4), (64, 64, 4))
    for stages in (3, 4)
)
# Without scales there is room for larger sums and longer steps.
_PLAIN_TILES = (Tile(128, 256, 128, 8, 3), Tile(256, 128, 128, 8, 3), Tile(128, 256, 128, 8, 4), Tile(128, 128, 256, 8, 3))
# Clocks of a multiprocessor for a 128 x 128 x 128 step as an H200 took them (bench/results/nvidia-h200/int8.csv, 128 x 128 tiles of 8 warps
# at N = 12288), where 512, 956 and 1,300 had been read off the machine code.
_CLOCKS = {"none": 724, "rows": 1475, "groups": 1817}
_GHZ = 1.755
_FORMAT = "Q4_K"


def run(session: Session) -> None:
    """Write int8.csv."""
    groups = (cases(session, *shape) for shape in _SHAPES for cases in (_pieces, _whole, _products))
    time_groups(session, session.table("int8", KEY), groups)


def product_clock_ms(session: Session, m: int, n: int, k: int, scales: str) -> float:
    """Predict the int8 product by the clocks of its loop and whole waves of tiles."""
    return waves(m, n, None, session.rates.processors) * (k / 128) * _CLOCKS[scales] / _GHZ / 1e6


def _key(what: str, m: int, n: int, k: int, scales: str = "", tile: Tile | str = "") -> dict:
    return dict(what=what, format=_FORMAT, m=m, n=n, k=k, scales=scales, tile=str(tile))


def _pieces(session: Session, m: int, n: int, k: int) -> Iterator[Case]:
    rates = session.rates
    x, turns, group = session.activations(m, k), cycle(session.weights(_FORMAT, n, k)), group_width(k)
    written = read_ms(rates, _FORMAT, n, k) + moved_ms(rates, n * k)
    yield Case(_key("quantize x", m, n, k), lambda: int8.quantize_activation(x, group), moved_ms(rates, 3 * m * k))
    problem = _problem(session, m, n, k)
    unpack_groups, unpack_rows = (int8._unpacking(problem, n, group, rowwise) for rowwise in (False, True))
    scale = int8.row_scale(next(turns))
    read = read_ms(rates, _FORMAT, n, k)
    yield Case(_key("row scale, once a layer", m, n, k), lambda: int8.row_scale(next(turns)), read)
    yield Case(_key("unpack w", m, n, k, "groups"), lambda: unpack_groups(next(turns)), written)
    yield Case(_key("unpack w", m, n, k, "rows"), lambda: unpack_rows(next(turns)._replace(row_scale=scale)), written)


def _problem(session: Session, m: int, n: int, k: int) -> Problem:
    fmt = FORMATS[_FORMAT]
    return Problem(m, n, k, k, fmt.row_bytes(k), fmt, fmt.planes, torch.bfloat16, None, 0, session.device)


def _whole(session: Session, m: int, n: int, k: int) -> Iterator[Case]:
    """Time the mode as shipped, and its rivals: bf16 and int8 products of torch's own."""
    rates = session.rates
    x, w, bias = session.activations(m, k), session.activations(n, k), session.bias(n)
    weights = session.weights(_FORMAT, n, k)
    x8, w8 = _codes(session, m, n, k)
    around = moved_ms(rates, 3 * m * k) + read_ms(rates, _FORMAT, n, k) + moved_ms(rates, n * k)
    shipped = modelled_ms(rates, "int8", _FORMAT, m, n, k) or product_clock_ms(session, m, n, k, "rows") + around
    # With their scales, as a layer keeps them.
    turns = cycle([weight._replace(row_scale=kernels.row_scale(weight, "int8")) for weight in weights])

    def layer() -> torch.Tensor:
        return kernels.linear(x, next(turns), bias, "int8")

    yield Case(_key("shipped", m, n, k), layer, shipped)
    yield Case(_key("bf16 torch", m, n, k), lambda: F.linear(x, w, bias), product_ms(rates, m, n, k))
    yield Case(_key("_int_mm", m, n, k, "none"), lambda: torch._int_mm(x8, w8.T), product_ms(rates, m, n, k, speed=1.5))


def _products(session: Session, m: int, n: int, k: int) -> Iterator[Case]:
    x8, w8 = _codes(session, m, n, k)
    group = group_width(k)
    x_scale = torch.ones(k // group, m, device=session.device)
    for scales, count in (("groups", k // group), ("rows", 1), ("none", 0)):
        w_scale = torch.ones(count, n, device=session.device)
        predicted = product_clock_ms(session, m, n, k, scales)
        for tile in _TILES if count else (*_TILES, *_PLAIN_TILES):
            call = product(_problem(session, m, n, k), x8, x_scale, w8, w_scale, tile)
            yield Case(_key("product", m, n, k, scales, tile), call, predicted)


def product(problem: Problem, x8: Tensor, x_scale: Tensor, w8: Tensor, w_scale: Tensor, tile: Tile) -> Callable[[], object]:
    """Return the int8 product alone: w_scale [K // group, N], [1, N] for rows, [0, N] for no scales."""
    if not w_scale.shape[0]:
        return lambda: plain_int8(x8, w8, tile)
    multiply = int8._multiplying(problem, problem.n, tile, w_scale.shape[0] == 1)

    def call() -> Tensor:
        y = torch.empty(problem.m, problem.n, dtype=torch.bfloat16, device=x8.device)
        multiply(x8, x_scale, w8, w_scale, None, None, None, y)
        return y

    return call


def _codes(session: Session, m: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    codes = tuple(torch.empty(rows, k, dtype=torch.int8, device=session.device) for rows in (m, n))
    return codes if session.dry else tuple(torch.randint_like(operand, -127, 128) for operand in codes)
