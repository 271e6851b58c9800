"""Time every linear call of a FLUX.1-dev step: the plain model, decode-then-multiply, and this library in every mode.

    python -m bench.run --formats Q4_K,Q6_K,Q8_0 --write bench/results/linear.csv        # on a GPU
    python -m bench.run --scale 8 --repeats 3                                          # a small version for a CPU

A provider's speed is reported only where its result passes the correctness gate in the same run. Every row is written at once.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
from torch import Tensor

from bench.providers import PROVIDERS, Problem, Unavailable
from bench.record import origin
from flux_kernels.clock import interleaved, percentiles
from flux_kernels.flux.calls import STEPS, Call, step_calls
from flux_kernels.formats import FORMATS

# Relative RMS error against float64 that a mode may have on gaussian activations: bf16 rounds inputs and output to 2^-9 each.
GATES = {"int8": 0.025, "fp16_accumulate": 0.01}
GATE_EXACT = 0.01
_ORACLE_ROWS, _ORACLE_COLUMNS = 64, 256


def make_problem(name: str, call: Call, device: torch.device, dtype: torch.dtype) -> Problem:
    """Make random packed rows with sane scales: bytes are random, half-precision fields are set to about 1/64."""
    fmt = FORMATS[name]
    generator = torch.Generator().manual_seed(call.n + call.k)
    data = torch.randint(0, 256, (call.n, fmt.row_bytes(call.k)), dtype=torch.uint8, generator=generator)
    blocks = data.view(call.n, -1, fmt.type_size)
    for field in fmt.layout.fields:
        if field.dtype == "f16":
            start = fmt.layout.offsets[field.name]
            scale = torch.full((field.count,), 1 / 64, dtype=torch.float16).view(torch.uint8)
            blocks[..., start : start + field.size] = scale
    planes = fmt.planes and device.type != "cpu"
    data = fmt.layout.to_planes(data) if planes else data
    return Problem(data.to(device), planes, fmt, torch.randn(call.n, generator=generator).to(device, dtype), dtype)


def relative_error(y: Tensor, x: Tensor, problem: Problem) -> float:
    """Return the relative RMS error of some outputs against float64 on the float32 weights."""
    from flux_kernels import reference

    rows = torch.linspace(0, x.shape[0] - 1, min(_ORACLE_ROWS, x.shape[0])).long().to(x.device)
    columns = slice(0, _ORACLE_COLUMNS)
    weight = reference.dequantize(problem.data[columns], problem.fmt, torch.float32, problem.planes).double()
    oracle = x[rows].double() @ weight.T + problem.bias[columns].double()
    return ((y[rows, columns].double() - oracle).norm() / oracle.norm()).item()


def measure(name: str, call: Call, providers: list[str], device: torch.device, dtype: torch.dtype, repeats: int):
    """Yield a row for each provider of one format and call."""
    problem = make_problem(name, call, device, dtype)
    x = torch.randn(call.m, call.k, dtype=torch.float32, device=device).to(dtype)
    functions, notes, errors = {}, {}, {}
    for provider in providers:
        try:
            function = PROVIDERS[provider](problem)
            errors[provider] = relative_error(function(x), x, problem)
            gate = GATES.get(provider.removeprefix("ours "), GATE_EXACT)
            if errors[provider] <= gate:
                functions[provider] = lambda function=function: function(x)
            else:
                notes[provider] = f"wrong result: relative error {errors[provider]:.2g}, at most {gate}"
        except Unavailable as error:
            notes[provider] = str(error)
        except torch.OutOfMemoryError:
            notes[provider] = "out of memory"
    times = interleaved(functions, repeats, device)
    for provider in providers:
        yield _row(name, call, provider, times.get(provider), errors.get(provider), notes.get(provider, ""), problem, dtype)


def _row(name, call, provider, times, error, note, problem, dtype) -> dict:
    row = dict(
        format=name, provider=provider, m=call.m, n=call.n, k=call.k, calls=call.calls, where=call.where, dtype=str(dtype)[6:]
    )
    if times is None:
        return row | dict.fromkeys(("p20_ms", "p50_ms", "p80_ms", "tflops", "packed_gb_s"), "") | dict(error=error, note=note)
    p20, p50, p80 = percentiles(times)
    speeds = dict(tflops=round(call.flops / p50 / 1e9, 2), packed_gb_s=round(problem.data.numel() / p50 / 1e6, 1))
    return row | dict(p20_ms=f"{p20:.4f}", p50_ms=f"{p50:.4f}", p80_ms=f"{p80:.4f}", **speeds, error=f"{error:.3g}", note=note)


def summary(rows: list[dict]) -> str:
    """Return the time of a whole step's linears by format and provider, as a ratio to plain torch in the same run."""
    lines = []
    for name in dict.fromkeys(row["format"] for row in rows):
        totals: dict[str, float] = {}
        for provider in dict.fromkeys(row["provider"] for row in rows):
            mine = [row for row in rows if (row["format"], row["provider"]) == (name, provider)]
            if all(row["p50_ms"] for row in mine):
                totals[provider] = sum(float(row["p50_ms"]) * row["calls"] for row in mine)
        for provider, total in totals.items():
            lines.append(f"{name:8} {provider:22} {total:10.1f} ms a step, {totals['torch'] / total:5.2f} x torch")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, measure, and write every row as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="Q4_K,Q6_K,Q8_0")
    parser.add_argument("--providers", default=",".join(PROVIDERS))
    parser.add_argument("--step", default="1024x1024", choices=STEPS, help="picture size and batch")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--scale", type=int, default=1, help="divide M and N by this, for slow machines (rows say so by their shapes)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", type=Path, help="CSV to append rows to, each as soon as it is measured")
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    made_at, rows = origin(device), []
    for name in arguments.formats.split(","):
        for call in step_calls(**STEPS[arguments.step]):
            small = Call(max(1, call.m // arguments.scale), call.n // arguments.scale, call.k, call.calls, call.where)
            for row in measure(name, small, arguments.providers.split(","), device, dtype, arguments.repeats):
                rows.append(row)
                print(
                    f"{name:8} {row['m']:6} {row['n']:6} {row['k']:6} {row['provider']:22} {row['p50_ms']:>10} ms {row['note']}",
                    flush=True,
                )
                if arguments.write:
                    _append(arguments.write, row | made_at)
    print(summary(rows))


def _append(path: Path, row: dict) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row.keys(), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
