"""tune: every candidate is legal and gives the right product, the record is written at once, resumed, and used."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from flux_kernels import tune as tuning
from flux_kernels.formats import FORMATS
from flux_kernels.kernels import record
from flux_kernels.kernels.record import TuningRecord
from flux_kernels.tune import Job, tune, tune_call
from flux_kernels.tune_candidates import candidates

CPU = torch.device("cpu")
FEW = 4  # candidates: the interpreter takes a second for each


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(record.FOLDER_VARIABLE, str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("compute", ["exact", "fp16_accumulate", "int8"])
@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "NVFP4", "IQ3_S"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 18432, 3072), (512, 3072, 3072), (4608, 3072, 15360), (64, 64, 256)])
def test_every_candidate_would_be_read_back(compute, name, m, n, k):
    """A candidate that won must make a row that `TuningRecord.load` takes; the default comes first, and none twice."""
    found = candidates(compute, FORMATS[name], m, n, k, (8, 6), 82)
    assert len(found) == len(set(found))
    for algorithm, tile in found:
        data = dict(compute=compute, format=name, m=m, n=n, k=k, algorithm=algorithm, tile=tile and vars(tile))
        record._row(data | dict(ms=1.0, default_ms=1.0, triton="", kernel_hash="", dtype="bfloat16"))


def test_splitting_k_is_tried_where_waves_are_few():
    def tried(m: int, n: int) -> set[str]:
        return {algorithm for algorithm, _ in candidates("exact", FORMATS["Q4_K"], m, n, 3072, (8, 6), 82)}

    assert "split_k" in tried(512, 3072) and "split_k" not in tried(4608, 3072)
    assert tried(1, 18432) == {"small_m"}


@pytest.mark.parametrize("compute", ["exact", "fp16_accumulate", "int8"])
def test_a_call_is_measured(compute):
    row = tune_call(Job(compute, "Q4_K", 20, 64, 256), CPU, torch.float32 if compute == "exact" else torch.float16, FEW)
    assert row.key == (compute, "Q4_K", 20, 64, 256)
    assert 0 < row.ms <= row.default_ms * 1.0001


def test_tuning_writes_each_row_and_goes_on(folder):
    jobs = [Job("exact", "Q8_0", 17, 32, 256), Job("exact", "Q8_0", 3, 32, 256)]
    seen = []
    path = tune(jobs[:1], CPU, dtype=torch.float32, limit=2, on_row=lambda job, row: seen.append(row))
    assert path.parent == folder and len(TuningRecord.load(path).rows) == 1
    tune(jobs, CPU, dtype=torch.float32, limit=2, on_row=lambda job, row: seen.append(row))
    assert [row is None for row in seen] == [False, True, False]
    assert len(TuningRecord.load(path).rows) == 2


@pytest.mark.parametrize(("size", "small"), [(1, 1), (4608, 16), (4080, 16), (20, 17)])
def test_compiling_processes_see_sizes_of_the_same_kind(size, small):
    assert tuning._same_divisibility(size) == small


def test_processes_compile_the_same_candidates(monkeypatch):
    """The pool gets every candidate that is then timed, on small sizes; one that does not fit the card fails in neither."""

    class Here:
        def map(self, function, *columns):
            return map(function, *columns)

    launched = []
    real = tuning._runner
    monkeypatch.setattr(
        tuning, "_runner", lambda mode, candidate, *rest: launched.append(candidate) or real(mode, candidate, *rest)
    )
    job = Job("exact", "Q8_0", 32, 64, 256)
    tuning._compile_all(Here(), job, CPU, torch.float32, 3)
    assert launched == tuning._tried(job, CPU, 3)


def test_no_call_is_begun_after_the_time(folder):
    path = tune([Job("exact", "Q8_0", 3, 32, 256)], CPU, minutes=-1)
    assert not path.exists()


def test_a_wrong_candidate_is_never_recorded(monkeypatch):
    """The second candidate computes nonsense quickly; the default wins."""
    real, calls = tuning._runner, []

    def runner(compute, candidate, *rest):
        calls.append(candidate)
        return real(compute, candidate, *rest) if len(calls) == 1 else (lambda: torch.zeros(20, 32))

    monkeypatch.setattr(tuning, "_runner", runner)
    row = tune_call(Job("exact", "Q4_K", 20, 32, 256), CPU, torch.float32, 2)
    assert len(calls) == 2 and (row.algorithm, row.tile) == calls[0]
    assert calls[0] != calls[1] and all(first != second for first, second in pairwise(calls))
