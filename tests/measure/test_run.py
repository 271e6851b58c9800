"""Whole measurements: logs, processes, resuming, and what is refused before anything is measured."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from flux_kernels.cli import app
from flux_kernels.errors import FormatError
from flux_kernels.generation.base_pipeline import one_thread
from flux_kernels.measure import run as measure_run
from flux_kernels.measure.log import log_path
from flux_kernels.measure.states import States
from flux_kernels.mixed.cost import CostTable
from flux_kernels.mixed.imatrix import load_imatrix
from flux_kernels.mixed.option import Option
from flux_kernels.mixed.plan_file import Plan

from ..mixed.captured import COUNT, states
from .measured import LINEAR1, QKV, measurer, request_in


@pytest.fixture(scope="module", autouse=True)
def same_thread_count():
    """Compute on one thread here as `in_process` does in a fork.

    The last bits of costs depend on the number of threads.
    """
    with one_thread():
        yield


def in_process(request, rank: int, size: int, die_at: int | None = None) -> int:
    """Measure a share in a process of its own, which kills itself at an item; return its exit code."""

    def work():
        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
        seen = []

        def progress(what, _done, _total):
            seen.extend([what] if " Q" in what else [])
            if die_at is not None and len(seen) > die_at:
                os.kill(os.getpid(), signal.SIGKILL)

        world = measure_run.World.from_environment()
        measure_run.measure(measure_run.open_measurement(request, world, progress), world, progress)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(120)
    return process.exitcode


def test_a_table_has_every_tensor_and_type(whole):
    table = whole.table
    by_tensor = table.by_tensor()
    assert list(by_tensor) == list(measurer().tensors) and len(by_tensor) == 16
    for rows in by_tensor.values():
        assert list(map(str, rows)) == ["F16", "Q8_0", "Q4_K"]
        full, fine, coarse = rows.values()
        assert full.cost == 0 < fine.cost < coarse.cost
        assert full.bytes > fine.bytes > coarse.bytes
    assert by_tensor[QKV][Option("Q4_K")] == measurer().measure_one(QKV, Option("Q4_K"))
    assert table.states["count"] == len(states()) and table.importance == "collected"
    assert CostTable.load(whole.request.out) == table
    found = load_imatrix(whole.request.imatrix_path)
    torch.testing.assert_close(found[QKV], measurer().channel_weights(QKV))


def test_plans_are_measured_as_their_table_was(whole, tmp_path):
    """The table's importance is that of its rows: a plan of one tensor costs what its row says."""
    folder = shutil.copytree(whole.request.out.parent, tmp_path / "copy")
    request = replace(whole.request, out=folder / "costs.csv", plan={LINEAR1: Option("Q4_K")}).as_table()
    row = measure_run.measure_plan(measure_run.open_measurement(request))
    # The file holds sums and counts in float32 and gives their ratio: channels on a rounding edge may fall otherwise
    assert row.cost == pytest.approx(whole.table.by_tensor()[LINEAR1][Option("Q4_K")].cost, rel=1e-3)


def test_a_plan_that_only_partly_names_this_model_is_refused(tmp_path):
    """Before anything is measured: skipping what is not there would give the cost of another plan."""
    types = {QKV: "Q4_K", "double_blocks.7.img_attn.qkv.weight": "Q4_K", "final_layer.linear.weight": "F16"}
    Plan(types, bytes=1, cost=0.0).save(tmp_path / "plan.json")
    request = request_in(tmp_path / "foreign plan")
    done = CliRunner().invoke(app, ["measure", "--out", str(request.out), "--plan", str(tmp_path / "plan.json")])
    assert done.exit_code == 1
    assert "names double_blocks.7.img_attn.qkv.weight, which the model does not hold" in " ".join(done.output.split())
    with pytest.raises(FormatError, match="which the model does not hold"):
        measure_run.open_measurement(replace(request, plan=Plan(types, bytes=1, cost=0.0).by_tensor()))
    for plan, error in (
        ({"txt_in.weight": Option("Q8_0")}, "no quantized matrix"),
        ({QKV: Option("Q4_K", 999)}, "cannot be Q4_K"),
    ):
        with pytest.raises(FormatError, match=f"The plan does not fit the model: .*{error}"):
            measure_run.open_measurement(replace(request, plan=plan))


def test_killed_and_resumed_gives_the_same_table(whole, tmp_path):
    request = request_in(tmp_path / "killed")
    assert in_process(request, 0, 1, die_at=10) == -signal.SIGKILL
    log = log_path(request.out, 0)
    assert not request.out.exists() and len(log.read_bytes().splitlines()) == 11
    with log.open("ab") as file:
        # The line that was being written.
        file.write(b'{"tensor": "double_bl')
    measured = []
    opened = measure_run.open_measurement(request)
    table = measure_run.measure(opened, progress=lambda what, *_: measured.append(what))
    assert table == whole.table and len([what for what in measured if " Q" in what]) == 32 - 10
    assert request.out.read_bytes() == whole.request.out.read_bytes()


def test_two_processes_give_the_table_of_one(whole, tmp_path):
    request = request_in(tmp_path / "two")
    assert in_process(request, 1, 2) == 0
    # Half is missing.
    assert not request.out.exists()
    assert in_process(request, 0, 2) == 0
    assert request.out.read_bytes() == whole.request.out.read_bytes()
    assert all(len(log_path(request.out, rank).read_bytes().splitlines()) == 17 for rank in (0, 1))


def test_logs_of_something_else_are_refused(whole, tmp_path):
    request = request_in(tmp_path / "other")
    log_path(request.out, 0).write_bytes(log_path(whole.request.out, 0).read_bytes())
    # Of the same, it is taken as it is.
    assert measure_run.measure(measure_run.open_measurement(request)) == whole.table
    unweighted = request_in(tmp_path / "other", weighted=False)
    with pytest.raises(FormatError, match="was begun with another importance"):
        measure_run.measure(measure_run.open_measurement(unweighted))
    log = log_path(request.out, 0)
    log.write_bytes(b"something else\n")
    with pytest.raises(FormatError, match="is no log of this version"):
        measure_run.measure(measure_run.open_measurement(request))


def test_states_of_another_model_are_refused(tmp_path):
    request = request_in(tmp_path / "foreign")
    States(states(), "another", "0" * 64).save(request.states_path)
    with pytest.raises(FormatError, match=r"was captured with another model \(another"):
        measure_run.open_measurement(request)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (dict(count=1), f"{COUNT} states, not 1"),
        (dict(steps=99), "runs of 4 steps, not 99"),
        (dict(seed=12345), "not 12345"),
        (dict(prompts=["none of them"]), "of another prompt"),
        (dict(sizes=[(512, 512)]), "states of .* pixels"),
    ],
)
def test_states_that_were_not_asked_for_are_refused(tmp_path, asked, message):
    """They lie there from an earlier run; taking them in silence would answer another question."""
    with pytest.raises(FormatError, match=f"is there already and holds .*{message}"):
        measure_run.open_measurement(request_in(tmp_path / "unlike", **asked))


def test_world(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(FormatError, match="RANK is 3 of WORLD_SIZE 2"):
        measure_run.World.from_environment()
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(FormatError, match="are numbers"):
        measure_run.World.from_environment()
