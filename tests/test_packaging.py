"""What a wheel holds, by its configuration.

Nothing is built here: tools/check_installed.py compares an installed one.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import flux_kernels
from flux_kernels.version import own_version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGE = ROOT / "flux_kernels"


def test_the_wheel_is_the_package_with_all_its_files():
    """Hatchling takes every file of the folder that no rule here and no .gitignore leaves out."""
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": ["flux_kernels"]}
    assert set(PROJECT["tool"]["hatch"]["build"]) == {"targets"}


def test_git_ignores_no_file_of_the_package():
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {".json", ".safetensors", ".typed"} <= {path.suffix or path.name for path in files}
    command = ["git", "check-ignore", "--no-index", "--stdin"]
    done = subprocess.run(command, input="\n".join(map(str, files)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr  # 1: none is ignored


def test_users_type_checkers_read_the_annotations():
    assert (PACKAGE / "py.typed").is_file()
    assert "Typing :: Typed" in PROJECT["project"]["classifiers"]
    assert PROJECT["tool"]["mypy"]["files"] == ["flux_kernels"]


@pytest.mark.parametrize(("system", "wanted"), [("Linux", True), ("Windows", False), ("Darwin", False)])
def test_triton_is_required_where_it_has_wheels(system, wanted):
    (triton,) = (need for need in map(Requirement, PROJECT["project"]["dependencies"]) if need.name == "triton")
    assert triton.marker.evaluate({"platform_system": system}) == wanted


def test_every_package_that_is_needed_has_a_pin():
    """Among constraints.txt's lines, in the range that pyproject.toml gives."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {need.name.lower(): need for need in map(Requirement, (line for line in lines if line and line[0] != "#"))}
    extras = PROJECT["project"]["optional-dependencies"]
    named = [*PROJECT["project"]["dependencies"], *extras["test"], *extras["plan"], *extras["bench"]]
    needs = [need for need in map(Requirement, named) if need.name != "flux_kernels"]
    for need in [*needs, *map(Requirement, PROJECT["build-system"]["requires"])]:
        (pin,) = pins[need.name.lower()].specifier
        assert pin.operator == "==" and need.specifier.contains(pin.version), need


def test_the_module_says_its_version():
    assert flux_kernels.__version__ == own_version()


def test_the_changelog_begins_with_the_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert (
        re.search(r"^## (\S+) \((unreleased|\d{4}-\d\d-\d\d)\)$", changelog, re.MULTILINE)[1] == PROJECT["project"]["version"]
    )
