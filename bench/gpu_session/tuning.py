"""Tune the calls that decide most, M = 512 and 1 in exact mode, int8 at large M, to an own record."""

from __future__ import annotations

import os
import time
from dataclasses import asdict

import torch

from bench.gpu_session.predict import product_ms, read_ms
from bench.gpu_session.session import Session
from flux_kernels.machine.tune import tune
from flux_kernels.machine.tune_jobs import Job

KEY = ("compute", "format", "m", "n", "k")
_EXACT = ((512, 3072, 3072), (512, 12288, 3072), (512, 3072, 12288), (1, 18432, 3072))
_INT8 = ((4608, 3072, 3072), (4608, 12288, 3072), (4608, 3072, 15360))
_CANDIDATE_SECONDS = 0.03  # what a candidate takes besides its runs


def jobs() -> list[Job]:
    """List the calls, the most important first."""
    exact = [Job("exact", format, *shape) for shape in _EXACT for format in ("Q4_K", "Q8_0")]
    return exact + [Job("int8", "Q4_K", *shape) for shape in _INT8]


def run(session: Session) -> None:
    """Write records/tuning.json, and tuning.csv with a row for each call."""
    table = session.table("tuning", KEY)
    count = 40

    def show(job: Job, row) -> None:
        if row is None:
            return
        shape = job.m, job.n, job.k
        predicted = read_ms(session.rates, job.format, *shape[1:]) if job.m == 1 else product_ms(session.rates, *shape)
        session.expected += count * (_CANDIDATE_SECONDS + 4 * predicted / 1e3)
        ratio = f"{row.ms / predicted:.2f}"
        chosen = dict(algorithm=row.algorithm, tile=str(row.tile or ""), p50_ms=row.ms, default_ms=row.default_ms)
        table.add(asdict(job) | chosen | dict(predicted_ms=f"{predicted:.5f}", measured_over_predicted=ratio))

    minutes = max(0.0, session.end - time.monotonic()) / 60
    options, todo = (dict(limit=2), jobs()[:3]) if session.reduced else ({}, jobs())
    # Processes that compile take a quarter of a minute to start: only where kernels were not carried.
    options["processes"] = 1 if session.dry or session.carried else os.cpu_count()
    tune(todo, torch.device("cuda"), path=session.out / "records" / "tuning.json", minutes=minutes, on_row=show, **options)
