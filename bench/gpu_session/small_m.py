"""Sweep the kernel for one to eight rows over the tiles that tuning tries; a graph holds as many calls as a step has modulation layers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench.gpu_session.predict import moved_ms, read_ms
from bench.gpu_session.session import Session
from bench.gpu_session.sweep import exact_call
from bench.gpu_session.timing import Case, time_cases
from bench.gpu_session.two_stage import FORMAT_NAMES
from flux_kernels.formats import FORMATS
from flux_kernels.kernels.choice import Choice, choose
from flux_kernels.kernels.launching import capability_of
from flux_kernels.machine.candidates import Call, candidates

KEY = ("format", "m", "n", "k", "algorithm", "tile")
_SHAPE = (18432, 3072)
_ROWS = (1, 2, 4, 8)


def run(session: Session) -> None:
    """Write small_m.csv."""
    table = session.table("small_m", KEY)
    for m in _ROWS:
        for format in FORMAT_NAMES if m == 1 else FORMAT_NAMES[:1]:
            if session.late():
                return
            time_cases(session, table, list(_cases(session, format, m, *_SHAPE)))


def _cases(session: Session, format: str, m: int, n: int, k: int) -> Iterator[Case]:
    x, bias, weights = session.activations(m, k), session.bias(n), session.weights(format, n, k)
    fmt, shape = FORMATS[format], dict(format=format, m=m, n=n, k=k)
    floor = read_ms(session.rates, format, n, k)
    dense = session.activations(n, k)
    yield Case(shape | dict(algorithm="torch", tile=""), lambda: F.linear(x, dense, bias), moved_ms(session.rates, 2 * n * k))
    shipped = choose("exact", fmt, m, n, k, session.device)
    yield Case(shape | dict(algorithm="shipped", tile=str(shipped)), exact_call(x, weights, bias, shipped), floor)
    processors = torch.cuda.get_device_properties(session.device).multi_processor_count
    for algorithm, tile, _ in candidates("exact", Call(fmt, m, n, k, capability_of(session.device), processors)):
        if algorithm == "small_m":  # one kernel decodes each weight, another multiplies codes on the tensor cores
            call = exact_call(x, weights, bias, Choice("small_m", tile, "swept"))
            yield Case(shape | dict(algorithm=f"small_m of {tile.block_m}", tile=str(tile)), call, floor)
