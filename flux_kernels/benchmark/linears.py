"""Time linear calls against each other, each provider only where it passes the gate in the same run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from statistics import median

import torch
from torch import Tensor

from ..compute import dtype_name
from ..formats import FORMATS
from ..machine.clock import cache_flusher, graph_replayed, interleaved, percentiles
from ..machine.random_rows import random_weight
from ..models.calls import Call
from ..torch_backend import reference
from ..version import installed_version
from . import peers  # noqa: F401 - registers the other libraries
from .ceilings import Ceilings
from .names import FAILED, OURS, TORCH, WRONG, wrong
from .providers import CANNOT_RUN, PROVIDERS, Problem, same_call, why
from .totals import MARKS, by_step, marked, totals

_TIMES = ("repeats", "p20_ms", "p50_ms", "p80_ms", "graph_ms")
_MEASURED = (*_TIMES, "tflops", "packed_gb_s", "share_of_matmul", "share_of_copy")
_ORACLE_ROWS, _ORACLE_COLUMNS = 64, 256


def make_problem(name: str, call: Call, device: torch.device, dtype: torch.dtype) -> Problem:
    """Make random packed rows with plausible scales, and a random bias."""
    fmt = FORMATS[name]
    weight = random_weight(fmt, call.n, call.k, fmt.planes and device.type != "cpu", seed=call.n + call.k, device=device)
    bias = torch.randn(call.n, generator=torch.Generator().manual_seed(call.n))
    return Problem(weight, bias.to(device, dtype), dtype)


def relative_errors(y: Tensor, x: Tensor, problem: Problem) -> tuple[float, float]:
    """Return the RMS and the largest absolute error of some outputs, divided by the RMS of float64's."""
    rows = torch.linspace(0, x.shape[0] - 1, min(_ORACLE_ROWS, x.shape[0])).long().to(x.device)
    columns = slice(0, _ORACLE_COLUMNS)
    weight = reference.dequantize(problem.weight.rows(columns), torch.float32).double()
    oracle = x[rows].double() @ weight.T + problem.bias[columns].double()
    error, rms = y[rows, columns].double() - oracle, oracle.square().mean().sqrt()
    return (error.square().mean().sqrt() / rms).item(), (error.abs().max() / rms).item()


def measure(
    name: str,
    call: Call,
    providers: list[str],
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    ceilings: Ceilings | None = None,
    size: str = "",
):
    """Yield a row for each provider of one format and call; a GPU's L2 cache is emptied before each run.

    Columns: times in ms, `graph_ms` the median of replays as a CUDA graph ("" where there is none, with a log line why); `tflops`
    and `packed_gb_s` (GB/s of packed weight) of the median; the shares of the ceilings; `error` and `max_error`, RMS and largest
    absolute error against float64, both divided by the RMS of the right output. `size` is a column as given: which step the call
    is of (shapes.size_name). Sides that run the same code are timed once; notes say so. What a side raises is its row's note.
    """
    problem = make_problem(name, call, device, dtype)
    x = torch.randn(call.m, call.k, dtype=torch.float32, device=device).to(dtype)
    functions, notes, errors = {}, {}, {}
    for provider in providers:
        try:
            function, gate = PROVIDERS[provider].make(problem), PROVIDERS[provider].gate
            errors[provider] = relative_errors(function(x), x, problem)
            if errors[provider][0] <= gate:
                functions[provider] = lambda function=function: function(x)
                notes[provider] = _version(PROVIDERS[provider].package)
            else:
                notes[provider] = wrong(errors[provider][0], gate)
        except Exception as error:  # noqa: BLE001  (a failure is a result: it becomes the row's note, and the other rows stay)
            notes[provider] = f"{'' if isinstance(error, CANNOT_RUN) else FAILED}{why(error)}"
    alike = {side: same_call(side, call.m) for side in functions}
    timed = {side: function for side, function in functions.items() if alike[side] == side or alike[side] not in functions}
    flush = cache_flusher(device)
    times = interleaved(timed, repeats, device, flush)
    graphs = graph_replayed(timed, repeats // 2, device, flush)
    for provider in functions.keys() - timed.keys():
        times[provider], graphs[provider] = times[alike[provider]], graphs[alike[provider]]
        notes[provider] = f"the same call as {alike[provider]}, timed once"
    for provider in providers:
        measured = times.get(provider), graphs.get(provider), errors.get(provider), notes.get(provider, "")
        yield _row(name, size, call, provider, *measured, problem, ceilings)


def _version(package: str) -> str:
    """Name a distribution with its version, for the note of a row that was measured with it."""
    if not package:
        return ""
    version = installed_version(package)
    return f"{package} {version}" if version else f"{package}, version not known"


def is_broken(row: Mapping[str, object]) -> bool:
    """Return whether a row says that a side of this library gave a wrong result or failed."""
    return str(row["provider"]).startswith(OURS) and str(row["note"]).startswith((WRONG, FAILED))


def least_bytes(name: str, provider: str, call: Call, itemsize: int) -> int | None:
    """Return the least bytes a call moves: weight, x and y; None where the weight's are not known."""
    if PROVIDERS[provider].own_weights:
        return None
    weight = itemsize * call.n * call.k if provider == TORCH else call.n * FORMATS[name].row_bytes(call.k)
    return weight + itemsize * call.m * (call.k + call.n)


def _row(name, size, call, provider, times, graph, errors, note, problem, ceilings) -> dict:
    row = dict(format=name, size=size, provider=provider) | asdict(call) | dict(dtype=dtype_name(problem.dtype))
    error, largest = (f"{value:.3g}" for value in errors) if errors else ("", "")
    checked = dict(error=error, max_error=largest, note=note)
    if times is None:
        return row | dict.fromkeys(_MEASURED, "") | checked
    p20, p50, p80 = percentiles(times)
    # Other sides do not read the packed bytes.
    packed = provider != TORCH and not PROVIDERS[provider].own_weights
    packed_bytes = problem.weight.data.numel()
    speeds = dict(tflops=_four(call.flops / p50 / 1e9), packed_gb_s=_four(packed_bytes / p50 / 1e6) if packed else "")
    shares = dict.fromkeys(("share_of_matmul", "share_of_copy"), "")
    if ceilings is not None:
        moved = least_bytes(name, provider, call, problem.dtype.itemsize)
        shares = ceilings.shares(p50, call.flops, moved or 0)
        if moved is None:
            shares["share_of_copy"] = ""
    speeds |= shares
    timed = (len(times), *(f"{time:.4f}" for time in (p20, p50, p80)), f"{median(graph):.4f}" if graph else "")
    return row | dict(zip(_TIMES, timed, strict=True)) | speeds | checked


def _four(value: float) -> float:
    """Keep four digits, whatever the magnitude: a single row on a CPU is a thousandth of a TFLOP/s."""
    return float(f"{value:.4g}")


def summary(rows: list[dict]) -> str:
    """Return the time of a step's linears by size, format and provider, and its speed, torch's as 1."""
    lines: list[str] = []
    for (size, name), step_rows in by_step(rows).items():
        sums = totals(step_rows)
        for provider, total in sums.items():
            speed = f", {marked(total, sums[TORCH]):>5} x torch" if TORCH in sums else ""
            lines.append(f"{name:8} {provider:30} {total.p50:10.1f} ms a step{speed}  {size}".rstrip())
    text = "\n".join(lines)
    return "\n".join([text, *(f"{sign} {words}" for sign, words in MARKS.items() if f" {sign}" in text)])
