"""Rows as `linears.measure` and `whole_step.measure_steps` make them, with times of our choice."""

from __future__ import annotations

from flux_kernels.benchmark.ceilings import Ceilings
from flux_kernels.benchmark.session import Found
from flux_kernels.models.calls import step_calls

ORIGIN = dict(
    device="a <card> & more", capability="8.9", driver="600", torch="2.13", triton="3.7", commit="abc", date="2026-01-02"
)
SIZE = "1024x1024"
CEILINGS = Ceilings(copy_gb_s=900.0, matmul_tflops=160.0, dtype="bfloat16")
SPEEDS = {"torch": 1.0, "diffusers": 0.5, "ours exact": 0.9, "ours int8": 2.0, "bitsandbytes nf4": 0.6}


def linear_rows(name: str = "Q4_K", speeds=SPEEDS, spread: float = 0.01) -> list[dict]:
    """Make the rows of one step: every call at a speed beside torch's, which does 100 TFLOP/s."""
    rows = []
    for call in step_calls():
        for provider, speed in speeds.items():
            middle = call.flops / (100e9 * speed)
            rows.append(
                dict(format=name, size=SIZE, provider=provider, m=call.m, n=call.n, k=call.k, calls=call.calls)
                | dict(where=call.where, dtype="bfloat16", p20_ms=f"{middle * (1 - spread):.6f}", p50_ms=f"{middle:.6f}")
                | dict(p80_ms=f"{middle * (1 + spread):.6f}", tflops=100 * speed, packed_gb_s=12.5)
                | dict(share_of_matmul=0.625 * speed, share_of_copy=0.1, error="0.002", max_error="0.01", note="")
                | ORIGIN
            )
    return rows


def step_row(provider: str, milliseconds: float | str, weights: float, what: str = "step", **more) -> dict:
    """Make the row of a whole run."""
    times = dict.fromkeys(("p20_ms", "p50_ms", "p80_ms"), "")
    if milliseconds:
        times = dict(p20_ms=str(milliseconds * 0.99), p50_ms=str(milliseconds), p80_ms=str(milliseconds * 1.01))
    row = dict(format="Q4_K", provider=provider, what=what, size=SIZE) | times
    row |= dict(peak_bytes=int(weights * 1.2e9), weight_bytes=int(weights * 1e9), error="0.004", note="")
    return row | ORIGIN | more


def found() -> Found:
    """Make what a run on a card could have found."""
    failed = dict(p20_ms="", p50_ms="", p80_ms="", tflops="", share_of_matmul="", share_of_copy="")
    missing = linear_rows(speeds={"sdnq int8": 1.0})[0] | failed | dict(error="", max_error="", note="not installed (<sdnq>)")
    steps = [step_row("torch", 400.0, 23.8), step_row("ours exact", 412.0, 6.8), step_row("ours int8", 200.0, 6.8)]
    return Found(ORIGIN, CEILINGS, [*linear_rows(), *linear_rows("Q8_0"), missing], steps)
