"""Tuning measures all other candidates whatever one does; its record is resumed, and used."""

from __future__ import annotations

import logging
from itertools import pairwise

import pytest
import torch

from flux_kernels._triton import triton
from flux_kernels.errors import BackendUnavailable
from flux_kernels.kernels import record
from flux_kernels.kernels.candidates import Candidate
from flux_kernels.kernels.record import TuningRecord
from flux_kernels.machine import tune as tuning
from flux_kernels.machine.tune import tune, tune_call
from flux_kernels.machine.tune_compile import Spills
from flux_kernels.machine.tune_jobs import Job, step_jobs
from flux_kernels.models.calls import step_calls

CPU = torch.device("cpu")
# Candidates: the interpreter takes a second for each.
FEW = 4
# Of float16: float32 has fused tiles nowhere.
JOB = Job("exact", "Q4_K", 16, 32, 256)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(record.FOLDER_VARIABLE, str(tmp_path))
    # The interpreter takes its time, which is not looked at.
    monkeypatch.setattr(tuning, "_QUICK", 1)
    monkeypatch.setattr(tuning, "_REPEATS", 2)
    return tmp_path


@pytest.fixture
def runners(monkeypatch):
    """Let a test replace the work of candidates by a function of candidate and branch.

    Where that returns None, the candidate does its work.
    """
    real, instead, seen = tuning.Operands.runner, [], []

    def runner(self, candidate, branch=False):
        seen.append((candidate, branch))
        work = instead[0](candidate, branch) if instead else None
        return work or real(self, candidate, branch)

    monkeypatch.setattr(tuning.Operands, "runner", runner)
    return instead, seen


def test_jobs_of_a_step_come_heaviest_first_and_once():
    calls = step_calls(512, 512)
    jobs = step_jobs([*calls, calls[0]], ["int8", "exact"], ["Q4_K"])
    assert len(jobs) == len(set(jobs)) and {job.m for job in jobs if job.compute == "exact"} == {call.m for call in calls}
    assert min(job.m for job in jobs if job.compute == "int8") > 16
    weight = {(call.m, call.n, call.k): call.flops * call.calls for call in calls}
    heaviness = [weight[job.m, job.n, job.k] for job in jobs if job.compute == "exact"]
    assert heaviness == sorted(heaviness, reverse=True)


@pytest.mark.parametrize("compute", ["exact", "fp16_accumulate", "int8"])
def test_a_call_is_measured(compute):
    dtype = torch.float32 if compute == "exact" else torch.float16
    row = tune_call(Job(compute, "Q4_K", 20, 64, 256), CPU, dtype, FEW)[0]
    assert row.key == (compute, "Q4_K", 20, 64, 256, str(dtype)[6:], False)
    assert 0 < row.ms <= row.default_ms * 1.0001


def test_tuning_writes_each_row_and_goes_on(folder):
    jobs = [Job("exact", "Q8_0", 17, 32, 256), Job("exact", "Q8_0", 3, 32, 256)]
    seen = []
    path = tune(jobs[:1], CPU, dtype=torch.float32, limit=2, on_row=lambda job, row: seen.append(row))
    # Two-stage has no tile: its row serves branches.
    assert path.parent == folder and len(TuningRecord.load(path).rows) == 1
    tune(jobs, CPU, dtype=torch.float32, limit=2, on_row=lambda job, row: seen.append(row))
    assert [row is None for row in seen] == [False, True, False]
    assert {row.m for row in TuningRecord.load(path).rows.values()} == {17, 3}


def test_rows_of_another_dtype_are_not_up_to_date(folder):
    seen = []
    for dtype in (torch.float32, torch.float16):
        path = tune([JOB], CPU, dtype=dtype, limit=1, on_row=lambda job, row: seen.append(row))
    assert [row.dtype for row in seen] == ["float32", "float16"]
    assert {row.dtype for row in TuningRecord.load(path).rows.values()} == {"float32", "float16"}


@pytest.mark.parametrize(("size", "small"), [(1, 1), (4608, 16), (4080, 16), (20, 17)])
def test_compiling_processes_see_sizes_of_the_same_kind(size, small):
    assert tuning._same_divisibility(size) == small


def test_no_call_is_begun_after_the_time(folder):
    path = tune([Job("exact", "Q8_0", 3, 32, 256)], CPU, minutes=-1)
    assert not path.exists()


