"""Ablate the two-stage path: rows at a time, where the bias is added, when scratch is freed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_session.ceilings import shapes
from bench.gpu_session.predict import product_ms, two_stage_ms
from bench.gpu_session.session import Session
from bench.gpu_session.timing import Case, time_groups
from flux_kernels import kernels
from flux_kernels.kernels import two_stage
from flux_kernels.kernels.chunks import chunks_of

FORMAT_NAMES = ("Q4_K", "Q6_K", "Q8_0")
KEY = ("format", "m", "n", "k", "rows", "bias", "scratch")
_TILE = 128
# Each chunk is unpacked on another stream while the chunk before is multiplied
_BESIDE = "beside"
_VARIANTS = (  # rows, bias, scratch
    ("whole", "none", "freed"),
    ("whole", "epilogue", "freed"),
    ("whole", "strided y", "freed"),
    ("half", "none", "freed"),
    ("half", "strided y", "freed"),
    ("third of L2", "none", "freed"),
    ("third of L2", "strided y", "freed"),
    ("third of L2", "strided y", "kept"),
    ("half", "none", _BESIDE),
    ("third of L2", "none", _BESIDE),
)


def run(session: Session) -> None:
    """Write two_stage.csv: M of 512 is left to the sweep."""
    calls = ((format, *shape) for format in FORMAT_NAMES for shape in shapes() if shape[0] > 512)
    time_groups(session, session.table("two_stage", KEY), (_cases(session, *call) for call in calls))


def _cases(session: Session, format: str, m: int, n: int, k: int) -> Iterator[Case]:
    rates, x, bias = session.rates, session.activations(m, k), session.bias(n)
    weights = session.weights(format, n, k)
    turns, shape = cycle(weights), dict(format=format, m=m, n=n, k=k)
    dense = two_stage.unpack(weights[0], x.dtype)
    right = F.linear(x, dense, bias)
    plain, shipped = (shape | dict(rows=rows, bias=bias, scratch="") for rows, bias in (("torch", "epilogue"), ("shipped", "")))
    yield Case(plain, lambda: F.linear(x, dense, bias), product_ms(rates, m, n, k))
    yield Case(shipped, lambda: kernels.linear(x, next(turns), bias, "exact"), two_stage_ms(rates, format, m, n, k), right)
    for rows, added, scratch in _VARIANTS:
        count = _rows(rows, n, k, torch.cuda.get_device_properties(session.device).L2_cache_size)
        if scratch == _BESIDE:
            call = _overlapped(x, turns, count)
        else:
            call = _variant(x, turns, bias if added != "none" else None, count, added == "strided y", scratch == "kept")
        predicted = two_stage_ms(rates, format, m, n, k, count, copied_bias=added == "strided y")
        yield Case(shape | dict(rows=rows, bias=added, scratch=scratch), call, predicted, right)


def _rows(name: str, n: int, k: int, l2_bytes: int) -> int | None:
    if name == "whole":
        return None
    if name == "half":
        return -(-n // (2 * _TILE)) * _TILE
    return max(1, l2_bytes // 3 // (2 * k) // _TILE) * _TILE


def _variant(x: Tensor, turns, bias: Tensor | None, rows: int | None, strided: bool, kept: bool) -> Callable:
    """Return one way to unpack and multiply; y is a column slice of a wider tensor where it is `strided`."""
    m = x.shape[0]

    def call() -> Tensor:
        packed = next(turns)
        n = packed.n
        y = torch.empty(m, n + _TILE if strided else n, dtype=x.dtype, device=x.device)[:, :n]
        before = None
        for chunk in chunks_of(n, rows):
            weight = two_stage.unpack(packed.rows(chunk), x.dtype)
            if bias is None:
                torch.mm(x, weight.T, out=y[:, chunk])
            else:
                torch.addmm(bias[chunk], x, weight.T, out=y[:, chunk])
            before = weight if kept else None
            del weight
        del before
        return y

    return call


def _overlapped(x: Tensor, turns, rows: int | None) -> Callable:
    """Return a way that unpacks every chunk but the first while the chunk before it is multiplied."""
    m, stream = x.shape[0], torch.cuda.Stream()

    def call() -> Tensor:
        packed = next(turns)
        y = torch.empty(m, packed.n, dtype=x.dtype, device=x.device)
        chunks = list(chunks_of(packed.n, rows))
        main, weights = torch.cuda.current_stream(), [two_stage.unpack(packed.rows(chunks[0]), x.dtype)]
        for chunk, after in zip(chunks, [*chunks[1:], None], strict=True):
            stream.wait_stream(main)
            torch.mm(x, weights[-1].T, out=y[:, chunk])
            if after is not None:
                with torch.cuda.stream(stream):
                    weights.append(two_stage.unpack(packed.rows(after), x.dtype))
            main.wait_stream(stream)
        return y

    return call
