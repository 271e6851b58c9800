"""`flux-kernels bench`: its rows, its summary, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from flux_kernels.benchmark import session
from flux_kernels.benchmark.record import read_csv
from flux_kernels.benchmark.session import Plan
from flux_kernels.cli import app
from flux_kernels.errors import FormatError


def bench(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(
        app, ["bench", "--formats", "Q4_0", "--scale", "1024", *map(str, arguments)]
    )


def test_every_row_tells_where_it_comes_from(tmp_path):
    result = bench("--repeats", 2, "--no-step", "--contribute", tmp_path / "rows.csv", "--plot", tmp_path / "speed.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.csv", "speed.png"]
    assert "x torch" in result.output and "Price:" in result.output.splitlines()[-3]
    rows = read_csv(tmp_path / "rows.csv")
    assert all(row["device"] and row["torch"] and row["commit"] and row["date"] for row in rows)
    assert torch.cuda.is_available() or all(row["device"].endswith(", 1 thread") and row["libggml"] for row in rows)
    assert {"torch", "ours exact"} <= {row["provider"] for row in rows if row["p50_ms"]}


def test_types_cut_short_by_time_are_not_summed(tmp_path):
    page = tmp_path / "a.html"
    result = bench("--no-step", "--minutes", 0, "--report", page, "--plot", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    assert "x torch" not in result.output and "11 of 11 shapes were not begun" in result.output
    assert "No plot is written" in result.output and [path.name for path in tmp_path.iterdir()] == ["a.html"]
    text = page.read_text()
    assert "Time ran out: 11 of 11 shapes were not begun in 0 minutes" in text and "<table" not in text
    assert "Origin 1: " in text and ", torch " in text


@pytest.mark.parametrize("minutes", [-1, "nan"])
def test_a_time_that_is_none_is_refused(minutes):
    result = bench("--minutes", minutes)
    assert result.exit_code == 2 and "--minutes" in result.output and "Give 0 or more" in result.output


@pytest.mark.parametrize("option", ["--contribute", "--report", "--plot"])
@pytest.mark.parametrize("name", [".", "..", "/"])
def test_a_folder_is_no_file_to_write(option, name):
    result = bench(option, name)
    assert result.exit_code == 1 and f"{option} {name} is a folder. Name a file in it." in result.output


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)])
def test_a_stopped_run_keeps_what_it_measured_under_another_name(tmp_path, monkeypatch, stop, code):
    """Stopped after its first call; the same command then runs to its end, over what the first one left."""
    measured, calls = session.measure, []

    def stopped(*arguments):
        if calls:
            raise stop
        calls.append(arguments)
        yield from measured(*arguments)

    monkeypatch.setattr(session, "measure", stopped)
    command = ("--no-step", "--json", "--repeats", 1, "--contribute", tmp_path / "card.csv")
    result = bench(*command)
    assert result.exit_code == code
    assert [path.name for path in tmp_path.iterdir()] == ["card.csv.part"]
    assert f"Not complete. What was measured is in {tmp_path / 'card.csv.part'}." in result.stderr
    kept, document = read_csv(tmp_path / "card.csv.part"), json.loads(result.stdout)
    assert document["interrupted"] and len(document["linears"]) == len(kept) > 3 and document["steps"] == []
    monkeypatch.setattr(session, "measure", measured)
    result = bench(*command)
    assert result.exit_code == 0 and [path.name for path in tmp_path.iterdir()] == ["card.csv"]
    assert len(read_csv(tmp_path / "card.csv")) == 11 * len(kept) and not json.loads(result.stdout)["interrupted"]


def test_a_file_that_is_there_is_not_overwritten(tmp_path):
    there = tmp_path / "rows.csv"
    there.write_text("mine")
    result = bench("--contribute", there)
    assert result.exit_code == 1 and there.read_text() == "mine"


def test_a_run_for_machines_with_its_page_and_the_whole_step(tmp_path, monkeypatch):
    """JSON alone is on standard output, the page in its file, whole steps in a table of their own.

    There are no pictures, for time.
    """
    steps = session.measure_steps
    monkeypatch.setattr(session, "measure_steps", lambda *names, **options: steps(*names, **options | dict(denoising=False)))
    result = bench("--repeats", 1, "--json", "--report", tmp_path / "a.html", "--contribute", tmp_path / "card.csv")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert len(document["verdict"]) == 5 and "tiny embedded model" in document["verdict"][1]
    assert len(document["linears"]) == len(read_csv(tmp_path / "card.csv"))
    assert document["not_run"] == dict(linear_calls=0, whole_runs=[])
    steps = read_csv(tmp_path / "card-step.csv")
    assert len(steps) == len(document["steps"]) and {row["what"] for row in steps} == {"embedded step"}
    page = (tmp_path / "a.html").read_text()
    assert document["verdict"][0] in page and page.count("<img") == 4 and "Report in" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "card-step.csv", "card.csv"]


@pytest.mark.parametrize("option", ["--report", "--plot", "--contribute"])
def test_a_missing_folder_is_told_before_anything_is_measured(tmp_path, monkeypatch, option):
    monkeypatch.setattr(session, "measure_ceilings", lambda *_: pytest.fail("measured"))
    result = bench(option, tmp_path / "absent" / "file")
    assert result.exit_code == 1 and option in result.output and "no folder" in result.output
    assert not list(tmp_path.iterdir())


def test_a_whole_step_is_begun_only_where_one_as_long_as_those_before_fits(monkeypatch):
    """Three types take 40 s each on a clock of ours: of 119 s the third has no room, pictures of 30 s do."""
    clock, pipelines = [0.0], []

    def measured(names, *_, denoising, **__):
        if names[0] == "IQ1_S":
            raise FormatError("nothing quantizes it")
        clock[0] += 30 if denoising else 40
        pipelines.append(denoising)
        yield dict(format=names[0], provider="torch", what="step", size="1024x1024", commit="abc")

    monkeypatch.setattr(session.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(session, "measure_steps", measured)
    monkeypatch.setattr(session, "measure", lambda *_: iter(()))
    monkeypatch.setattr(session, "measure_ceilings", lambda *_: None)
    monkeypatch.setattr(session, "_PICTURE_SECONDS", 30.0)
    plan = Plan(["Q4_K", "IQ1_S", "Q6_K", "Q8_0"], ["torch"], minutes=119 / 60)
    pieces = []
    run = session.measure_all(
        plan, torch.device("cpu"), torch.float32, lambda words, done: pieces.append(done), lambda kind, row: None
    )
    assert [row["format"] for row in run.steps] == ["Q4_K", "Q6_K", "Q4_K"]
    assert run.not_run == [
        "whole step, IQ1_S, 1024x1024 (nothing quantizes it)",
        "whole step, Q8_0, 1024x1024 (no time was left)",
    ]
    assert pipelines == [False, False, True]
    assert sum(pieces) == plan.work(torch.device("cpu")) - 1


def test_another_model_s_linear_calls_are_added_up_to_a_step():
    result = bench("--model", "z-image-turbo", "--repeats", 1)
    assert result.exit_code == 0, result.output
    line = next(line for line in result.output.splitlines() if "ours exact" in line)
    assert "ms a step" in line and "z-image-turbo 1024x1024" in line
    assert "Not run: whole steps (timed of flux1-dev alone; of z-image-turbo, the linear calls of a step are added up)." in (
        result.output
    )


def test_where_no_whole_step_follows_the_linear_calls_have_all_the_time(monkeypatch):
    clock = [0.0]

    def measured(*_):
        clock[0] += 10
        return iter(())

    monkeypatch.setattr(session.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(session, "measure", measured)
    monkeypatch.setattr(session, "measure_ceilings", lambda *_: None)
    plan = Plan(["Q4_K"], ["torch"], model="flux2-klein-4b")
    plan = replace(plan, minutes=10 * len(plan.calls()) / 60)
    run = session.measure_all(plan, torch.device("cpu"), torch.float32, lambda *_: None, lambda *_: None)
    assert run.calls_late == 0 and len(plan.calls()) > 4