def test_a_wrong_candidate_is_never_recorded(runners, caplog):
    """The second candidate computes nonsense quickly; the default wins."""
    instead, seen = runners
    instead.append(lambda candidate, branch: None if candidate == seen[0][0] else lambda: torch.zeros(16, 32))
    row = tune_call(JOB, CPU, torch.float16, 2)[0]
    assert (row.algorithm, row.tile) == seen[0][0][:2]
    assert "wrong result" in caplog.text
    assert all(first != second for first, second in pairwise(seen))


def test_a_wrong_default_is_not_what_others_are_compared_with(runners):
    """The default's result was the yardstick before.

    A default that fails then left the next candidate, right or wrong, as one.
    """
    instead, seen = runners
    instead.append(lambda candidate, branch: (lambda: torch.zeros(16, 32)) if candidate == seen[0][0] else None)
    row = tune_call(JOB, CPU, torch.float16, 2)[0]
    assert (row.algorithm, row.tile) == seen[1][0][:2] and row.default_ms == float("inf")


def _errors():
    yield triton.runtime.errors.OutOfResources(165888, 101376, "shared memory")
    yield triton.runtime.errors.PTXASError("ptxas died\nwith many lines")
    yield triton.CompilationError("src", None, "no")
    yield RuntimeError("Triton Error [CUDA]: invalid argument")
    yield torch.OutOfMemoryError("no memory")
    yield IndexError("in a pass")


@pytest.mark.parametrize("error", list(_errors()), ids=lambda error: type(error).__name__)
def test_whatever_a_candidate_raises_costs_one_line(runners, caplog, error):
    def fail():
        raise error

    instead, seen = runners
    instead.append(lambda candidate, branch: fail if candidate != seen[0][0] and not branch else None)
    row = tune_call(JOB, CPU, torch.float16, 3)[0]
    assert (row.algorithm, row.tile) == seen[0][0][:2]
    lines = [entry.getMessage() for entry in caplog.records]
    assert len(lines) == 2 and all(type(error).__name__ in line and "\n" not in line for line in lines)


def test_a_call_that_nothing_runs_does_not_end_the_others(runners, folder, caplog):
    def fail():
        raise RuntimeError("no")

    instead, _ = runners
    instead.append(lambda candidate, branch: fail if candidate.algorithm != "small_m" else None)
    seen = []
    jobs = [JOB, Job("exact", "Q8_0", 1, 32, 256)]
    tune(jobs, CPU, dtype=torch.float16, limit=1, on_row=lambda job, row: seen.append(job))
    assert seen == jobs[1:] and "No kernel for Job" in caplog.text
    with pytest.raises(BackendUnavailable, match="No kernel for"):
        tune(jobs[:1], CPU, dtype=torch.float16, limit=1)


@pytest.fixture
def spilling(monkeypatch):
    """Let a test name the candidates that spill."""
    names = set()
    real = Spills.after

    def after(self, key, launch):
        real(self, key, launch)
        return 12 if any(part in names for part in key if isinstance(part, Candidate)) else 0

    monkeypatch.setattr(Spills, "after", after)
    return names


def test_candidates_that_spill_are_left_out(spilling, caplog):
    tried = tuning._tried(JOB, CPU, torch.float16, 3)
    spilling |= set(tried[1:])
    row = tune_call(JOB, CPU, torch.float16, 3)[0]
    assert (row.algorithm, row.tile) == tried[0][:2] and caplog.text.count("spills 12 registers") == 2


def test_a_spilling_candidate_is_taken_where_nothing_else_is_left(spilling, runners):
    def fail():
        raise RuntimeError("no")

    tried = tuning._tried(JOB, CPU, torch.float16, 2)
    spilling.add(tried[1])
    runners[0].append(lambda candidate, branch: fail if candidate == tried[0] else None)
    assert tune_call(JOB, CPU, torch.float16, 2)[0].tile == tried[1].tile


def test_the_winner_is_measured_with_a_branch():
    row, branched = tune_call(JOB, CPU, torch.float16, 1)
    assert not row.branch and branched.branch and (row.algorithm, row.tile) == (branched.algorithm, branched.tile)


def test_a_winner_that_fails_or_spills_with_a_branch_leaves_the_default_there(runners, spilling, folder):
    def fail():
        raise RuntimeError("no")

    instead, _ = runners
    path = tune([JOB], CPU, dtype=torch.float16, limit=1)
    assert {row.branch for row in TuningRecord.load(path).rows.values()} == {False, True}
    instead.append(lambda candidate, branch: fail if branch else None)
    tune([JOB], CPU, dtype=torch.float16, limit=1, again=True)
    assert {row.branch for row in TuningRecord.load(path).rows.values()} == {False}


