"""Measure which algorithm and tile is fastest for a call on this card, and record it.

Needs torch and triton alone. Nothing is tuned at a first call: this runs when it is asked to, writes every result at once,
and a second run goes on where the first was stopped.
"""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from .._triton import TRITON_VERSION
from ..compute import capability_of, dtype_name
from ..errors import BackendUnavailable
from ..formats import FORMATS
from ..kernels import choice as choices
from ..kernels.candidates import Candidate
from ..kernels.choice import candidates, default_choice
from ..kernels.launching import processors_of
from ..kernels.problem import Call
from ..kernels.record import TuningRecord, TuningRow, kernel_hash, record_path
from .clock import cache_flusher, interleaved
from .tune_compile import Compilers, Spills, device_is_lost, one_line
from .tune_jobs import Job, Operands

# Relative error above which a candidate is broken; int8's own error on gaussian data is 0.01.
WRONG = 0.03
_QUICK, _CLOSE, _FINALISTS, _REPEATS = 3, 1.25, 4, 15

log = logging.getLogger(__name__)


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
        processes: that compile; this process alone times, when they are idle.
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
                    rows = tune_call(job, device, dtype, limit, refused, spills)
                # Such as no memory for the operands, or a launch that ends the device.
                except Exception as error:  # noqa: BLE001
                    failed = error
                    if not isinstance(error, BackendUnavailable):
                        failed = BackendUnavailable(f"{job} could not be measured on {device}: {one_line(error)}")
                    log.warning("%s", failed)
                    if device_is_lost(device):
                        log.warning("%s answers no more; the rows measured so far are saved. Start again to go on.", device)
                        break
                    continue
                row = rows[0]
                _replace(record, rows)
                record.save(path)
            done += 1
            on_row(job, row)
    choices.forget()
    if failed is not None and not done:
        raise failed
    return path


def _replace(record: TuningRecord, rows: list[TuningRow]) -> None:
    """Put the rows of a call into the record.

    A row with a branch that is there already goes, even where there is no new row.
    """
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
    """Time the candidates of one call and return the best as a row.

    Where it serves calls with a low-rank branch, another row follows for those.

    Args:
        job: the call.
        device: an accelerator (in tests the CPU, with Triton's interpreter).
        dtype: of the activations.
        limit: of candidates, None for all.
        refused: candidates that are known to fail.
        spills: what is known from earlier calls.

    Raises:
        BackendUnavailable: where no candidate runs.
    """
    operands, spills = Operands(job, device, dtype), spills or Spills()
    default, *others = _tried(job, device, dtype, limit)
    tried = [candidate for candidate in (default, *others) if candidate not in frozenset(refused)]
    runs = _working(operands, tried, spills, keep=default)
    if not runs:
        raise BackendUnavailable(f"No kernel for {job} runs on {device}; nothing was recorded for it.")
    times = _race(runs, device, default)
    best = min(times, key=times.__getitem__)
    row = _row(operands, best, times[best], times.get(default, float("inf")))
    with_branch = None if best.tile is None else _with_branch(operands, best, spills)
    return [row] if with_branch is None else [row, with_branch]


def _with_branch(operands: Operands, best: Candidate, spills: Spills) -> TuningRow | None:
    """Time the winner with a low-rank branch in its epilogue, and return its row.

    None where it fails, spills, or loses to the default's tile for that.
    """
    job, device = operands.job, operands.device
    shape = job.m, job.n, job.k
    choice = default_choice(
        *(job.compute, operands.fmt, *shape, capability_of(device), operands.dtype, True),
        processors=(processors_of(device) or 1),
    )
    default = Candidate(choice.algorithm, choice.tile, choice.rows)
    runs = _working(operands, list(dict.fromkeys([best, default])), spills, branch=True)
    if best not in runs:
        return None
    times = _race(runs, device, default)
    # Not even among the fastest few, or slower than the default.
    if best not in times or times[best] > times.get(default, float("inf")):
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
    measured = interleaved({key: runs[key] for key in finalists}, _REPEATS, device, flush)
    return {key: median(times) for key, times in measured.items()}


def _row(operands: Operands, best: Candidate, ms: float, default_ms: float, branch: bool = False) -> TuningRow:
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
    call = Call(FORMATS[job.format], job.m, job.n, job.k, capability_of(device), (processors_of(device) or 1), dtype)
    return candidates(job.compute, call)[:limit]


def _compile_all(
    compilers: Compilers, job: Job, device: torch.device, dtype: torch.dtype, limit: int | None
) -> frozenset[Candidate]:
    """Have processes compile every candidate into Triton's cache on disk; return what failed.

    This process then takes it from there. Where everything failed the processes are to blame (a card in exclusive mode serves
    one only), and nothing is returned.
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
        operands = Operands(job, torch.device(device), dtype)
        operands.runner(candidate)().sum().item()
    # Whatever a compiler, a driver or a launch may raise.
    except Exception as error:  # noqa: BLE001
        return one_line(error)
    return ""


def _same_divisibility(size: int) -> int:
    """Return a small size for which Triton compiles the same code.

    It looks at 1 and at multiples of 16 only.
    """
    return size if size == 1 else 16 if size % 16 == 0 else 17


def _working(
    operands: Operands, tried: list[Candidate], spills: Spills, keep: Candidate | None = None, branch: bool = False
) -> dict[Candidate, Callable[[], Tensor]]:
    """Return what can be compiled and launched, gives the right product, and does not spill registers.

    What spills is returned where nothing else is left; `keep` is returned even where it spills. One line is logged for all
    others.
    """
    working: dict[Candidate, Callable[[], Tensor]] = {}
    spilling: dict[Candidate, Callable[[], Tensor]] = {}
    for candidate in tried:
        run = operands.runner(candidate, branch)
        try:
            spilled, error = _outcome(operands, candidate, run, spills, branch)
        # Whatever a compiler, a driver or a launch may raise.
        except Exception as problem:  # noqa: BLE001
            _skip(operands.job, candidate, one_line(problem))
            continue
        # Also NaN.
        if not error <= WRONG:
            _skip(operands.job, candidate, f"wrong result, relative error {error:.2g}")
        elif spilled and candidate != keep:
            _skip(operands.job, candidate, f"spills {spilled} registers")
            spilling[candidate] = run
        else:
            working[candidate] = run
    return working or spilling


def _outcome(
    operands: Operands, candidate: Candidate, run: Callable[[], Tensor], spills: Spills, branch: bool
) -> tuple[int, float]:
    """Run a candidate once; return how many registers it spills, and its relative error."""
    outputs: list[Tensor] = []
    spilled = spills.after(_code(operands, candidate, branch), lambda: outputs.append(run()))
    return spilled, operands.error(outputs.pop(), branch)


def _code(operands: Operands, candidate: Candidate, branch: bool) -> tuple:
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


def _describe(device: torch.device, name: str) -> dict:
    facts: dict = dict(name=name, capability=list(capability_of(device) or ()), processors=(processors_of(device) or 1))
    if device.type == "cuda":
        facts["memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return facts


def _versions() -> dict:
    return dict(torch=torch.__version__, triton=TRITON_VERSION, cuda=torch.version.cuda, hip=torch.version.hip)
