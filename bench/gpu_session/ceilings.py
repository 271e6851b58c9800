"""Measure what the card can do: copies, reads, and torch's products at true shapes in three dtypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench.gpu_session.predict import moved_ms, product_ms
from bench.gpu_session.session import Session
from bench.gpu_session.timing import Case, time_groups
from flux_kernels.compute import WEIGHT_ONLY_M
from flux_kernels.models.calls import step_calls

_BYTES = 1 << 30
KEY = ("what", "m", "n", "k")


def shapes() -> list[tuple[int, int, int]]:
    """Return (M, N, K) of a 1024 x 1024 step's calls of many rows, each once."""
    return list(dict.fromkeys((call.m, call.n, call.k) for call in step_calls() if call.m > WEIGHT_ONLY_M))


def run(session: Session) -> None:
    """Write ceilings.csv."""
    table, rates = session.table("ceilings", KEY), session.rates
    source = torch.empty(_BYTES >> 3 if session.dry else _BYTES, dtype=torch.uint8, device=session.device)
    target = torch.empty_like(source)
    # A kernel: captured, copy_ is a slower memcpy node.
    words, copied = source.view(torch.int32), target.view(torch.int32)
    memory = [
        Case(dict(what="copy", m="", n="", k=""), lambda: torch.bitwise_not(words, out=copied), moved_ms(rates, 2 * _BYTES)),
        Case(dict(what="read", m="", n="", k=""), lambda: torch.amax(words, 0), moved_ms(rates, _BYTES)),
    ]
    time_groups(session, table, [memory])
    time_groups(session, table, (_products(session, m, n, k) for m, n, k in shapes()))


def _products(session: Session, m: int, n: int, k: int) -> list[Case]:
    rates = session.rates
    x, w, bias = session.activations(m, k), session.activations(n, k), session.bias(n)
    x8, w8 = (torch.empty(rows, k, dtype=torch.int8, device=session.device) for rows in (m, n))
    scales = torch.ones(m, 1, device=session.device), torch.ones(1, n, device=session.device)
    if not session.dry:
        x8, w8 = (torch.randint_like(codes, -127, 128) for codes in (x8, w8))
    fx, fw = (operand.to(torch.float8_e4m3fn) for operand in (x, w)) if not session.dry else (x8, w8)

    def fp8():
        return torch._scaled_mm(fx, fw.T, scale_a=scales[0], scale_b=scales[1], out_dtype=torch.bfloat16, use_fast_accum=True)

    shape = dict(m=m, n=n, k=k)
    return [
        Case(dict(what="bf16 with bias", **shape), lambda: F.linear(x, w, bias), product_ms(rates, m, n, k)),
        Case(dict(what="int8 _int_mm", **shape), lambda: torch._int_mm(x8, w8.T), product_ms(rates, m, n, k, speed=1.5)),
        Case(dict(what="fp8 _scaled_mm rows", **shape), fp8, product_ms(rates, m, n, k, speed=1.6)),
    ]
