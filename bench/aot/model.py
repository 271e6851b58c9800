"""The model behind `bench.aot.predict`: what the busiest pipe of a compiled kernel would need, were nothing else in the way.

It needs neither typer nor rich, so that `bench.calibrate` can put its predictions beside measurements on a bare GPU machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from flux_kernels.compute import GROUP, WEIGHT_ONLY_M
from flux_kernels.flux.calls import Call, step_calls

KERNEL = {"exact": "fused_gemm", "fp16_accumulate": "fp16_gemm", "int8": "int8_gemm"}


@dataclass(frozen=True)
class Model:
    """Hold one product: multiprocessors, boost clock in GHz, dense bf16 peak in TFLOP/s and memory in GB/s, as its vendor states."""

    name: str
    capability: int
    processors: int
    ghz: float
    bf16_tflops: float
    memory_gb_s: float


# Vendors' data sheets and whitepapers.
MODELS = (
    Model("RTX 3090", 86, 82, 1.695, 71.2, 936),
    Model("RTX 4090", 89, 128, 2.52, 165.2, 1008),
    Model("RTX 5090", 120, 170, 2.407, 209.5, 1792),
)


def predict(model: Model, mode: str, format: str, rows: list[dict]) -> dict:
    """Predict the linears of one 1024 x 1024 step of FLUX.1-dev in a mode: milliseconds, and the pipe that decides."""
    kernel = kernel_of(model, mode, format, rows)
    busiest = busiest_pipe(kernel)
    total = sum(call.calls * call_ms(model, mode, format, call, kernel) for call in step_calls())
    baseline = sum(
        call.calls * max(call.flops / model.bf16_tflops / 1e9, 2 * call.n * call.k / model.memory_gb_s / 1e6)
        for call in step_calls()
    )
    return dict(
        card=model.name,
        format=format,
        compute=mode,
        predicted_ms=round(total, 1),
        bf16_peak_ms=round(baseline, 1),
        ratio=round(baseline / total, 2),
        busiest_pipe=busiest,
        triton=kernel["triton"],
        tile=kernel["tile"],
    )


def kernel_of(model: Model, mode: str, format: str, rows: list[dict]) -> dict:
    """Return the row of the record that a mode runs on large M.

    Raises:
        LookupError: where the record has none.
    """
    for row in rows:
        if _is(row, KERNEL[mode], "int8" if mode == "int8" else format, model):
            return row
    raise LookupError(f"the record has no {KERNEL[mode]} of {format} for capability {model.capability}")


def call_ms(model: Model, mode: str, format: str, call: Call, kernel: dict) -> float:
    """Predict the milliseconds of one call: full waves of programs on the busiest pipe, or for one row reading the weight."""
    if call.m <= WEIGHT_ONLY_M:
        return _read_ms(call, format, model)
    block_m, block_n, tile_k = (int(size) for size in kernel["tile"].split()[0].split("x"))
    step, per_sm = GROUP if mode == "int8" else tile_k, max(1, int(kernel["programs_per_sm"]))
    waves = ceil(ceil(call.m / block_m) * ceil(call.n / block_n) / (model.processors * per_sm)) * per_sm
    product = waves * call.k / step * int(kernel[f"{busiest_pipe(kernel)}_clocks"]) / (model.ghz * 1e6)
    return product + (_around_ms(call, format, model) if mode == "int8" else 0.0)


def busiest_pipe(kernel: dict) -> str:
    """Name the pipe that needs the most clocks."""
    return max(("tensor", "issue", "int", "convert"), key=lambda pipe: int(kernel[f"{pipe}_clocks"]))


def _is(row: dict, kernel: str, format: str, model: Model) -> bool:
    wide = kernel != "fused_gemm" or row["tile"].startswith(("128x", "64x128"))
    return (row["kernel"], row["format"], row["capability"], row["dtype"]) == (
        kernel,
        format,
        str(model.capability),
        "bf16",
    ) and wide


def _read_ms(call: Call, format: str, model: Model) -> float:
    """Return the time of reading a packed weight once."""
    from flux_kernels.formats import FORMATS

    return call.n * FORMATS[format].row_bytes(call.k) / model.memory_gb_s / 1e6


def _around_ms(call: Call, format: str, model: Model) -> float:
    """Return the memory time around an int8 product: the activation read in 16 bit and written in 8, the packed weight read."""
    return 3 * call.m * call.k / model.memory_gb_s / 1e6 + _read_ms(call, format, model)
