"""Measure which algorithm and tile is fastest for a call on this card, and write it to the card's tuning record.

Needs torch and triton alone. Nothing is tuned at a first call: this runs when it is asked to, writes every result at once,
and a second run goes on where the first was stopped.
"""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from .._triton import TRITON_VERSION
from ..compute import dtype_name
from ..errors import BackendUnavailable
from ..formats import FORMATS, Packed
from ..kernels import MODULES, int8
from ..kernels import choice as choices
from ..kernels.choice import Choice, default_choice
from ..kernels.launching import capability_of, device_of
from ..kernels.record import TuningRecord, TuningRow, kernel_hash, record_path
from ..torch_backend import reference
from .candidates import Call, Candidate, candidates
from .clock import cache_flusher, interleaved
from .random_rows import random_rows
from .tune_compile import Compilers, Spills, device_is_lost, said

WRONG = 0.03  # relative error above which a candidate is broken; int8's own error on gaussian data is 0.01
BRANCH_RANK = 16
_QUICK, _CLOSE, _FINALISTS, _REPEATS = 3, 1.25, 4, 15
_CHECKED_ROWS, _CHECKED_COLUMNS = 64, 256  # of y, against float64

log = logging.getLogger(__name__)


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
        on_row: called after each job, with None where its row was up to date; not where nothing ran, which is logged.

    Returns:
        The path of the record.

    Raises:
        BackendUnavailable: where no kernel ran for any of the jobs.
        ValueError: where the record that is there cannot be read.
    """
    name = _name(device)
    path = record_path(name) if path is None else path
    record = TuningRecord.load(path) if path.exists() else TuningRecord(_describe(device, name))
    end, spills, failed, done = time.monotonic() + 60 * minutes, Spills(), None, 0
    with ExitStack() as stack:
        compilers = stack.enter_context(Compilers(processes)) if processes > 1 else None
        for job in jobs:
            if time.monotonic() > end:
                break
            row = None
            if again or not _up_to_date(record, job, dtype):
                refused = _compile_all(compilers, job, device, dtype, limit) if compilers else frozenset()
                try:
                    found = tune_call(job, device, dtype, limit, refused, spills)
                except Exception as error:  # noqa: BLE001  no memory for the operands, a launch that ends the device
                    failed = error
                    if not isinstance(error, BackendUnavailable):
                        failed = BackendUnavailable(f"{job} could not be measured on {device}: {said(error)}")
                    log.warning("%s", failed)
                    if device_is_lost(device):
                        log.warning("%s answers no more; the rows measured so far are saved. Start again to go on.", device)
                        break
                    continue
                row = found[0]
                _replace(record, found)
                record.save(path)
            done += 1
            on_row(job, row)
    choices.forget()
    if failed is not None and not done:
        raise failed
    return path


def _replace(record: TuningRecord, rows: list[TuningRow]) -> None:
    """Put the rows of a call into the record; a row with a branch that is there already goes, even where there is no new one."""
    record.rows.pop(replace(rows[0], branch=True).key, None)
    record.rows.update({row.key: row for row in rows})
    record.versions, record.date = _versions(), datetime.date.today().isoformat()


def tune_call(
    job: Job,
    device: torch.device,
    dtype: torch.dtype,
    limit: int | None = None,
    refused: Iterable[Candidate] = (),
    spills: Spills | None = None,
) -> list[TuningRow]:
    """Time the candidates of one call; return the best as a row, and another for calls with a low-rank branch where it serves them.

    Args:
        job: the call.
        device: an accelerator (in tests the CPU, with Triton's interpreter).
        dtype: of the activations.
        limit: of candidates, None for all.
        refused: candidates that are known to fail.
        spills: what earlier calls found.

    Raises:
        BackendUnavailable: where no candidate runs.
    """
    operands, spills = _Operands(job, device, dtype), spills or Spills()
    default, *others = _tried(job, device, dtype, limit)
    tried = [candidate for candidate in (default, *others) if candidate not in frozenset(refused)]
    runs = _working(operands, tried, spills, keep=default)
    if not runs:
        raise BackendUnavailable(f"No kernel for {job} runs on {device}; nothing was recorded for it.")
    times = _race(runs, device, default)
    best = min(times, key=times.__getitem__)
    row = _row(operands, best, times[best], times.get(default, float("inf")))
    beside = None if best.tile is None else _with_branch(operands, best, spills)
    return [row] if beside is None else [row, beside]


def _with_branch(operands: _Operands, best: Candidate, spills: Spills) -> TuningRow | None:
    """Time the winner with a low-rank branch in its epilogue; None where it fails, spills, or loses to the default's tile for that."""
    job, device = operands.job, operands.device
    shape = job.m, job.n, job.k
    choice = default_choice(
        *(job.compute, operands.fmt, *shape, capability_of(device), operands.dtype, True), processors=_processors(device)
    )
    default = Candidate(choice.algorithm, choice.tile, choice.rows)
    runs = _working(operands, list(dict.fromkeys([best, default])), spills, branch=True)
    if best not in runs:
        return None
    times = _race(runs, device, default)
    if best not in times or times[best] > times.get(default, float("inf")):  # not even among the fastest few
        return None
    return _row(operands, best, times[best], times.get(default, float("inf")), branch=True)


def _race(runs: dict[Candidate, Callable[[], Tensor]], device: torch.device, default: Candidate) -> dict[Candidate, float]:
    """Return milliseconds of the fastest few and of the default, each from a cache that was emptied."""
    flush = cache_flusher(device)
    quick = {key: median(times) for key, times in interleaved(runs, _QUICK, device, flush).items()}
    ranked = sorted(quick, key=quick.__getitem__)
    finalists = [key for key in ranked if quick[key] <= _CLOSE * quick[ranked[0]]][:_FINALISTS]
    if default in runs and default not in finalists:
        finalists.append(default)
    return {key: median(found) for key, found in interleaved({k: runs[k] for k in finalists}, _REPEATS, device, flush).items()}


def _row(operands: _Operands, best: Candidate, ms: float, default_ms: float, branch: bool = False) -> TuningRow:
    job = operands.job
    return TuningRow(
        *(job.compute, job.format, job.m, job.n, job.k, best.algorithm, best.tile, round(ms, 5), round(default_ms, 5)),
        triton=TRITON_VERSION or "",
        kernel_hash=kernel_hash(job.compute, operands.fmt),
        dtype=dtype_name(operands.dtype),
        branch=branch,
        rows=best.rows,
    )


def _tried(job: Job, device: torch.device, dtype: torch.dtype, limit: int | None) -> list[Candidate]:
    call = Call(FORMATS[job.format], job.m, job.n, job.k, capability_of(device), _processors(device), dtype)
    return candidates(job.compute, call)[:limit]


def _compile_all(
    compilers: Compilers, job: Job, device: torch.device, dtype: torch.dtype, limit: int | None
) -> frozenset[Candidate]:
    """Have processes compile every candidate into Triton's cache on disk, from which this one then takes it; return what failed.

    Where everything failed the processes are to blame (a card in exclusive mode serves one only), and nothing is returned.
    """
    small = replace(job, m=_same_divisibility(job.m), n=_same_divisibility(job.n))
    tried = _tried(job, device, dtype, limit)
    codes = list(dict.fromkeys(candidate._replace(rows=None) for candidate in tried))
    outcomes = compilers.failures(_compile_one, [(small, code, str(device), dtype) for code in codes])
    failed = {code: why for code, why in zip(codes, outcomes, strict=True) if why}
    for code, why in failed.items():
        _skip(job, code, why)
    if len(failed) == len(codes):
        return frozenset()
    return frozenset(candidate for candidate in tried if candidate._replace(rows=None) in failed)


def _compile_one(job: Job, candidate: Candidate, device: str, dtype: torch.dtype) -> str:
    """Launch one candidate once; return why that failed, "" where it did not."""
    try:
        operands = _Operands(job, torch.device(device), dtype)
        operands.runner(candidate)().sum().item()
    except Exception as error:  # noqa: BLE001  whatever a compiler, a driver or a launch may raise
        return said(error)
    return ""


def _same_divisibility(size: int) -> int:
    """Return a small size for which Triton compiles the same code: it looks at 1 and at multiples of 16 only."""
    return size if size == 1 else 16 if size % 16 == 0 else 17


class _Operands:
    """Hold the tensors of one call, and the right values of some of its outputs."""

    def __init__(self, job: Job, device: torch.device, dtype: torch.dtype):
        self.job, self.device, self.dtype, self.fmt = job, device, dtype, FORMATS[job.format]
        planes = self.fmt.planes
        self.weight = Packed(random_rows(self.fmt, job.n, job.k, planes).to(device), self.fmt, planes)
        self.x, self.bias, hidden, up = (
            torch.randn(shape, device=device).to(dtype)
            for shape in ((job.m, job.k), (job.n,), (job.m, BRANCH_RANK), (job.n, BRANCH_RANK))
        )
        self.branch = hidden, up
        self._rows = torch.linspace(0, job.m - 1, min(_CHECKED_ROWS, job.m)).long().to(device)
        self._columns = slice(0, _CHECKED_COLUMNS)
        weight = reference.dequantize(self.weight.rows(self._columns), torch.float32).double()
        self._right = self.x[self._rows].double() @ weight.T + self.bias[self._columns].double()

    def runner(self, candidate: Candidate, branch: bool = False) -> Callable[[], Tensor]:
        """Return what computes the call in one way."""
        module, chosen = MODULES[self.job.compute], Choice(candidate.algorithm, candidate.tile, "", candidate.rows)
        added = self.branch if branch else None
        weight = self.weight
        if candidate.algorithm == "row_scales":  # a layer finds them once and keeps them
            weight = weight._replace(row_scale=int8.row_scale(weight))

        def run() -> Tensor:
            y = torch.empty(self.job.m, self.job.n, dtype=self.dtype, device=self.device)
            with device_of(y):
                module.linear(self.x, weight, self.bias, y, added, choice=chosen)
            return y

        return run

    def error(self, y: Tensor, branch: bool = False) -> float:
        """Return the relative error of y against float64."""
        right = self._right
        if branch:
            hidden, up = self.branch
            right = right + hidden[self._rows].double() @ up[self._columns].double().T
        return ((y[self._rows, self._columns].double() - right).norm() / right.norm()).item()


def _working(
    operands: _Operands, tried: list[Candidate], spills: Spills, keep: Candidate | None = None, branch: bool = False
) -> dict[Candidate, Callable[[], Tensor]]:
    """Return what can be compiled and launched, gives the right product, and does not spill registers.

    What spills is returned where nothing else is left; `keep` is returned even where it spills. One line is logged for all others.
    """
    found: dict[Candidate, Callable[[], Tensor]] = {}
    spilling: dict[Candidate, Callable[[], Tensor]] = {}
    for candidate in tried:
        run, made = operands.runner(candidate, branch), []
        try:
            spilled = spills.after(_code(operands, candidate, branch), lambda run=run, made=made: made.append(run()))
            error = operands.error(made.pop(), branch)
        except Exception as problem:  # noqa: BLE001  whatever a compiler, a driver or a launch may raise
            _skip(operands.job, candidate, said(problem))
            continue
        if not error <= WRONG:  # also NaN
            _skip(operands.job, candidate, f"wrong result, relative error {error:.2g}")
        elif spilled and candidate != keep:
            _skip(operands.job, candidate, f"spills {spilled} registers")
            spilling[candidate] = run
        else:
            found[candidate] = run
    return found or spilling


def _code(operands: _Operands, candidate: Candidate, branch: bool) -> tuple:
    """Return all that decides what is compiled for a candidate."""
    job = operands.job
    sizes = _same_divisibility(job.m), _same_divisibility(job.n), job.k
    return job.compute, job.format, sizes, operands.dtype, operands.device, candidate._replace(rows=None), branch


def _skip(job: Job, candidate: Candidate, why: str) -> None:
    log.warning(
        "%s %s %s: %s %s left out: %s", job.compute, job.format, (job.m, job.n, job.k), candidate.algorithm, candidate.tile, why
    )


def _up_to_date(record: TuningRecord, job: Job, dtype: torch.dtype) -> bool:
    key = job.compute, job.format, job.m, job.n, job.k, dtype_name(dtype), False
    row = record.rows.get(key)
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
