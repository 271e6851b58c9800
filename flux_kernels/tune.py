"""Measure which algorithm and tile is fastest for a call on this card, and write it to the card's tuning record.

Needs torch and triton alone. Nothing is tuned at a first call: this runs when it is asked to, writes every result at once,
and a second run goes on where the first was stopped.
"""

from __future__ import annotations

import datetime
import multiprocessing
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from ._triton import TRITON_VERSION, triton
from .clock import interleaved
from .errors import BackendUnavailable
from .formats import FORMATS, BlockFormat
from .kernels import choice as choices
from .kernels import exact, fp16_accumulate, int8
from .kernels.choice import Choice
from .kernels.launching import capability_of, device_of
from .kernels.record import TuningRecord, TuningRow, kernel_hash, record_path
from .random_rows import random_rows
from .tune_candidates import Candidate, candidates

WRONG = 0.03  # relative error above which a candidate is broken; int8's own error on gaussian data is 0.01
_QUICK, _CLOSE, _FINALISTS, _REPEATS = 3, 1.25, 4, 15
_ROTATED = 4  # copies of the weight that take turns, so that it comes from memory as in a model
_MODULES = {"exact": exact, "fp16_accumulate": fp16_accumulate, "int8": int8}


@dataclass(frozen=True)
class Job:
    """Name one call to tune: x [M, K] times w [N, K] of a ggml type in a compute mode."""

    compute: str
    format: str
    m: int
    n: int
    k: int


def tune(
    jobs: Iterable[Job],
    device: torch.device,
    *,
    path: Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    minutes: float = 10.0,
    again: bool = False,
    limit: int | None = None,
    processes: int = 1,
    on_row: Callable[[Job, TuningRow | None], None] = lambda job, row: None,
) -> Path:
    """Tune calls until all are done or the time is up; rows that are up to date are kept.

    Args:
        jobs: the calls, the most important first.
        device: an accelerator (in tests the CPU, with Triton's interpreter).
        path: of the record; by default the card's file in `records_folder()`.
        dtype: of the activations.
        minutes: of wall time after which no new call is begun.
        again: measure rows anew that are up to date.
        limit: of candidates per call, None for all.
        processes: that compile; timing is done by this one alone, when they are idle.
        on_row: called after each job, with None where its row was up to date.

    Returns:
        The path of the record.

    Raises:
        BackendUnavailable: where Triton cannot run on the device.
        ValueError: where the record that is there cannot be read.
    """
    name = _name(device)
    path = record_path(name) if path is None else path
    record = TuningRecord.load(path) if path.exists() else TuningRecord(_describe(device, name))
    end = time.monotonic() + 60 * minutes
    with ExitStack() as stack:
        pool = None
        if processes > 1:  # a CUDA context does not survive a fork
            spawn = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(processes, mp_context=spawn))
        for job in jobs:
            if time.monotonic() > end:
                break
            row = None
            if again or not _up_to_date(record, job):
                if pool is not None:
                    _compile_all(pool, job, device, dtype, limit)
                row = tune_call(job, device, dtype, limit)
                record.rows[row.key] = row
                record.versions, record.date = _versions(), datetime.date.today().isoformat()
                record.save(path)
            on_row(job, row)
    choices.forget()
    return path


def tune_call(job: Job, device: torch.device, dtype: torch.dtype, limit: int | None = None) -> TuningRow:
    """Time the candidates of one call and return the best as a row."""
    fmt, tried = FORMATS[job.format], _tried(job, device, limit)
    runs = _working(job, fmt, tried, device, dtype)
    quick = {key: median(times) for key, times in interleaved(runs, _QUICK, device).items()}
    ranked = sorted(quick, key=quick.__getitem__)
    finalists = [key for key in ranked if quick[key] <= _CLOSE * quick[ranked[0]]][:_FINALISTS]
    if tried[0] in runs and tried[0] not in finalists:
        finalists.append(tried[0])
    with device_of(torch.empty(0, device=device)):
        times = {key: median(found) for key, found in interleaved({k: runs[k] for k in finalists}, _REPEATS, device).items()}
    best = min(times, key=times.__getitem__)
    ms, default_ms = round(times[best], 5), round(times.get(tried[0], float("inf")), 5)
    return TuningRow(
        *(job.compute, job.format, job.m, job.n, job.k, *best, ms, default_ms),
        triton=TRITON_VERSION or "",
        kernel_hash=kernel_hash(job.compute, fmt),
        dtype=str(dtype).removeprefix("torch."),
    )


