"""The files that GitHub and pre-commit read parse, and agree with what they repeat.

Nothing else runs them here.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
GITHUB = ROOT / ".github"
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def lines_of(job: dict) -> list[str]:
    """Return the command lines of a job's steps, and of its matrix."""
    texts = [step.get("run", "") for step in job["steps"]]
    texts += [row.get("commands", "") for row in job["strategy"]["matrix"].get("include", [])]
    return [line.strip() for text in texts for line in text.splitlines()]


@pytest.fixture(scope="module")
def jobs() -> dict:
    return read(GITHUB / "workflows" / "ci.yml")["jobs"]


def test_the_tests_run_on_each_python_that_is_promised(jobs):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    promised = [name.split(" :: ")[-1] for name in project["classifiers"] if re.search(r":: Python :: 3\.\d+$", name)]
    assert jobs["test"]["strategy"]["matrix"]["python"] == promised
    assert project["requires-python"] == f">={promised[0]}"


def test_the_tests_run_as_elsewhere(jobs):
    assert lines_of(jobs["test"]) == ["bash .ci/run"]
    assert (ROOT / ".ci" / "run").is_file()


def test_the_wheel_is_tried_on_each_system(jobs):
    assert {system.partition("-")[0] for system in jobs["wheel"]["strategy"]["matrix"]["os"]} == {"ubuntu", "windows", "macos"}


def test_readme_commands_run_as_they_stand_there(jobs):
    """macOS runs the first command of README.md, Windows the block for it but for the tests.

    Those take a quarter of an hour.
    """
    rows = {row["os"]: row["commands"].splitlines() for row in jobs["readme"]["strategy"]["matrix"]["include"]}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"On Windows, or without make:\n\n((?:    .*\n)+)", readme)[1]
    lines = [line.partition("  #")[0].strip() for line in block.splitlines()]
    assert [*rows["windows-latest"], "python -m pytest"] == lines
    assert rows["macos-latest"] == ["make demo"] and re.search(r"(?m)^    make demo ", readme)


def test_jobs_end_and_may_do_little(jobs):
    workflow = read(GITHUB / "workflows" / "ci.yml")
    assert workflow["permissions"] == {"contents": "read"} and "concurrency" in workflow
    for job in jobs.values():
        assert job["timeout-minutes"] <= 60
        actions = [step["uses"] for step in job["steps"] if "uses" in step]
        assert all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in actions)
        assert any(step.get("with", {}).get("cache") == "pip" for step in job["steps"])


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_every_issue_form_asks_what_runs_where(path):
    form = read(path)
    assert {"name", "description", "body"} <= set(form)
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in fields} <= {"textarea", "input", "dropdown", "checkboxes"}
    assert len({field["id"] for field in fields}) == len(fields)
    (doctor,) = (field for field in fields if "flux-kernels doctor --json" in field["attributes"]["label"])
    assert doctor["validations"]["required"]


def test_there_are_three_issue_forms_and_a_short_pull_request_template():
    assert {path.stem for path in FORMS} == {"bug", "slow_or_wrong_image", "new_architecture"}
    assert "blank_issues_enabled" in read(GITHUB / "ISSUE_TEMPLATE" / "config.yml")
    assert len((GITHUB / "PULL_REQUEST_TEMPLATE.md").read_text(encoding="utf-8").splitlines()) <= 12


def test_pre_commit_has_the_versions_of_make_lint():
    """ruff has the pin; mypy is the very program that make installs from constraints.txt."""
    (repository,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    pins = {line.strip() for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()}
    *ruff, mypy = repository["hooks"]
    assert [hook["entry"].split()[:2] for hook in ruff] == [["ruff", "check"], ["ruff", "format"]]
    for hook in ruff:
        (pin,) = hook["additional_dependencies"]
        assert pin in pins and pin.startswith("ruff==")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert mypy["entry"] == ".venv/bin/mypy" and "VENV ?= .venv\n" in makefile and "\t$(BIN)/mypy\n" in makefile
