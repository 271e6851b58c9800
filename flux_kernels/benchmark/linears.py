"""Time linear calls against each other, each provider only where its result passes the correctness gate in the same run."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..clock import interleaved, percentiles
from ..formats import FORMATS
from ..random_rows import random_rows
from . import peers  # noqa: F401 - registers the other libraries
from .ceilings import Ceilings, cache_flusher
from .providers import PROVIDERS, Problem, Unavailable
from .shapes import Call

_MEASURED = ("p20_ms", "p50_ms", "p80_ms", "tflops", "packed_gb_s", "share_of_matmul", "share_of_copy")
_ORACLE_ROWS, _ORACLE_COLUMNS = 64, 256


def make_problem(name: str, call: Call, device: torch.device, dtype: torch.dtype) -> Problem:
    """Make random packed rows with plausible scales, and a random bias."""
    fmt = FORMATS[name]
    planes = fmt.planes and device.type != "cpu"
    data = random_rows(fmt, call.n, call.k, planes, seed=call.n + call.k)
    bias = torch.randn(call.n, generator=torch.Generator().manual_seed(call.n))
    return Problem(data.to(device), planes, fmt, bias.to(device, dtype), dtype)


def relative_error(y: Tensor, x: Tensor, problem: Problem) -> float:
    """Return the relative RMS error of some outputs against float64 on the float32 weights."""
    rows = torch.linspace(0, x.shape[0] - 1, min(_ORACLE_ROWS, x.shape[0])).long().to(x.device)
    columns = slice(0, _ORACLE_COLUMNS)
    weight = reference.dequantize(problem.data[columns], problem.fmt, torch.float32, problem.planes).double()
    oracle = x[rows].double() @ weight.T + problem.bias[columns].double()
    return ((y[rows, columns].double() - oracle).norm() / oracle.norm()).item()


def measure(
    name: str,
    call: Call,
    providers: list[str],
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    ceilings: Ceilings | None = None,
):
    """Yield a row for each provider of one format and call; on a GPU the L2 cache is emptied before each timed run."""
    problem = make_problem(name, call, device, dtype)
    x = torch.randn(call.m, call.k, dtype=torch.float32, device=device).to(dtype)
    functions, notes, errors = {}, {}, {}
    for provider in providers:
        try:
            function, gate = PROVIDERS[provider].make(problem), PROVIDERS[provider].gate
            errors[provider] = relative_error(function(x), x, problem)
            if errors[provider] <= gate:
                functions[provider] = lambda function=function: function(x)
            else:
                notes[provider] = f"wrong result: relative error {errors[provider]:.2g}, at most {gate}"
        except Unavailable as error:
            notes[provider] = str(error)
        except torch.OutOfMemoryError:
            notes[provider] = "out of memory"
        except Exception as error:  # a peer's failure is a result: it becomes the row's note
            if PROVIDERS[provider].group not in ("peer", "base"):
                raise
            notes[provider] = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    times = interleaved(functions, repeats, device, cache_flusher(device))
    for provider in providers:
        yield _row(name, call, provider, times.get(provider), errors.get(provider), notes.get(provider, ""), problem, ceilings)


def _row(name, call, provider, times, error, note, problem, ceilings) -> dict:
    row = dict(
        format=name,
        provider=provider,
        m=call.m,
        n=call.n,
        k=call.k,
        calls=call.calls,
        where=call.where,
        dtype=str(problem.dtype)[6:],
    )
    if times is None:
        return row | dict.fromkeys(_MEASURED, "") | dict(error=error, note=note)
    p20, p50, p80 = percentiles(times)
    speeds = dict(tflops=round(call.flops / p50 / 1e9, 2), packed_gb_s=round(problem.data.numel() / p50 / 1e6, 1))
    shares = dict.fromkeys(("share_of_matmul", "share_of_copy"), "")
    if ceilings is not None:
        size = problem.dtype.itemsize
        weight = size * call.n * call.k if provider == "torch" else problem.data.numel()
        shares = ceilings.shares(p50, call.flops, weight + size * call.m * (call.k + call.n))
        if PROVIDERS[provider].own_weights:  # how many bytes those are is not known here
            shares["share_of_copy"] = ""
    speeds |= shares
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
            beside = f", {totals['torch'] / total:5.2f} x torch" if "torch" in totals else ""
            lines.append(f"{name:8} {provider:22} {total:10.1f} ms a step{beside}")
    return "\n".join(lines)