def _tried(job: Job, device: torch.device, limit: int | None) -> list[Candidate]:
    fmt = FORMATS[job.format]
    return candidates(job.compute, fmt, job.m, job.n, job.k, capability_of(device), _processors(device))[:limit]


def _compile_all(pool: ProcessPoolExecutor, job: Job, device: torch.device, dtype: torch.dtype, limit: int | None) -> None:
    """Have the pool compile every candidate into Triton's cache on disk, from which this process then takes it."""
    small = replace(job, m=_same_divisibility(job.m), n=_same_divisibility(job.n))
    tasks = [(small, candidate, str(device), dtype) for candidate in _tried(job, device, limit)]
    list(pool.map(_compile_one, *zip(*tasks, strict=True)))


def _compile_one(job: Job, candidate: Candidate, device: str, dtype: torch.dtype) -> None:
    """Launch one candidate once; a tile too large for the card fails here as it will in `_working`."""
    _working(job, FORMATS[job.format], [candidate], torch.device(device), dtype, needed=False)


def _same_divisibility(size: int) -> int:
    """Return a small size for which Triton compiles the same code: it looks at 1 and at multiples of 16 only."""
    return size if size == 1 else 16 if size % 16 == 0 else 17


def _working(
    job: Job, fmt: BlockFormat, tried: list[Candidate], device, dtype, needed: bool = True
) -> dict[Candidate, Callable[[], Tensor]]:
    """Return what can be launched and gives the right product; tiles too large for the card fall out here."""
    planes = fmt.planes
    weight = random_rows(fmt, job.n, job.k, planes).to(device)
    copies = cycle([weight, *(weight.clone() for _ in range(_ROTATED - 1))])
    x = torch.randn(job.m, job.k, device=device).to(dtype)
    bias = torch.randn(job.n, device=device).to(dtype)
    right = None
    found: dict[Candidate, Callable[[], Tensor]] = {}
    for candidate in tried:
        run = _runner(job.compute, candidate, x, copies, bias, fmt, planes)
        try:
            y = run().double()
        except triton.runtime.errors.OutOfResources:
            continue
        right = y if right is None else right  # the default table's choice, which has tests of its own
        if (y - right).norm() <= WRONG * right.norm():
            found[candidate] = run
    if needed and not found:
        raise BackendUnavailable(f"No kernel for {job} runs on {device}; nothing was recorded for it.")
    return found


def _runner(compute: str, candidate: Candidate, x, copies, bias, fmt, planes) -> Callable[[], Tensor]:
    module, chosen = _MODULES[compute], Choice(*candidate, "")

    def run() -> Tensor:
        y = torch.empty(x.shape[0], bias.shape[0], dtype=x.dtype, device=x.device)
        with device_of(x):
            module.linear(x, next(copies), bias, y, fmt, planes, choice=chosen)
        return y

    return run


def _up_to_date(record: TuningRecord, job: Job) -> bool:
    row = record.rows.get((job.compute, job.format, job.m, job.n, job.k))
    return row is not None and (row.triton, row.kernel_hash) == (TRITON_VERSION, kernel_hash(job.compute, FORMATS[job.format]))


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} (interpreter)"


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _describe(device: torch.device, name: str) -> dict:
    facts: dict = dict(name=name, capability=list(capability_of(device) or ()), processors=_processors(device))
    if device.type == "cuda":
        facts["memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return facts


def _versions() -> dict:
    return dict(torch=torch.__version__, triton=TRITON_VERSION, cuda=torch.version.cuda, hip=torch.version.hip)
