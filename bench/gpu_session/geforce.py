"""Time GeForce code here, from its PTX: does decoding hide behind products of mma.sync?

The times say nothing of a GeForce. They say whether the compile-time model is right about such code, at this card's clock, with this
card's rate of mma.sync: between its bound and "programs wait" lies whether fused decoding or unpacking is the better default there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import cycle

import torch.nn.functional as F

from bench.aot import model as compile_time
from bench.aot.cards import CARDS as LIMITS
from bench.aot.cards import CONVERT_RATES, occupancy
from bench.gpu_session.predict import case_ms, product_ms
from bench.gpu_session.session import Session
from bench.gpu_session.sweep import exact_call
from bench.gpu_session.timing import Case, time_groups
from bench.record import AOT, read_csv
from bench.stand_in import CARDS
from bench.stand_in_ptx import compiled_for
from flux_kernels import kernels
from flux_kernels.kernels import two_stage
from flux_kernels.kernels.choice import Choice, default_choice, tile_of

KEY = ("card", "compute", "format", "m", "n", "k", "algorithm", "tile")
_CARDS = ("RTX 3090", "RTX 4090")
_FORMATS = ("Q4_K", "Q6_K", "Q8_0")
_SHAPES = ((512, 12288, 3072), (4608, 12288, 3072))
# How many times as fast as on GeForce mma.sync is here, if it runs as on an A100: 16-bit products with float32 sums, others.
_FP32_SUMS, _OTHERS = 4, 2


def run(session: Session) -> None:
    """Write geforce.csv: times, the model's bound (predicted_ms) and its time with waits."""
    table = session.table("geforce", KEY)
    for m, n, k in _SHAPES:
        for format in _FORMATS[:1] if session.reduced else _FORMATS:
            for card in _CARDS:
                with compiled_for(CARDS[card]):
                    time_groups(session, table, [_cases(session, card, format, m, n, k)])


def _cases(session: Session, card: str, format: str, m: int, n: int, k: int) -> Iterator[Case]:
    x, bias, weights = session.activations(m, k), session.bias(n), session.weights(format, n, k)
    fmt = weights[0].fmt
    capability = CARDS[card].capability
    shape = dict(card=card, format=format, m=m, n=n, k=k)
    dense, turns = two_stage.unpack(weights[0], x.dtype), cycle(weights)
    torch_key = shape | dict(compute="torch", algorithm="", tile="", waiting_ms="")
    yield Case(torch_key, lambda: F.linear(x, dense, bias), product_ms(session.rates, m, n, k))

    def case(mode: str, choice: Choice, call: Callable[[], object]) -> Case:
        bound, waiting = (predicted_ms(mode, format, m, n, k, capability, choice, waits) for waits in (False, True))
        key = dict(
            compute=mode, algorithm=choice.algorithm, tile=str(choice.tile), waiting_ms=f"{waiting:.5f}" if waiting else ""
        )
        return Case(shape | key, call, bound)

    fused = Choice("fused", tile_of("fused", fmt, m, n, k, capability), "named")
    yield case("exact", fused, exact_call(x, weights, bias, fused))
    for mode in ("fp16_accumulate", "int8"):
        choice = default_choice(mode, fmt, m, n, k, capability, x.dtype, False, session.rates.processors)
        yield case(mode, choice, lambda mode=mode: kernels.linear(x, next(turns), bias, mode))


def predicted_ms(
    mode: str, format: str, m: int, n: int, k: int, capability: tuple[int, int], choice: Choice, waits: bool = False
) -> float | None:
    """Predict a call of another card's code at an H200's clock and memory; None without a record."""
    major, minor = capability
    card = replace(compile_time.H200_MEASURED, capability=10 * major + minor)
    case = compile_time.Case(card, _record(), format, convert_rate=min(CONVERT_RATES), waits=waits)
    return case_ms(case, mode, m, n, k, choice)


@cache
def _record() -> compile_time.Record:
    return compile_time.Record([_translated(row) for row in read_csv(AOT)])


def _translated(row: dict) -> dict:
    """Return a row of GeForce code as it would run here: at mma.sync's rate, with this card's room."""
    if row["capability"] not in ("86", "89") or int(row["tensor_clocks"]) == 0:
        return row
    speed = _OTHERS if row["kernel"].startswith(("fp16_gemm", "int8_gemm")) else _FP32_SUMS
    threads = 32 * int(row["tile"].split(" warps ")[1].split()[0])
    room = occupancy(LIMITS[90], int(row["registers"]), int(row["shared_bytes"]), threads)
    return row | dict(tensor_clocks=round(int(row["tensor_clocks"]) / speed), programs_per_sm=max(1, room))