class _Here:
    """Stand for processes that compile: everything here, in order."""

    def __init__(self, *wrong: Candidate):
        self.tasks, self.wrong = [], wrong

    def failures(self, function, tasks):
        self.tasks += tasks
        return ["it broke" if candidate in self.wrong else function(job, candidate, *rest) for job, candidate, *rest in tasks]


def test_processes_compile_the_same_candidates():
    """They compile every candidate that is then timed, once however the weight is cut, on small sizes."""
    here, job = _Here(), Job("int8", "Q8_0", 512, 3072, 256)
    tuning._compile_all(here, job, CPU, torch.float16, 3)
    small, codes = here.tasks[0][0], [candidate for _, candidate, *_ in here.tasks]
    assert (small.m, small.n) == (16, 16)
    assert codes == list(dict.fromkeys(one._replace(rows=None) for one in tuning._tried(job, CPU, torch.float16, 3)))


def test_what_did_not_compile_is_not_tried(runners, caplog):
    tried = tuning._tried(JOB, CPU, torch.float16, 3)
    refused = tuning._compile_all(_Here(tried[1]), JOB, CPU, torch.float16, 3)
    assert refused == {tried[1]} and "it broke" in caplog.text
    runners[1].clear()
    tune_call(JOB, CPU, torch.float16, 3, refused)
    assert tried[1] not in [candidate for candidate, _ in runners[1]]


def test_processes_that_fail_at_everything_refuse_nothing():
    """As on a card in exclusive mode, where only one process may have a context."""
    tried = tuning._tried(JOB, CPU, torch.float16, 2)
    assert tuning._compile_all(_Here(*tried), JOB, CPU, torch.float16, 2) == frozenset()


def test_what_a_process_raises_is_a_reason(runners):
    def fail():
        raise ValueError("two\nlines")

    runners[0].append(lambda candidate, branch: fail)
    assert (
        tuning._compile_one(JOB, tuning._tried(JOB, CPU, torch.float16, 1)[0], "cpu", torch.float16) == "ValueError: two lines"
    )


def test_nothing_is_said_where_all_goes_well(caplog):
    with caplog.at_level(logging.WARNING):
        tune_call(JOB, CPU, torch.float16, 2)
    assert not caplog.records


def test_runs_are_timed_from_an_empty_cache(monkeypatch):
    flushed = []
    monkeypatch.setattr(tuning, "cache_flusher", lambda device: lambda: flushed.append(device))
    tune_call(JOB, CPU, torch.float16, 1)
    # Once without a branch, once with.
    assert len(flushed) == 2 * (tuning._QUICK + tuning._REPEATS)


def test_a_winner_that_is_slow_with_a_branch_has_no_row_for_it(monkeypatch):
    """With a branch it is not even among the fastest few, which alone are timed again."""
    best, operands = Candidate("fused", None), tuning.Operands(JOB, CPU, torch.float16)
    monkeypatch.setattr(tuning, "_working", lambda _, tried, *__, **___: dict.fromkeys(tried))
    monkeypatch.setattr(tuning, "_race", lambda runs, *_: {key: 1.0 for key in runs if key != best})
    assert tuning._with_branch(operands, best, Spills()) is None


def test_an_error_outside_a_candidate_costs_its_call_alone(tmp_path, monkeypatch):
    """A call without memory for its operands is logged, and the other calls are measured.

    A device that is lost ends the run, its rows saved.
    """
    real = tuning.Operands

    def operands(job, *rest):
        if job.m == 17:
            raise torch.OutOfMemoryError("no memory")
        return real(job, *rest)

    monkeypatch.setattr(tuning, "Operands", operands)
    jobs = [Job("exact", "Q8_0", m, 32, 64) for m in (17, 1)]
    path = tune(jobs, torch.device("cpu"), path=tmp_path / "record.json", dtype=torch.float32, processes=1)
    assert {row.m for row in TuningRecord.load(path).rows.values()} == {1}
    monkeypatch.setattr(tuning, "device_is_lost", lambda device: True)
    with pytest.raises(BackendUnavailable, match="could not be measured"):
        tune(jobs, torch.device("cpu"), path=tmp_path / "other.json", dtype=torch.float32, processes=1)
    assert not (tmp_path / "other.json").exists()
